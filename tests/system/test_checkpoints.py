"""A state goes through each library that stores it, and through releases of this one.

- Orbax, Flax msgpack, Equinox, safetensors and npz restore every bit, and the next step is the same: float32,
  bfloat16, complex64 and float64, with moments in every format and with compensated weights.
- Orbax restores onto another sharding, every format; and without a target what ``set_state`` makes a state of.
- A truncated file raises.
- A state saved by any release loads, and the next step is the one taken there; 8-bit moments of 0.2.0 are refused.
"""

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

from optax_nadam import compensated, nadamw, set_state
from tests import reference
from tests.recordings import record_state

pytestmark = pytest.mark.lenient("Optax's schedule and clipping mix dtypes")


class Store(NamedTuple):
    """How a library stores a tree, and what it raises for a part of what it stored."""

    save: Callable[[Path, Any], object]
    load: Callable[[Path, Any], Any]
    error: type[Exception]


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load_orbax(path, target=None):
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


STORES = {
    "flax": Store(
        lambda path, tree: path.write_bytes(serialization.to_bytes(tree)),
        lambda path, target: serialization.from_bytes(target, path.read_bytes()),
        ValueError,
    ),
    "equinox": Store(eqx.tree_serialise_leaves, eqx.tree_deserialise_leaves, RuntimeError),
    "safetensors": Store(
        lambda path, tree: safetensors.save_file(by_name(tree), path),
        lambda path, target: from_names(safetensors.load_file(path), target),
        SafetensorError,
    ),
    "npz": Store(lambda path, tree: np.savez(path, **by_name(tree)), load_npz, zipfile.BadZipFile),
    "orbax": Store(save_orbax, load_orbax, ValueError),
}
STORED = "stored.npz"  # NumPy adds the ending where it is missing
INT8: Any = {"m_dtype": "int8", "v_dtype": "int8"}
PLAIN = optax.chain(optax.clip_by_global_norm(1.0), nadamw(optax.linear_schedule(0.1, 0.0, 20), weight_decay=0.01))
OPTIMIZERS = {
    "32 bits": PLAIN,
    "64 bits": PLAIN,
    "bfloat16": nadamw(0.1, m_dtype="bfloat16", v_dtype="bfloat16"),
    "int8 without codes": nadamw(0.1, m_dtype=lambda path: None, v_dtype=lambda path: None),
    "int8 and compensated": compensated(nadamw(0.1, **INT8)),
}
OF_32_BITS = [name for name in OPTIMIZERS if name != "64 bits"]


@functools.cache
def step_of(name):
    """A step on the sum of squares."""

    @jax.jit
    def step(training):
        params, opt_state = training
        updates, opt_state = OPTIMIZERS[name].update(jax.tree.map(lambda p: 2 * p, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.cache
def training_of(name):
    """Params and state after three steps."""
    dtypes = {"32 bits": ["float32", "complex64"], "64 bits": ["float64"]}.get(name, ["bfloat16"])
    params: Any = {d: np.linspace(-2, 1, 1152).reshape(24, 48).astype(jnp.dtype(d)) for d in dtypes}
    params["small"] = np.ones(8, np.float32)
    step = step_of(name)
    return step(step(step((params, jax.jit(OPTIMIZERS[name].init)(params)))))


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    differing = jax.tree.map(lambda a, b: np.asarray(a).tobytes() != np.asarray(b).tobytes(), actual, expected)
    assert [name for name, differs in by_name(differing).items() if differs] == []


@pytest.mark.parametrize("name", [*OF_32_BITS, pytest.param("64 bits", marks=pytest.mark.x64)])
@pytest.mark.parametrize("store", STORES)
def test_round_trip(store, name, tmp_path):
    training, step = training_of(name), step_of(name)
    STORES[store].save(tmp_path / STORED, training)
    restored = STORES[store].load(tmp_path / STORED, jax.eval_shape(lambda: training))
    assert_same_bits(restored, training)
    assert_same_bits(step(restored), step(training))


@pytest.mark.parametrize("name", OF_32_BITS)
def test_orbax_reshards(name, tmp_path):
    training = training_of(name)
    save_orbax(tmp_path / STORED, training)
    mesh = Mesh(np.array(jax.devices("cpu")), ("rows",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: rows if x.ndim else everywhere, training)
    abstract = functools.partial(jax.tree.map, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))
    restored = load_orbax(tmp_path / STORED, abstract(training, shardings))
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    assert_same_bits(restored, training)


@pytest.mark.parametrize(
    "tx", [PLAIN, OPTIMIZERS["bfloat16"], nadamw(0.1, **INT8)], ids=["32 bits", "bfloat16", "int8"]
)
def test_orbax_without_target(tx, tmp_path):
    """Of optimizers inside others, one of them masked."""
    params, _ = training_of("bfloat16")
    tx = optax.chain(optax.masked(tx, dict.fromkeys(params, True) | {"small": False}))
    fresh = jax.jit(tx.init)(params)
    opt_state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), fresh)
    save_orbax(tmp_path / STORED, {"params": params, "opt_state": opt_state})
    assert_same_bits(set_state(fresh, load_orbax(tmp_path / STORED)["opt_state"]), opt_state)


