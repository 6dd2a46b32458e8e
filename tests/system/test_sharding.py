"""Over eight devices: how the state is sharded, what is communicated, and that the numbers do not change.

- ``init`` shards the moments like the params, under jit too, with automatic and explicit axes (those of ``optax.nadam``
  are on one device under jit); ``accumulate`` does so with the mean, which ``optax.MultiSteps`` has whole everywhere.
- A step of sharded params sends nothing, keeps all shardings, and gives the bits of one device, two rules.
- Narrow moments and remainders are sharded like the params, 8-bit scales as their axis, with the bits of one device; a
  step sends the largest of columns and rows that are split, and nothing else.
- ``shard_map`` that splits 8-bit moments but not their scales is refused.
- Moments split over replicas of the params (ZeRO-1): one all-gather a leaf, 1 byte of state a parameter a device, of 8.
- ``shard_map`` with ``pmean`` takes the step of the whole batch.
"""

import contextlib
import functools
import importlib
import re

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_nadam import accumulate, compensated, nadam, nadamw

COLLECTIVE = re.compile(r"= .*\b(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
AXES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "both": PartitionSpec("data", "model"),
    "rows": PartitionSpec("data"),
    "columns": PartitionSpec(None, "model"),
    "one axis": PartitionSpec(("data", "model")),
    "whole": PartitionSpec(),
}
set_mesh = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh")  # noqa: B009  # as before jax 0.7
in_axes = pytest.mark.parametrize("axes", AXES)
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec("data")


@contextlib.contextmanager
def mesh_of(axes, shape=(4, 2), names=("data", "model")):
    mesh = jax.make_mesh(shape, names, axis_types=(AXES[axes],) * len(shape))
    with set_mesh(mesh) if axes == "explicit" else contextlib.nullcontext():
        yield mesh


def random_tree(rng):
    """Leaves of different shapes: XLA before jax 0.7 moves the scalars that leaves of one shape share in a step."""
    return {name: rng.standard_normal((16, 8 * n)).astype(np.float32) for n, name in enumerate(SPECS, start=1)}


def laid_out(tree, mesh, specs=SPECS):
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def shard_map(f, checked, **specs):
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, check_vma=checked, **specs)
    return importlib.import_module("jax.experimental.shard_map").shard_map(f, check_rep=checked, **specs)


def make_step(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def collectives(compiled):
    return COLLECTIVE.findall(compiled.as_text())


def assert_laid_out(mesh, *trees):
    for tree in trees:
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), leaf.ndim), (name, leaf.sharding)


@pytest.mark.parametrize(("axes", "compile"), [(axes, jax.jit) for axes in AXES] + [("explicit", lambda f: f)])
def test_moments(axes, compile):
    """Sharded like the params from the start, and after a step; of real, narrow and complex ones."""
    dtypes = {"both": "float16", "one axis": "complex64"}
    with mesh_of(axes) as mesh:
        tx, params = nadamw(), laid_out({name: np.ones((16, 24), dtype) for name, dtype in dtypes.items()}, mesh)
        state = compile(tx.init)(params)
        updates, after = compile(tx.update)(params, state, params)
        assert_laid_out(mesh, state[0].m, state[0].v, after[0].m, after[0].v, updates)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@in_axes
def test_accumulated_mean(axes):
    """Sharded like the params from the start, and after a call."""
    tx = accumulate(nadamw(), 2)
    with mesh_of(axes) as mesh:
        params = laid_out({name: np.ones((16, 24), np.float32) for name in ("both", "whole")}, mesh)
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
        assert collectives(compiled) == []
        for _ in range(2):
            assert_laid_out(mesh, state.acc_grads, *state.inner_opt_state[0][2:])
            updates, state = compiled(params, state, params)
        assert_laid_out(mesh, state.acc_grads, *state.inner_opt_state[0][2:], updates)
    assert state.gradient_step == 1


