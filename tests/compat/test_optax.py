"""The Nadams and Adams of Optax, beside Optax itself.

- Every argument of ``nadam``, ``nadamw``, ``adam`` and ``adamw``, at its place and with its default.
- 60 steps of each within 1e-3 learning rates of Optax's, which is Optax's own error in float32.
- A run continues from a state in any wrapper, also one restored as plain dicts and lists, matched by name; none, two
  states, or other names are refused. Arrays are copied.
- Configs make the round trip; what Optax cannot express is refused with the change that it needs.
"""

import dataclasses
import functools
import inspect
import re
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import optax_nadam
from optax_nadam import NadamConfig, ScheduleConfig, compat, nadam
from tests.compat.sources import follow_advice
from tests.parity import problem as shared
from tests.parity.problem import FEW, gap, run

pytestmark = pytest.mark.lenient("Optax's own Nadam mixes dtypes")
LEARNING_RATE = 1e-2
# Optax forms 1 - b^t in float32, off by 2e-5 at b2=.999: half of that in each of 60 updates is 6e-4 of a learning rate.
BOUND = 1e-3


problem = functools.partial(shared.problem, shapes=FEW)
MASK = {"kernel": True, "scale": False}
COSINE = {"initial_learning_rate": 1.0, "decay_steps": 9}
SCHEDULE = optax.cosine_decay_schedule(LEARNING_RATE, 60)
CALLS = {
    "nadam": ("nadam", {}),
    "nadam, other numbers": (
        "nadam",
        {"learning_rate": SCHEDULE, "b1": 0.8, "b2": 0.98, "eps": 1e-4, "eps_root": 1e-6},
    ),
    "nadam without nesterov": ("nadam", {"nesterov": False}),
    "nadamw": ("nadamw", {"weight_decay": 0.1, "mask": MASK}),
    "nadamw, scheduled decay": ("nadamw", {"weight_decay": lambda count: 0.5 / (1 + count)}),
    "adam": ("adam", {}),
    "adam with nesterov": ("adam", {"nesterov": True}),
    "adamw": ("adamw", {"b2": 0.98, "weight_decay": lambda count: 0.5 / (1 + count), "mask": MASK}),
}


@pytest.mark.parametrize("call", CALLS)
def test_steps_of(call):
    name, arguments = CALLS[call]
    params, grads = problem(len(call))
    ours, theirs = (
        run(getattr(module, name)(**{"learning_rate": LEARNING_RATE} | arguments), params, grads)[0]
        for module in (compat.optax, optax)
    )
    assert gap(ours, theirs, LEARNING_RATE) < BOUND


@pytest.mark.parametrize("name", ["nadam", "nadamw", "adam", "adamw"])
def test_every_argument(name):
    """Ours takes every argument of Optax's, at the same place and with the same default; the first has none."""
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (compat.optax, optax))
    assert [(x.name, x.kind, x.default) for x in ours.values()] == [
        (x.name, x.kind, x.default) for x in theirs.values()
    ]


CONSTANT = NadamConfig(learning_rate=LEARNING_RATE, eps=1e-8, rule="constant")
ADAM = dataclasses.replace(CONSTANT, rule="adam")


@pytest.mark.parametrize(
    "make",
    [
        optax.adam,
        lambda rate: optax.chain(optax.clip_by_global_norm(1e9), optax.nadam(rate)),
        lambda rate: optax.nadamw(rate, weight_decay=0.0),
    ],
    ids=["adam", "nadam, chained", "nadamw"],
)
def test_run_continues(make):
    params, grads = problem(1)
    before, running = run(make(LEARNING_RATE), params, grads[:25])
    at = jax.tree.map(lambda p: p[-1], before)
    tx = optax.chain(optax.clip_by_global_norm(1e9), compat.optax.nadam(LEARNING_RATE))
    resumed = compat.optax.load_state(jax.jit(tx.init)(at), running, config=CONSTANT)
    ours, state = run(tx, at, grads[25:35], resumed)
    theirs, _ = run(
        optax.nadam(LEARNING_RATE), at, grads[25:35], (optax.tree.get(running, "ScaleByAdamState"), optax.EmptyState())
    )
    assert gap(ours, theirs, LEARNING_RATE) < BOUND
    assert optax.tree.get(state, "ScaleByNadamState").count == 35


SPLIT = {"kernel": "nadam", "scale": "sgd"}
WRAPPED = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale_by_schedule(lambda count: 1.0)),
    "partition": lambda tx: optax.partition({"nadam": tx, "sgd": optax.sgd(LEARNING_RATE)}, SPLIT),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(1.0),
}


