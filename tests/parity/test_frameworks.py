"""Optimizers and their states in other libraries; ``tests/project/test_examples.py`` trains in more of them.

- Flax nnx takes the steps of plain Optax, with 8-bit, compensated, partitioned, accumulated and complex states: bit for
  bit. Whatever takes an optimizer state takes and returns that of ``nnx.Optimizer``.
- 8-bit states pass unchanged through nnx's and linen's metadata, haliax, ``optax.tree.map_params`` and Orbax.
- Our states are registered for ``jax.export``: bit for bit.
- Compensated weights that ``equinox.apply_updates`` has widened are refused by name.
"""

import warnings
from typing import Any

import chex
import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax import checkpoint as ocp

import optax_nadam
from optax_nadam._tree import by_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what jax has deprecated
    import haliax as hax

pytestmark = pytest.mark.lenient("these libraries mix dtypes")


class Net(nnx.Module):
    """A layer of enough weights for 8-bit moments, and a complex one."""

    def __init__(self, dtype):
        """Starts from fixed weights."""
        self.kernel = nnx.Param(jnp.linspace(-1.0, 1.0, 32 * 64).reshape(32, 64).astype(dtype))
        self.phase = nnx.Param(jnp.ones(3, jnp.complex64))

    def loss(self):
        """Of the weights alone."""
        phase = self.phase[...]
        return jnp.mean(self.kernel[...].astype(jnp.float32) ** 2) + jnp.sum(jnp.real(phase * jnp.conj(phase)))


BYTES: dict[str, Any] = {"m_dtype": "int8", "v_dtype": "int8"}


def parts(params):
    """A label for each leaf, whatever container the params are in."""
    return jax.tree.map_with_path(lambda path, _: "ours" if "kernel" in jax.tree_util.keystr(path) else "adam", params)


IN_NNX: dict[str, Any] = {
    "compensated": optax_nadam.compensated(optax_nadam.nadamw(0.1, **BYTES)),
    "partition": optax.partition({"ours": optax_nadam.nadamw(0.1), "adam": optax.adam(0.1)}, parts),
    "accumulation": optax_nadam.NadamConfig(
        learning_rate=0.1, accumulate_steps=2, complex_as_real=True, **BYTES
    ).build(),
}


@pytest.mark.parametrize("name", IN_NNX)
def test_flax_nnx(name):
    """Flax nnx makes mappings of the records in its variables, their fields sorted by name."""
    tx, model = IN_NNX[name], Net(jnp.bfloat16 if name == "compensated" else jnp.float32)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model.loss())(model))

    @jax.jit
    def plain_step(params, state):
        graph, _ = nnx.split(model)
        grads = jax.grad(lambda params: nnx.merge(graph, nnx.State(params)).loss())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(4):
        params, state = plain_step(params, state)
        step(model, optimizer)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    if name != "partition":
        inside, expected = map(optax_nadam.get_state, (nnx.as_pure(optimizer.opt_state), state))
        chex.assert_trees_all_equal(by_name(inside), by_name(expected))


def test_nnx_states():
    """As they are in an ``nnx.Optimizer``; what comes back has the same form, and the same numbers where it should."""
    config = optax_nadam.NadamConfig(learning_rate=0.1, **BYTES)
    tx = optax_nadam.compensated(config.build())
    model = Linear(jnp.bfloat16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model.loss())(model))

    for _ in range(3):
        step(model, optimizer)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state

    def converted(state, formats):
        return jax.jit(lambda state: optax_nadam.convert_moments(state, **formats))(state)

    weights = jax.jit(optax_nadam.master_params)(state, params)
    assert jax.tree.leaves(weights)[0].dtype == jnp.float32
    wide = converted(state, dict.fromkeys(BYTES))
    same = {
        "set_master_params": jax.jit(optax_nadam.set_master_params)(state, weights),
        "set_count": (params, optax_nadam.set_count(state, 3, config)),
        "convert_moments": (params, converted(wide, BYTES)),
        "set_state": (params, optax_nadam.set_state(state, wide)),
    }
    for name, result in same.items():
        chex.assert_trees_all_close(result, (params, state), rtol=2e-7, custom_message=name)
    assert jax.tree.structure(optax_nadam.set_state(wide, state)) == jax.tree.structure(wide)
    scalars = jax.jit(lambda state: optax_nadam.diagnostics.scalars(state, config))
    chex.assert_trees_all_equal(scalars(state), scalars(nnx.as_pure(state)))


