"""A state goes through each library that stores it, and through releases of this one, bit for bit."""

import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors import flax as safetensors

from optax_nadam import compensated, nadamw
from tests import reference
from tests.recordings import record_state

pytestmark = pytest.mark.lenient("Optax's schedule and clipping mix dtypes")


class Format(NamedTuple):
    """How a library stores a tree, and what it raises for half of what it stored."""

    save: Callable[[Path, Any], object]
    load: Callable[[Path, Any], Any]
    error: type[Exception]


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load_orbax(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def by_name(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def from_names(arrays, target):
    return jax.tree.map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], target)


def load_npz(path, target):
    """NumPy stores bfloat16 as two untyped bytes; a view restores the dtype."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return jax.tree.map(lambda x, like: x.view(like.dtype), from_names(arrays, target), target)


ORBAX = Format(save_orbax, load_orbax, ValueError)
FILES = {
    "flax": Format(
        lambda path, tree: path.write_bytes(serialization.to_bytes(tree)),
        lambda path, target: serialization.from_bytes(target, path.read_bytes()),
        ValueError,
    ),
    "equinox": Format(eqx.tree_serialise_leaves, eqx.tree_deserialise_leaves, RuntimeError),
    "safetensors": Format(
        lambda path, tree: safetensors.save_file(by_name(tree), path),
        lambda path, target: from_names(safetensors.load_file(path), target),
        SafetensorError,
    ),
    "npz": Format(lambda path, tree: np.savez(path, **by_name(tree)), load_npz, zipfile.BadZipFile),
}
FORMATS = FILES | {"orbax": ORBAX}
STORED = "stored.npz"  # NumPy adds the ending where it is missing
DTYPES = [jnp.float32, jnp.bfloat16, jnp.complex64]
EVERY_PRECISION = pytest.mark.parametrize(
    "dtypes",
    [DTYPES, pytest.param([*DTYPES, jnp.float64], marks=pytest.mark.x64)],
    ids=["32 bits", "64 bits"],
)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), nadamw(optax.linear_schedule(0.1, 0.0, 20), weight_decay=0.01))


def initial(dtypes=DTYPES):
    params = {jnp.dtype(d).name: jnp.linspace(-2, 1, 24).reshape(8, 3).astype(d) for d in dtypes}
    return {"params": params, "opt_state": optimizer().init(params)}


@jax.jit
def take_step(training):
    """A step on the sum of squares; its gradients are clipped."""
    params = training["params"]
    grads = jax.tree.map(lambda p: 2 * p, params)
    updates, opt_state = optimizer().update(grads, training["opt_state"], params)
    return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}


def after_three_steps(dtypes=DTYPES):
    return take_step(take_step(take_step(initial(dtypes))))


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    differing = jax.tree.map(lambda a, b: np.asarray(a).tobytes() != np.asarray(b).tobytes(), actual, expected)
    assert [name for name, differs in by_name(differing).items() if differs] == []


@EVERY_PRECISION
@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
def test_the_step_after_a_round_trip_is_the_step_without_it(storage, dtypes, tmp_path):
    training = after_three_steps(dtypes)
    storage.save(tmp_path / STORED, training)
    restored = storage.load(tmp_path / STORED, jax.eval_shape(lambda: initial(dtypes)))
    assert_same_bits(restored, training)
    assert_same_bits(take_step(restored), take_step(training))


def test_orbax_restores_onto_another_sharding(tmp_path):
    training = after_three_steps()
    save_orbax(tmp_path / STORED, training)
    mesh = Mesh(np.array(jax.devices("cpu")), ("rows",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: rows if x.ndim else everywhere, training)
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), training, shardings
    )
    restored = load_orbax(tmp_path / STORED, target)
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    assert_same_bits(restored, training)
    # For a sharded state XLA compiles another program, whose last bits may differ: both must be sharded alike.
    assert_same_bits(take_step(restored), take_step(jax.device_put(training, shardings)))


NARROW = {
    "bfloat16": nadamw(0.1, m_dtype="bfloat16", v_dtype="bfloat16"),
    "int8": nadamw(0.1, m_dtype="int8", v_dtype="int8"),
    "int8 and compensated": compensated(nadamw(0.1, m_dtype="int8", v_dtype="int8")),
}


@functools.cache
def in_narrow_formats(name):
    """A training in a format, three steps on, and its step."""
    tx = NARROW[name]
    params = {"w": jnp.linspace(-2, 1, 2048).reshape(32, 64).astype(jnp.bfloat16), "b": jnp.ones(8)}

    @jax.jit
    def step(training):
        params = training["params"]
        grads = jax.tree.map(lambda p: p * p, params)
        updates, opt_state = tx.update(grads, training["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}

    return step(step(step({"params": params, "opt_state": tx.init(params)}))), step


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
def test_narrow_formats_go_through_every_store(storage, narrow, tmp_path):
    training, step = in_narrow_formats(narrow)
    storage.save(tmp_path / STORED, training)
    restored = storage.load(tmp_path / STORED, jax.eval_shape(lambda: training))
    assert_same_bits(restored, training)
    assert_same_bits(step(restored), step(training))


@pytest.mark.parametrize("narrow", NARROW)
def test_orbax_restores_narrow_formats_onto_another_sharding(narrow, tmp_path):
    training, step = in_narrow_formats(narrow)
    save_orbax(tmp_path / STORED, training)
    mesh = Mesh(np.array(jax.devices("cpu")), ("rows",))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("rows") if x.ndim else PartitionSpec())
        ),
        training,
    )
    restored = load_orbax(tmp_path / STORED, target)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    assert_same_bits(restored, training)
    # For a sharded state XLA compiles another program, whose last bits may differ: both must be sharded alike.
    assert_same_bits(step(restored), step(jax.device_put(training, jax.tree.map(lambda x: x.sharding, target))))


def cut_short(path, fraction):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])


FRACTIONS = pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])


@FRACTIONS
@pytest.mark.parametrize("storage", FILES.values(), ids=FILES)
def test_a_file_cut_short_raises(storage, fraction, tmp_path):
    storage.save(tmp_path / STORED, after_three_steps())
    cut_short(tmp_path / STORED, fraction)
    with pytest.raises(storage.error):
        storage.load(tmp_path / STORED, jax.eval_shape(initial))


@FRACTIONS
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_an_orbax_checkpoint_with_a_file_cut_short_raises(name, fraction, tmp_path):
    # One leaf only: Orbax abandons the reads of the others when one fails, and they complain later, in threads.
    m = optax.tree.get(after_three_steps(), "m")["float32"]
    save_orbax(tmp_path / STORED, {"m": m})
    cut_short(next((tmp_path / STORED).glob(name)), fraction)
    with pytest.raises(ORBAX.error):
        load_orbax(tmp_path / STORED, jax.eval_shape(lambda: {"m": m}))


RECORDINGS = Path(record_state.__file__).parent
RELEASES = ("0.1.0", "0.2.0")
RECORDED = {"state-{}.msgpack": FILES["flax"], "state-{}-orbax": ORBAX}
# A bfloat16 update is decayed and scaled in bfloat16, by Optax.
PRECISION = {"bias": 2**-7, "kernel": 2e-7, "phase": 2e-7}


@pytest.fixture(params=RELEASES)
def release(request):
    return request.param


@pytest.fixture
def recorded(release):
    """The recording of a release in plain arrays."""
    like = jax.eval_shape(record_state.recorded)
    with np.load(RECORDINGS / f"state-{release}.npz") as arrays:
        values = from_names(arrays, like)
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if y.dtype == jnp.bfloat16 else x, values, like)


@pytest.mark.parametrize("name", RECORDED)
def test_a_state_of_an_earlier_release_loads_and_continues_as_it_did_there(name, release, recorded):
    tx = record_state.optimizer()
    opt_state = RECORDED[name].load(RECORDINGS / name.format(release), tx.init(recorded["params"]))
    assert_same_bits(opt_state, recorded["opt_state"])

    updates, _ = jax.jit(tx.update)(recorded["gradients"], opt_state, recorded["params"])
    exact = reference_updates(recorded)
    for leaf, precision in PRECISION.items():
        assert relative_error(updates[leaf], recorded["updates"][leaf]) <= precision
        assert relative_error(updates[leaf], exact[leaf]) <= precision


def relative_error(actual, expected):
    return np.linalg.norm(double(actual) - double(expected)) / np.linalg.norm(double(expected))


def double(x):
    return np.asarray(x).astype(np.result_type(x.dtype, np.float64))


def reference_updates(recorded):
    """The next updates from the recorded numbers, in double precision."""
    _, (nadam, *_) = jax.tree.map(double, recorded["opt_state"])
    step = nadam.count + 1
    rate = record_state.LEARNING_RATE * (1 - nadam.count / record_state.LEARNING_RATE_STEPS)
    updates = {}
    for name, p in recorded["params"].items():
        g = double(recorded["gradients"][name])
        u, *_ = reference.Nadam().step(g, nadam.m[name], nadam.v[name], step, nadam.mu_product)
        updates[name] = -rate * (u + record_state.WEIGHT_DECAY * double(p))
    return updates