def through_orbax(state, folder):
    """What Orbax restores of it without a target: dicts, lists and None in place of NamedTuples and tuples."""
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"opt_state": state})
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state")


def through_flax(state, folder):
    """The same by Flax: dicts alone."""
    serialization = pytest.importorskip("flax.serialization")
    (folder / "state.msgpack").write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(state)))
    return serialization.msgpack_restore((folder / "state.msgpack").read_bytes())


@pytest.mark.parametrize("wrap", WRAPPED)
def test_plain_dicts(wrap, tmp_path):
    params, grads = problem(5)
    theirs, ours = (WRAPPED[wrap](module.nadam(LEARNING_RATE)) for module in (optax, compat.optax))
    _, running = run(theirs, params, grads[:12])
    fresh = jax.jit(ours.init)(params)
    resumed, same = (
        compat.optax.load_state(fresh, through(running, tmp_path), config=CONSTANT)
        for through in (through_orbax, through_flax)
    )
    chex.assert_trees_all_equal(resumed, same)
    nadam, adam = optax_nadam.get_state(resumed), optax.tree.get(running, "ScaleByAdamState")
    chex.assert_trees_all_equal((nadam.m, nadam.v, nadam.count), (adam.mu, adam.nu, jnp.int32(12)))
    np.testing.assert_allclose(nadam.mu_product, 0.9**12, rtol=1e-6)


def test_params_named_like_fields():
    plain = {"count": 0.5, "mu": 1.0, "nu": 1.0}
    source = [plain, {"count": np.int32(3), "mu": {"w": np.ones(2)}, "nu": {"w": np.ones(2)}}]
    tx = compat.optax.nadam(LEARNING_RATE)
    state = compat.optax.load_state(tx.init({"w": jnp.ones(2)}), source, config=CONSTANT)
    assert state[0].count == 3
    with pytest.raises(ValueError, match=r"source must hold one ScaleByAdamState.*holds 0"):
        compat.optax.load_state(tx.init({"w": jnp.ones(2)}), [plain], config=CONSTANT)


class Layer(NamedTuple):
    """Its fields are not in alphabetical order."""

    w: jax.Array
    b: jax.Array


def test_fields_by_name():
    params, moments = Layer(jnp.ones(2), jnp.ones(2)), {"b": np.full(2, 0.5), "w": np.full(2, 0.25)}
    tx = compat.optax.nadam(LEARNING_RATE)
    state = compat.optax.load_state(tx.init(params), {"count": 1, "mu": moments, "nu": moments}, config=CONSTANT)
    chex.assert_trees_all_equal(state[0].m, Layer(jnp.full(2, 0.25), jnp.full(2, 0.5)))


def test_lists_by_name():
    params = (jnp.ones(2), {"w": jnp.ones(3)})
    tx = compat.optax.nadam(LEARNING_RATE)
    moments = [np.full(2, 0.5), {"w": np.full(3, 0.25)}]
    state = compat.optax.load_state(tx.init(params), {"count": 1, "mu": moments, "nu": moments}, config=CONSTANT)
    chex.assert_trees_all_equal(state[0].m, (jnp.full(2, 0.5), {"w": jnp.full(3, 0.25)}))
    other = [np.full(2, 0.5), {"v": np.full(3, 0.25)}]
    with pytest.raises(ValueError, match=r"it lacks '1/w'; the params have no '1/v'"):
        compat.optax.load_state(tx.init(params), {"count": 1, "mu": other, "nu": other}, config=CONSTANT)


def test_and_back():
    params, grads = problem(2)
    tx = compat.optax.nadam(LEARNING_RATE)
    before, state = run(tx, params, grads[:25])
    at = jax.tree.map(lambda p: p[-1], before)
    theirs, _ = run(optax.nadam(LEARNING_RATE), at, grads[25:35], (compat.optax.dump_state(state), optax.EmptyState()))
    assert gap(run(tx, at, grads[25:35], state)[0], theirs, LEARNING_RATE) < BOUND


def test_adam_becomes_scheduled():
    params, grads = problem(3)
    _, running = run(optax.adam(LEARNING_RATE), params, grads[:7])
    config = NadamConfig(learning_rate=LEARNING_RATE, b1=0.8, momentum_decay=0.5)
    resumed = compat.optax.load_state(config.build().init(params), running, config=config)
    _, all_along = run(config.build(), params, grads[:7])
    np.testing.assert_allclose(resumed[0].mu_product, all_along[0].mu_product, rtol=1e-6)