class Linear(nnx.Module):
    """A layer of enough weights for 8-bit moments."""

    def __init__(self, dtype=jnp.float32):
        """Starts from random weights."""
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 128)).astype(dtype))
        self.bias = nnx.Param(jnp.ones(128, dtype))

    def loss(self):
        """Of the weights alone."""
        return sum(jnp.sum(p[...].astype(jnp.float32) ** 2) for p in (self.kernel, self.bias))


@pytest.mark.parametrize("as_state", [False, True], ids=["dict", "nnx.State"])
@pytest.mark.parametrize("groups", [1, 2])
def test_nnx_takes_checkpoints(rng, as_state, groups):
    """Of PyTorch, from a ``to_params`` that makes dicts or an ``nnx.State``."""
    arrays = {"weight": rng.standard_normal((128, 64)), "bias": rng.standard_normal(128)}
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, "weight_decay": 0.0}
    names = [["weight", "bias"]] if groups == 1 else [["weight"], ["bias"]]
    source = {
        "state": {
            i: {"step": np.float32(5), "mu_product": np.float32(0.1), "exp_avg": x, "exp_avg_sq": x**2}
            for i, x in enumerate(arrays.values())
        },
        "param_groups": [
            {
                **group,
                "weight_decay": 0.1 * n,
                "params": [["weight", "bias"].index(name) for name in own],
                "param_names": own,
            }
            for n, own in enumerate(names)
        ],
    }
    model = Linear()

    def to_params(weights):
        params = {"kernel": jnp.asarray(weights["weight"]).T, "bias": jnp.asarray(weights["bias"])}
        state = nnx.state(model, nnx.Param)
        return nnx.replace_by_pure_dict(state, params) or state if as_state else params

    optimizer = nnx.Optimizer(model, optax_nadam.compat.torch.from_groups(source, to_params), wrt=nnx.Param)
    loaded = optax_nadam.compat.torch.load_state(optimizer.opt_state, source, to_params)
    assert jax.tree.structure(loaded) == jax.tree.structure(optimizer.opt_state)
    np.testing.assert_allclose(optax_nadam.get_state(loaded).m["kernel"][...], arrays["weight"].T, rtol=1e-6)
    optimizer.opt_state = nnx.data(loaded)
    optimizer.update(model, nnx.grad(lambda model: model.loss())(model))


TX = optax_nadam.nadamw(1e-2, **BYTES)
AXES = {"data": "data", "model": "model"}
IN_AXES = {"kernel": PartitionSpec("data", "model"), "bias": PartitionSpec("model")}
SCALES = [PartitionSpec("data"), PartitionSpec("model")] * 2  # of the kernel's m, then of its v; the bias has none
axis_types = pytest.mark.parametrize("axes", [pytest.param(AxisType.Auto, marks=pytest.mark.long), AxisType.Explicit])


def mesh_of(axes):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)


class Partitioned(Linear):
    """The same with the axes that its weights are split over."""

    def __init__(self):
        """Starts from random weights."""
        kernel, bias = nnx.initializers.lecun_normal(), nnx.initializers.ones
        self.kernel = nnx.Param(nnx.with_partitioning(kernel, ("data", "model"))(jax.random.key(0), (64, 128)))
        self.bias = nnx.Param(nnx.with_partitioning(bias, ("model",))(jax.random.key(0), (128,)))