@in_axes
def test_sharded_steps(rng, axes):
    """The steps of two rules, in one program; one on all leaves, the other, which differs in scalars, on one."""
    optimizers = {rule: nadamw(1e-2, rule=rule) for rule in ("scheduled", "dozat2016")}
    leaves = {rule: [*SPECS] if rule == "scheduled" else ["both"] for rule in optimizers}
    steps = {rule: make_step(tx) for rule, tx in optimizers.items()}

    def of(rule, tree):
        return {name: tree[name] for name in leaves[rule]}

    def init(params):
        return {rule: (of(rule, params), tx.init(of(rule, params))) for rule, tx in optimizers.items()}

    def step(grads, runs):
        return {rule: steps[rule](of(rule, grads), state, params) for rule, (params, state) in runs.items()}

    params, grads = random_tree(rng), [random_tree(rng) for _ in range(5)]
    alone, step_alone = jax.jit(init)(params), jax.jit(step)
    for g in grads:
        alone = step_alone(g, alone)

    with mesh_of(axes) as mesh:
        grads = [laid_out(g, mesh) for g in grads]
        runs = jax.jit(init)(laid_out(params, mesh))
        compiled = jax.jit(step).lower(grads[0], runs).compile()
        assert collectives(compiled) == []
        for g in grads:
            runs = compiled(g, runs)
        for params, state in runs.values():
            assert_laid_out(mesh, params, state[0].m, state[0].v)
    chex.assert_trees_all_equal(jax.device_get(runs), jax.device_get(alone))


def test_zero1(rng):
    """Each device stores an eighth of the moments and computes an eighth of the update."""
    params = {"kernel": rng.standard_normal((64, 32)).astype(np.float32), "bias": np.zeros(32, np.float32)}
    grads = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
    alone = nadamw(1e-2)
    expected, _ = jax.jit(make_step(alone))(grads, alone.init(params), params)

    with mesh_of("automatic", (8,), ("data",)) as mesh:
        whole, split = (NamedSharding(mesh, spec) for spec in (EVERYWHERE, SPLIT))
        tx = optax.chain(alone, optax.stateless(lambda u, _: jax.lax.with_sharding_constraint(u, whole)))
        arguments = (
            jax.device_put(grads, split),
            jax.jit(tx.init)(jax.device_put(params, split)),
            jax.device_put(params, whole),
        )
        compiled = jax.jit(make_step(tx)).lower(*arguments).compile()
        got, state = compiled(*arguments)

    assert collectives(compiled) == ["all-gather"] * len(params)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(expected))
    moments = optax.tree.get(state, "m"), optax.tree.get(state, "v")
    for tree, sharding in ((moments, split), (got, whole)):
        assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(tree))
    on_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(moments))
    assert on_a_device == sum(leaf.size for leaf in params.values())  # 8 bytes each over 8 devices


@pytest.mark.parametrize("mean_of", ["gradients", "loss"])
def test_shard_map(rng, mean_of):
    """Where tf.keras sums the gradients of its replicas, pmean takes their mean, or the gradient of the mean loss.

    JAX sums the gradients of params that all replicas share by itself where it checks what varies over them.
    """
    x, y = rng.standard_normal((32, 4)).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
    tx = nadam(0.05)

    def train(params, x, y, of_loss=lambda loss: loss, of_gradients=lambda grads: grads):
        def loss(params):
            return of_loss(jnp.mean((x @ params["w"] + params["b"] - y) ** 2))

        def step(carry, _):
            params, state = carry
            return make_step(tx)(of_gradients(jax.grad(loss)(params)), state, params), None

        return jax.lax.scan(step, (params, tx.init(params)), length=50)[0]

    expected = jax.jit(train)(params, x, y)
    mean = functools.partial(jax.lax.pmean, axis_name="data")
    with mesh_of("automatic", (8,), ("data",)) as mesh:
        each, specs = functools.partial(train, **{f"of_{mean_of}": mean}), (EVERYWHERE, SPLIT, SPLIT)
        replicas = shard_map(each, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, checked=mean_of == "loss")
        got = jax.jit(replicas)(params, x, y)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("m_dtype", [None, "int8"])