def test_to_params_transposes():
    params, grads = problem(4)
    _, running = run(optax.adam(LEARNING_RATE), params, grads[:3])

    def transposed(tree):
        return {**tree, "kernel": tree["kernel"].T}

    tx = compat.optax.nadam(LEARNING_RATE)
    state = compat.optax.load_state(tx.init(transposed(params)), running, transposed, config=CONSTANT)
    chex.assert_trees_all_equal(state[0].m, transposed(running[0].mu))
    chex.assert_trees_all_equal(compat.optax.dump_state(state, transposed).mu, running[0].mu)
    with pytest.raises(ValueError, match=r"'kernel' has shape \(4, 3\), the params \(3, 4\)"):
        compat.optax.load_state(tx.init(transposed(params)), running, config=CONSTANT)


def test_arrays_are_copied():
    buffer = np.zeros(1024 + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4  # memory so aligned, JAX may take over as it is
    moments = {"w": buffer[start : start + 1024]}
    tx = compat.optax.nadam(LEARNING_RATE)
    state = compat.optax.load_state(
        tx.init(moments), optax.ScaleByAdamState(np.int32(1), moments, moments), config=CONSTANT
    )
    moments["w"] += 1
    chex.assert_trees_all_equal(state[0].m, {"w": jnp.zeros(1024)})


def test_counters():
    params, grads = problem(5)
    _, running = run(optax.adam(LEARNING_RATE), params, grads[:9])
    inner = optax.inject_hyperparams(optax_nadam.nadamw)(
        optax.linear_schedule(LEARNING_RATE, 0.0, 100), weight_decay=0.1
    )
    tx = optax.chain(optax.masked(inner, True), optax.scale_by_schedule(lambda count: 1.0))
    state = compat.optax.load_state(tx.init(params), running, config=CONSTANT)
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if path[-1] == jax.tree_util.GetAttrKey("count")
    ]
    assert [int(count) for count in counts] == [9] * 4


def test_none_or_many():
    params, _ = problem(0)
    tx = compat.optax.nadam(LEARNING_RATE)
    with pytest.raises(ValueError, match=r"source must hold one ScaleByAdamState.*holds 0"):
        compat.optax.load_state(tx.init(params), optax.sgd(LEARNING_RATE).init(params))
    twice = optax.chain(optax.adam(LEARNING_RATE), optax.adam(LEARNING_RATE)).init(params)
    with pytest.raises(ValueError, match="holds 2"):
        compat.optax.load_state(tx.init(params), twice)
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 0"):
        compat.optax.load_state(
            optax.adam(LEARNING_RATE).init(params), optax.adam(LEARNING_RATE).init(params), config=CONSTANT
        )
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 0"):
        compat.optax.dump_state(optax.adam(LEARNING_RATE).init(params))
    with pytest.raises(ValueError, match="opt_state must hold one ScaleByNadamState, but holds 2"):
        compat.optax.dump_state(optax.chain(tx, tx).init(params))


def test_replicated_state():
    params, grads = problem(5)
    _, running = run(optax.adam(LEARNING_RATE), params, grads[:9])
    replicated, init = jax.tree.map(lambda x: jnp.stack([x] * 2), running), CONSTANT.build().init(params)
    with pytest.raises(
        ValueError, match=r"replicated over devices.*unreplicate.*jax.tree.map\(lambda x: x\[0\], state\)"
    ):
        compat.optax.load_state(init, replicated, config=CONSTANT)
    one = compat.optax.load_state(init, jax.tree.map(lambda x: x[0], replicated), config=CONSTANT)
    chex.assert_trees_all_equal(one, compat.optax.load_state(init, running, config=CONSTANT))


def test_own_state(tmp_path):
    """The error says what takes it, also where the containers are lost."""
    params, grads = problem(5)
    _, state = run(optax_nadam.nadam(), params, grads[:9])
    for source in (state, through_flax(state, tmp_path)):
        with pytest.raises(ValueError, match=r"holds the state of optax_nadam itself.*with optax_nadam.set_state"):
            compat.optax.load_state(optax_nadam.nadam().init(params), source, config=CONSTANT)
        chex.assert_trees_all_equal(optax_nadam.set_state(optax_nadam.nadam().init(params), source), state)


def test_config_is_needed():
    params, _ = problem(0)
    tx = nadam(LEARNING_RATE)
    with pytest.raises(ValueError, match=r"config is needed: a ScaleByAdamState stores no product.*Pass config="):
        compat.optax.load_state(tx.init(params), optax.adam(LEARNING_RATE).init(params))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rule_adam(weight_decay):
    params, grads = problem(7)
    theirs, _ = run(optax.adamw(LEARNING_RATE, weight_decay=weight_decay), params, grads)
    config = dataclasses.replace(ADAM, weight_decay=weight_decay)
    assert gap(run(config.build(), params, grads)[0], theirs, LEARNING_RATE) < BOUND