@axis_types
def test_nnx_metadata(axes):
    """Compiled once, also ahead of time, with the scales split as their axis."""
    traces: list[None] = []

    def step(model, optimizer):
        traces.append(None)
        optimizer.update(model, nnx.grad(lambda model: model.loss())(model))

    with jax.set_mesh(mesh_of(axes)):
        model = Partitioned()
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        compiled = nnx.jit(step)
        for _ in range(2):
            compiled(model, optimizer)
        assert len(traces) == 1
        assert [x[...].sharding.spec for x in optimizer.opt_state[0].scales] == SCALES
        graph, state = nnx.split((model, optimizer))

        def pure(state):
            both = nnx.merge(graph, state)
            step(*both)
            return nnx.state(both)

        ahead_of_time = jax.jit(pure).lower(state).compile()
        ahead_of_time(ahead_of_time(state))


@axis_types
def test_linen_boxes(axes):
    """Through ``nn.get_partition_spec`` and ``nn.get_sharding``."""
    mesh = mesh_of(axes)
    with jax.set_mesh(mesh):

        def init():
            boxed: Any = {
                "kernel": nn.Partitioned(jnp.ones((64, 128)), ("data", "model")),
                "bias": nn.Partitioned(jnp.ones(128), ("model",)),
            }
            return boxed, TX.init(boxed)

        abstract = jax.eval_shape(init)
        specs = nn.get_partition_spec(abstract)
        assert specs[0] == specs[1][0].m == specs[1][0].v == IN_AXES
        params, state = jax.jit(init, out_shardings=nn.get_sharding(abstract, mesh))()
        for _ in range(2):
            updates, state = jax.jit(TX.update)(params, state, params)
        assert nn.get_partition_spec(updates) == IN_AXES
        assert state[0].m["kernel"].value.sharding.spec == IN_AXES["kernel"]


def test_haliax():
    """Arrays with named axes, initialised and updated under ``named_jit``."""
    data, model = hax.Axis("data", 64), hax.Axis("model", 128)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        params = {"kernel": hax.ones((data, model)), "bias": hax.ones(model)}
        state = hax.named_jit(TX.init, axis_resources=AXES)(params)
        updates, state = hax.named_jit(TX.update, axis_resources=AXES)(params, state, params)
        assert updates["kernel"].axes == state[0].v["kernel"].axes == (data, model)
        assert state[0].m["kernel"].array.sharding.spec == IN_AXES["kernel"]


@pytest.mark.parametrize(
    "formats",
    [BYTES, {"m_dtype": {"kernel": "int8", "bias": None}}, {"v_dtype": lambda path: None}],
    ids=["one", "tree", "function"],
)
def test_map_params(formats):
    tx = optax_nadam.nadamw(1e-2, **formats)
    state = tx.init({"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)})
    specs: Any = optax.tree.map_params(
        tx, lambda _, spec: spec, state, IN_AXES, transform_non_params=lambda _: PartitionSpec()
    )
    assert specs[0].m == specs[0].v == IN_AXES
    prefix = jax.tree.map(lambda spec, part: spec, specs, state)  # a prefix of the state, as jit takes it
    assert set(jax.tree.leaves(prefix[0].scales)) <= {PartitionSpec()}


def test_orbax_onto_other_shardings(tmp_path):
    """Saved as it is, restored split over devices."""
    params = {"kernel": jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128), "bias": jnp.ones(128)}
    _, state = TX.update(params, TX.init(params), params)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    mesh = mesh_of(AxisType.Auto)
    split = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), IN_AXES))
    target = jax.jit(TX.init)(split)
    restored = checkpointer.restore(tmp_path / "state", target)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    assert [x.sharding.spec for x in restored[0].scales] == SCALES


def test_jax_export():
    tx = optax_nadam.compensated(optax.chain(optax_nadam.scale_by_nadam(**BYTES), optax_nadam.scale_by_nadam()))
    params = {"w": jnp.ones((32, 64), jnp.bfloat16)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    again = jax.export.deserialize(jax.export.export(update)(params, state, params).serialize())
    chex.assert_trees_all_equal(again.call(params, state, params), update(params, state, params))


def test_equinox_widens():
    tx = optax_nadam.compensated(optax_nadam.nadam(0.1))
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    updates, state = tx.update(params, tx.init(params), params)
    widened = eqx.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"params\['w'\] is float32 .*optax.apply_updates.*equinox.apply_updates does"):
        tx.update(params, state, widened)