# Orbax stores a folder. One leaf only: it abandons the reads of the others when one fails, which complain later.
PARTS = ("_METADATA", "manifest.ocdbt", "d/*")


@pytest.mark.parametrize(
    ("store", "part"), [(store, "") for store in STORES if store != "orbax"] + [("orbax", part) for part in PARTS]
)
def test_truncated(store, part, tmp_path):
    stored = {"m": optax.tree.get(training_of("32 bits"), "m")["float32"]} if part else training_of("32 bits")
    STORES[store].save(tmp_path / STORED, stored)
    path = next((tmp_path / STORED).glob(part)) if part else tmp_path / STORED
    whole = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(STORES[store].error):
            STORES[store].load(tmp_path / STORED, jax.eval_shape(lambda: stored))


RECORDINGS = Path(record_state.__file__).parent
RELEASES = sorted(path.stem.removeprefix("state-") for path in RECORDINGS.glob("state-*.npz"))
# A bfloat16 update is decayed and scaled in bfloat16, by Optax.
PRECISION = {"bias": 2**-7, "kernel": 2e-7, "phase": 2e-7}


@pytest.mark.parametrize(("file", "store"), [("state-{}.msgpack", "flax"), ("state-{}-orbax", "orbax")])
@pytest.mark.parametrize("release", RELEASES)
def test_earlier_releases(release, file, store):
    like = jax.eval_shape(record_state.recorded)
    with np.load(RECORDINGS / f"state-{release}.npz") as arrays:
        values = from_names(arrays, like)
    recorded = jax.tree.map(lambda x, y: x.astype(y.dtype) if y.dtype == jnp.bfloat16 else x, values, like)

    tx = record_state.optimizer()
    opt_state = STORES[store].load(RECORDINGS / file.format(release), tx.init(recorded["params"]))
    assert_same_bits(opt_state, recorded["opt_state"])
    updates, _ = jax.jit(tx.update)(recorded["gradients"], opt_state, recorded["params"])
    exact = exact_updates(recorded)
    for leaf, precision in PRECISION.items():
        for expected in (double(recorded["updates"][leaf]), exact[leaf]):
            assert np.linalg.norm(double(updates[leaf]) - expected) <= precision * np.linalg.norm(expected)


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("narrow-*.msgpack")), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", record_state.NARROW)
def test_narrow_of_releases(dtype, file):
    recorded = serialization.msgpack_restore(file.read_bytes())[dtype]
    tx, params = record_state.optimizer(dtype), recorded["params"]
    if dtype == "int8" and file.stem == "narrow-0.2.0":
        with pytest.raises(ValueError, match=r"8-bit moments of optax_nadam 0.2.0.*In 0.2.0, load it, convert_moments"):
            set_state(jax.eval_shape(tx.init, params), recorded["opt_state"])
        return
    fresh = jax.jit(tx.init)(params)
    opt_state = set_state(fresh, recorded["opt_state"])
    assert_same_bits(opt_state, serialization.from_state_dict(fresh, recorded["opt_state"]))
    updates, _ = jax.jit(tx.update)(recorded["gradients"], opt_state, params)
    for name, expected in recorded["updates"].items():  # other bits may round the moments of the step
        assert np.linalg.norm(updates[name] - expected) <= 2**-8 * np.linalg.norm(expected)


def double(x):
    return np.asarray(x).astype(np.result_type(x.dtype, np.float64))


def exact_updates(recorded):
    """The next updates from the recorded numbers, in double precision."""
    _, (nadam, *_) = jax.tree.map(double, recorded["opt_state"])
    rate = record_state.LEARNING_RATE * (1 - nadam.count / record_state.LEARNING_RATE_STEPS)
    updates = {}
    for name, p in recorded["params"].items():
        g = double(recorded["gradients"][name])
        u, *_ = reference.Nadam().step(g, nadam.m[name], nadam.v[name], nadam.count + 1, nadam.mu_product)
        updates[name] = -rate * (u + record_state.WEIGHT_DECAY * double(p))
    return updates