def test_an_adam_run_continues_as_adam():
    params, grads = problem(8)
    before, running = run(optax.adam(LEARNING_RATE), params, grads[:25])
    at = jax.tree.map(lambda p: p[-1], before)
    tx = ADAM.build()
    ours, _ = run(tx, at, grads[25:35], compat.optax.load_state(tx.init(at), running, config=ADAM))
    theirs, _ = run(optax.adam(LEARNING_RATE), at, grads[25:35], running)
    assert gap(ours, theirs, LEARNING_RATE) < BOUND


OTHERS = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 0.1}


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("nadam", OTHERS),
        ("nadamw", OTHERS | {"weight_decay": 0.5}),
        ("adam", OTHERS | {"nesterov": True}),
        ("adamw", OTHERS | {"weight_decay": 0.5, "nesterov": False}),
    ],
)
def test_configs_round_trip(optimizer, arguments):
    config = compat.optax.config_from(arguments, optimizer=optimizer)
    params, grads = problem(6)
    theirs, _ = run(getattr(optax, optimizer)(**arguments), params, grads)
    assert gap(run(config.build(), params, grads)[0], theirs, 0.1) < BOUND
    decaying = "adamw" if config.rule == "adam" else "nadamw"
    translated = compat.optax.config_to(config)
    assert compat.optax.config_from(translated, optimizer=decaying) == config
    assert gap(run(getattr(optax, decaying)(**translated), params, grads)[0], theirs, 0.1) < BOUND


@pytest.mark.parametrize("optimizer", ["nadam", "nadamw", "adam", "adamw"])
def test_defaults_in_configs(optimizer):
    """They are those of Optax."""
    of_optax = inspect.signature(getattr(optax, optimizer)).parameters
    defaults = {name: x.default for name, x in of_optax.items() if isinstance(x.default, (bool, float))}
    config = compat.optax.config_from({"learning_rate": 0.1}, optimizer=optimizer)
    assert config == compat.optax.config_from({"learning_rate": 0.1} | defaults, optimizer=optimizer)
    decaying = "adamw" if config.rule == "adam" else "nadamw"
    assert compat.optax.config_from(compat.optax.config_to(config), optimizer=decaying) == config


def test_mu_dtype_round_trip():
    config = compat.optax.config_from({"learning_rate": 0.1, "mu_dtype": "bfloat16"}, optimizer="nadam")
    assert config.m_dtype == "bfloat16"
    assert compat.optax.config_to(config)["mu_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"clip_norm": 0.5}, "optax.nadamw cannot express clip_norm=0.5"),
        ({"cautious": True}, "optax.nadamw cannot express cautious=True"),
        ({"rule": "scheduled"}, "optax.nadamw cannot express rule='scheduled'. Optax follows 'constant'"),
        ({"m_dtype": "int8"}, "optax.nadamw cannot express m_dtype='int8'"),
        ({"v_dtype": "bfloat16"}, "optax.nadamw cannot express v_dtype='bfloat16'"),
        (
            {"learning_rate": ScheduleConfig("cosine_decay", COSINE)},
            "Pass config.learning_rate.build() to it",
        ),
    ],
)
def test_inexpressible(fields, text):
    config = dataclasses.replace(CONSTANT, **fields)
    with pytest.raises(ValueError, match=re.escape(text)):
        compat.optax.config_to(config)
    assert follow_advice(compat.optax.config_to, config) == [("optax.nadamw", *fields)]


def test_dump_checks_the_config():
    """Whatever its learning rate, which the state does not hold."""
    state, schedule = compat.optax.nadam(0.1).init(jnp.ones(2)), ScheduleConfig("cosine_decay", COSINE)
    assert compat.optax.dump_state(state, config=dataclasses.replace(CONSTANT, learning_rate=schedule)).count == 0
    with pytest.raises(ValueError, match=r"optax.nadamw cannot express rule='scheduled'"):
        compat.optax.dump_state(state, config=NadamConfig())


@pytest.mark.parametrize(
    ("arguments", "optimizer", "text"),
    [
        ({"learning_rate": 0.1, "mask": None}, "nadamw", "optax.nadamw has unknown keys mask; known are"),
        ({"learning_rate": 0.1, "weight_decay": 0.1}, "nadam", "optax.nadam has unknown keys weight_decay"),
        ({"b1": 0.1}, "nadam", "optax.nadam lacks learning_rate; it has b1"),
        ({"learning_rate": 0.1}, "lion", "optimizer must be one of 'nadam', 'nadamw', 'adam', 'adamw', got 'lion'"),
    ],
)
def test_calls_that_cannot_be_read(arguments, optimizer, text):
    with pytest.raises(ValueError, match=text):
        compat.optax.config_from(arguments, optimizer=optimizer)