def test_own_states(rng, m_dtype):
    """Under ``shard_map`` each device may step a state of its own, which begins to vary over them in the step."""
    tx, params = nadam(m_dtype=m_dtype, v_dtype=m_dtype), np.zeros((16, 64), np.float32)
    grads = rng.standard_normal((8 * 16, 64)).astype(np.float32)

    def step(params, grads):
        return tx.update(grads, tx.init(params), params)[0]

    with mesh_of("automatic", (8,), ("data",)) as mesh:
        steps = shard_map(step, mesh=mesh, in_specs=(EVERYWHERE, SPLIT), out_specs=SPLIT, checked=True)
        got = jax.jit(steps)(params, grads)
    expected = [jax.jit(step)(params, own) for own in np.split(grads, 8)]
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-6)


@pytest.mark.lenient("optax.apply_updates adds float32 updates to bfloat16 params")
def test_narrow_formats(rng):
    """Whichever axes are split, also those of rows: codes like the params, scales as their axis."""
    formats = {"both": "int8", "rows": "bfloat16"}
    tree = {name: rng.standard_normal((16, 64 * n)).astype(jnp.bfloat16) for n, name in enumerate(formats, start=1)}
    tx = compensated(nadamw(1e-2, m_dtype=formats, v_dtype=formats))
    step = jax.jit(make_step(tx))

    alone = step(tree, *step(tree, jax.jit(tx.init)(tree), tree)[::-1])
    for axes in AXES:
        with mesh_of(axes) as mesh:
            split = laid_out(tree, mesh)
            fresh = jax.jit(tx.init)(split)
            got, after = step(split, *step(split, fresh, split)[::-1])
            for params, state in ((split, fresh), (got, after)):
                moments = state.inner_state[0]
                assert_laid_out(mesh, params, state.remainder, moments.m, moments.v)
                names, scales = [name for name in moments.m if formats[name] == "int8"], iter(moments.scales)
                for name in names + names:  # rows and columns of m, then of v
                    for axis in range(2):
                        spec, scale = NamedSharding(mesh, PartitionSpec(*SPECS[name][axis : axis + 1])), next(scales)
                        assert scale.sharding.is_equivalent_to(spec, 1), (axes, name, axis, scale.sharding)
            chex.assert_trees_all_equal(*jax.device_get(((got, after), alone)))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (SPLIT, r"8-bit moments of shape \(16, 64\) split by jax.shard_map over 'data', and scales that are not"),
        (EVERYWHERE, r"scales\[0\] is float32, \(128,\) in place of float32, \(16,\)"),
    ],
)
def test_shard_map_of_rows(rows, text):
    """Refused, unless each part has scales of its own, from ``init`` inside."""
    tx, params = nadam(m_dtype="int8", v_dtype="int8"), np.ones((16 * 8, 64), np.float32)
    specs = {params.shape: SPLIT, (16 * 8,): rows}

    def own(params, grads):
        return make_step(tx)(grads, tx.init(params), params)[0]

    with mesh_of("automatic", (8,), ("data",)) as mesh:
        split = functools.partial(shard_map, mesh=mesh, checked=True)
        state = jax.jit(tx.init)(params)
        moments = jax.tree.map(lambda x: specs.get(x.shape, EVERYWHERE), state)
        step = split(make_step(tx), in_specs=(SPLIT, moments, SPLIT), out_specs=(SPLIT, moments))
        with pytest.raises(ValueError, match=text):
            jax.jit(step)(params, state, params)
        got = jax.jit(split(own, in_specs=(SPLIT, SPLIT), out_specs=SPLIT))(params, params)
    np.testing.assert_allclose(got, np.concatenate([jax.jit(own)(x, x) for x in np.split(params, 8)]), rtol=1e-6)


def test_collectives_of_scales():
    """Only the largest of each column where rows are split, and of each row where columns are."""
    tx = nadam(m_dtype="int8", v_dtype="int8")
    with mesh_of("automatic", (8,), ("data",)) as mesh:
        for spec, sent in ((("data",), {"f32[128]{0}"}), ((None, "data"), {"f32[64]{0}"})):
            params = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, PartitionSpec(*spec)))
            state = jax.jit(tx.init)(params)
            compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
            assert set(re.findall(r"= (\S+) all-reduce\(", compiled.as_text())) == sent, spec
            assert set(collectives(compiled)) <= {"all-reduce"}, spec
