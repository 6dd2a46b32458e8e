"""compat.torch without torch.

====================  ==================================================================================================
steps                 those of recorded runs of torch 1.13 and 2, with a number or a schedule
arguments, groups     every key reaches the config; keys tell the rule; groups of others and bad numbers are rejected
configs               come back as they went; the code in every error leads to a config that torch can express
warnings              point at the caller's line
checkpoints           are continued, by name or by order, at any depth; arrays are copied; strange ones are rejected
steps that differ     are named, or carried along; zeros stand for what never stepped
dumps                 are the checkpoint again, with tensors and names where wanted; what does not fit is named
====================  ==================================================================================================
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScheduleConfig, get_state
from optax_nadam._rules import RULES
from optax_nadam.compat import torch as ours
from tests.compat.sources import follow_advice, trajectories
from tests.parity.problem import FEW, gap, problem, run

# In units of lr, after 20 steps in float32 from parameters of magnitude 1 to 2, each rounded by up to 1.2e-7 at each
# step on either side: measured 3e-4, at lr = 2e-3.
BOUND = 5e-4


class Recording:
    """What ``tests/parity/record_torch.py`` wrote."""

    def __init__(self, name: str) -> None:
        """Reads the two files."""
        folder = pathlib.Path(__file__).parent / "recordings"
        self.facts = json.loads((folder / f"{name}.json").read_text())
        with np.load(folder / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)
        self.params = self.under("params")
        self.grads = self.steps(self.under("grads"))

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays by the rest of their names."""
        return {k.removeprefix(f"{prefix}/"): x for k, x in self.arrays.items() if k.startswith(f"{prefix}/")}

    def steps(self, stacked: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """A list over steps of arrays by name."""
        return [dict(zip(stacked, rows, strict=True)) for rows in zip(*stacked.values(), strict=True)]

    def checkpoint(self, name: str) -> dict[str, Any]:
        """A state_dict."""
        state: dict[int, dict[str, Any]] = {}
        for path, x in self.under(f"{name}/state").items():
            i, key = path.split("/")
            state.setdefault(int(i), {})[key] = x
        return {"state": state, "param_groups": [dict(group) for group in self.facts[name]["param_groups"]]}

    def after(self, name: str) -> tuple[dict[str, np.ndarray], list[Any], dict[str, np.ndarray]]:
        """The parameters at a checkpoint, the gradients that followed, and what became of the parameters."""
        then = self.under(f"{name}/then")
        return self.under(f"{name}/at"), self.grads[-len(then["bias"]) :], then


RECORDED = Recording("torch")
CASES = RECORDED.facts["cases"]
GROUP: dict[str, Any] = CASES["defaults"]["group"]
BARE = {"lr", "betas", "eps", "weight_decay", "momentum_decay", "params"}
KEYS = {"1.10": BARE, "1.13": BARE | {"foreach"}, "2.0": BARE | {"foreach", "differentiable"}}


def keep(arrays):
    """``to_params`` and ``from_params`` of parameters that are alike on either side."""
    return dict(arrays)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


@functools.cache
def every_case():
    """By its group, and by its arguments where these are of today's torch."""
    by_group = {name: ours.config_from(case["group"]) for name, case in CASES.items()}
    today = {name: case["kwargs"] for name, case in CASES.items() if "differentiable" in case["group"]}
    optimizers = {name: config.build() for name, config in by_group.items()}
    optimizers |= {f"{name}, by arguments": ours.nadam(**kwargs) for name, kwargs in today.items()}
    return trajectories(optimizers, RECORDED.params, RECORDED.grads)


@pytest.mark.parametrize("case", CASES)
def test_recorded_trajectories(case):
    lr, same = CASES[case]["group"]["lr"], every_case().get(f"{case}, by arguments")
    assert gap(every_case()[case], RECORDED.under(f"cases/{case}"), lr) < BOUND
    assert same is None or gap(same, every_case()[case], lr) < 1e-4


def test_record_tells_rules_apart():
    lr = CASES["torch1"]["group"]["lr"]
    assert gap(every_case()["torch1 foreach"], RECORDED.under("cases/torch1"), lr) > 20 * BOUND


def test_kinds_of_lr():
    params, grads = problem(3, steps=5, shapes=FEW)
    expected, _ = run(ours.nadam(lr=0.01), params, grads)
    for lr in (optax.constant_schedule(0.01), jnp.asarray(0.01)):
        trajectory, _ = run(ours.nadam(lr=lr), params, grads)
        assert gap(trajectory, expected, 0.01) < 1e-4


def test_execution_arguments():
    params, grads = problem(4, steps=3, shapes=FEW)
    plain, _ = run(ours.nadam(), params, grads)
    other, _ = run(ours.nadam(foreach=True, capturable=True, differentiable=True), params, grads)
    assert gap(plain, other, 2e-3) == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be finite and not negative, got -1.0"),
        ({"lr": "fast"}, TypeError, r"^lr must be a number, a scalar array, an optax.Schedule or .*, got 'fast'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, ValueError, r"betas must be a pair of numbers, got 0.9"),
        ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\] must be a number, got 'a'"),
        ({"eps": -1e-8}, ValueError, r"eps must be finite and not negative"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be finite and not negative, got -0.1"),
        ({"momentum_decay": float("nan")}, ValueError, r"momentum_decay must be finite and not negative"),
        ({"maximize": 1}, TypeError, r"maximize must be True or False, got 1"),
    ],
)
def test_bad_arguments(arguments, kind, text):
    with pytest.raises(kind, match=text):
        ours.nadam(**arguments)


@pytest.mark.parametrize(
    ("version", "options", "rule"),
    [
        ("1.10", {}, "torch1"),
        ("1.13", {}, "torch1"),
        ("1.13", {"foreach": False}, "torch1"),
        ("1.13", {"foreach": True}, "scheduled"),
        ("2.0", {}, "scheduled"),
    ],
)
def test_keys_tell_the_rule(version, options, rule):
    group = {key: value for key, value in GROUP.items() if key in KEYS[version]} | options
    config = ours.config_from(group)
    assert (config.rule, config.coupled_weight_decay, config.maximize) == (rule, True, False)
    assert ours.config_from(group, rule="torch1").rule == "torch1"
    assert ours.config_from(group, rule="scheduled").rule == "scheduled"


def test_every_key_is_read():
    group = GROUP | {"lr": 0.5, "betas": [0.7, 0.8], "eps": 0.1, "weight_decay": 0.2, "momentum_decay": 0.3}
    numbers: dict[str, Any] = {
        "learning_rate": 0.5,
        "b1": 0.7,
        "b2": 0.8,
        "eps": 0.1,
        "weight_decay": 0.2,
        "momentum_decay": 0.3,
    }
    expected = NadamConfig(**numbers, coupled_weight_decay=True, complex_as_real=True)
    assert ours.config_from(group) == expected
    group |= {"decoupled_weight_decay": True, "maximize": True, "param_names": ["a"]}
    assert ours.config_from(group) == dataclasses.replace(expected, coupled_weight_decay=False, maximize=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"amsgrad": False, "fused": None}, r"torch.optim.NAdam group has unknown keys amsgrad, fused"),
        ({"momentum_decay": None}, r"torch.optim.NAdam group lacks momentum_decay; it has betas"),
        ({"lr": -0.1}, r"lr must be finite and not negative, got -0.1"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas must be a pair of numbers"),
    ],
)
def test_groups_of_others(change, text):
    group = {key: value for key, value in (GROUP | change).items() if (key, value) != ("momentum_decay", None)}
    with pytest.raises(ValueError, match=text):
        ours.config_from(group)


def test_differentiable_of_torch_2_0():
    group = {key: value for key, value in GROUP.items() if key in KEYS["2.0"]} | {"differentiable": True}
    with pytest.raises(ValueError, match=r"NadamConfig cannot express differentiable=True.*rule='scheduled'"):
        ours.config_from(group)
    assert ours.config_from(group, rule="scheduled").rule == "scheduled"
    assert ours.config_from(group | {"capturable": False}).rule == "scheduled"
    with pytest.raises(ValueError, match=r"rule must be one of 'scheduled', 'torch1', got 'constant'"):
        ours.config_from(group, rule="constant")


@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip(case):
    config = ours.config_from(CASES[case]["group"], rule="scheduled")
    assert ours.config_from(ours.config_to(config)) == config
    named = dataclasses.replace(config, rule=RULES["scheduled"])
    assert ours.config_from(ours.config_to(named)) == config


CLIPS = ("clip_value", "clip_norm", "clip_global_norm", "clip_by_gradient_rms")
UNSUPPORTED: dict[str, Any] = dict.fromkeys((*CLIPS, "weight_decay_peak_learning_rate"), 1.0)
UNSUPPORTED |= {"eps_root": 1e-9, "rule": "torch1", "cautious": True, "accumulate_steps": 2, "learning_rate": -1.0}
UNSUPPORTED |= {"m_dtype": "float32", "v_dtype": "float32"}
SCHEDULE = ScheduleConfig("inverse_time_decay", {"initial_learning_rate": 0.1, "decay_steps": 1.0, "decay_rate": 0.5})


@pytest.mark.parametrize(("name", "value"), [*UNSUPPORTED.items(), ("learning_rate", SCHEDULE)])
def test_advice_is_code(name, value):
    assert follow_advice(ours.config_to, NadamConfig(**{name: value})) == [("torch.optim.NAdam", name)]


def test_schedules_are_torchs_own():
    with pytest.raises(ValueError, match=r"learning_rate=.*inverse_time_decay.*torch.optim.lr_scheduler.LambdaLR"):
        ours.config_to(NadamConfig(learning_rate=SCHEDULE))


def test_every_field_has_a_fate():
    written = {"b1", "b2", "eps", "momentum_decay", "weight_decay", "coupled_weight_decay", "maximize"}
    without_effect = {"complex_as_real", "schedule_counts_gradients"}
    assert set(NadamConfig().to_dict()) == written | set(UNSUPPORTED) | without_effect


def test_a_negative_lr_negates():
    params, grads = problem(5, steps=5, shapes=FEW)
    negated = [{name: -g for name, g in step.items()} for step in grads]
    descent, _ = run(NadamConfig(learning_rate=0.1).build(), params, negated)
    ascent, _ = run(NadamConfig(learning_rate=-0.1).build(), params, grads)
    assert gap(ascent, descent, 0.1) < 1e-5


@pytest.mark.lenient("optax.nadamw")
def test_constant_rule():
    config = NadamConfig(rule="constant", learning_rate=0.1, weight_decay=0.2)
    group = ours.config_to(config)
    assert (group["momentum_decay"], group["decoupled_weight_decay"], group["weight_decay"]) == (1e4, True, 0.2)
    params, grads = problem(3, steps=200, shapes=FEW)
    here, _ = run(ours.config_from(group).build(), params, grads)
    optaxs, _ = run(optax.nadamw(0.1, eps=config.eps, weight_decay=0.2), params, grads)
    assert gap(here, optaxs, 0.1) < 2e-4


KEYS_TO_WARN_OF: dict[str, dict[str, Any]] = {
    r"keys that are ignored: layer_id": {"layer_id": 1},
    r"base_momentum and max_momentum: OneCycleLR has cycled betas\[0\]": {"base_momentum": 0.8, "max_momentum": 0.9},
}


@pytest.mark.parametrize("text", KEYS_TO_WARN_OF)
def test_warnings_point_here(text):
    group = {**GROUP, **KEYS_TO_WARN_OF[text]}
    for warns in (lambda: ours.config_from(group), lambda: ours.from_groups([group], keep)):
        with pytest.warns(UserWarning, match=text) as record:
            warns()
        assert [warning.filename for warning in record] == [__file__]


@pytest.mark.parametrize("name", ["checkpoint", "torch1"])
def test_continues_recording(name):
    checkpoint, (at, grads, then) = RECORDED.checkpoint(name), RECORDED.after(name)
    names = [n for group in checkpoint["param_groups"] for n in group["param_names"]]
    assert names == ["conv", "kernel", "scale", "bias"]
    tx = ours.config_from(checkpoint["param_groups"][0]).build()
    state = ours.load_state(tx.init(zeros(at)), checkpoint, keep)
    trajectory, state = run(tx, at, grads, state)
    assert gap(trajectory, then, 0.01) < BOUND
    assert int(optax.tree.get(state, "count")) == 20


def without_names(checkpoint):
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in checkpoint["param_groups"]]
    return {**checkpoint, "param_groups": groups}


ORDER = ["conv", "kernel", "scale", "bias"]


def in_their_order(arrays):
    return dict(zip(ORDER, arrays, strict=True))


def test_origins_of_names():
    checkpoint = RECORDED.checkpoint("checkpoint")
    expected = load(checkpoint)
    bare = without_names(checkpoint)
    by_id = {
        "state": {name: checkpoint["state"][i] for i, name in enumerate(ORDER)},
        "param_groups": [{**bare["param_groups"][0], "params": ORDER}],
    }
    for state in (load(bare, names=ORDER), load(by_id), load(bare, in_their_order)):
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    np.testing.assert_array_equal(get_state(expected).m["scale"], checkpoint["state"][2]["exp_avg"])
    np.testing.assert_array_equal(get_state(expected).v["bias"], checkpoint["state"][3]["exp_avg_sq"])


def test_python_numbers():
    checkpoint = RECORDED.checkpoint("torch1")
    for entry in checkpoint["state"].values():
        entry |= {"step": int(entry["step"]), "mu_product": float(entry["mu_product"])}
    state = get_state(load(checkpoint))
    assert (int(state.count), float(state.mu_product)) == (10, checkpoint["state"][0]["mu_product"])


def test_transposes_and_depth():
    moment = np.arange(6, dtype=np.float32).reshape(2, 3)
    entry = {"step": np.float32(3), "mu_product": np.float32(0.1), "exp_avg": moment, "exp_avg_sq": 2 * moment}
    source = {"state": {0: entry}, "param_groups": [{"params": [0], "param_names": ["linear.weight"]}]}
    tx = optax.chain(optax.clip(1.0), optax.MultiSteps(ours.nadam(), 2).gradient_transformation())
    state = tx.init({"linear": {"kernel": jnp.zeros((3, 2))}})
    loaded = ours.load_state(state, source, lambda w: {"linear": {"kernel": w["linear.weight"].T}})
    np.testing.assert_array_equal(get_state(loaded).m["linear"]["kernel"], moment.T)
    np.testing.assert_array_equal(get_state(loaded).v["linear"]["kernel"], 2 * moment.T)
    assert float(get_state(state).mu_product) == 1.0, "the old state is left as it was"


def test_load_copies():
    checkpoint = RECORDED.checkpoint("checkpoint")
    for entry in checkpoint["state"].values():
        entry |= {key: aligned(entry[key]) for key in ("exp_avg", "exp_avg_sq")}
    state = load(checkpoint)
    before = np.array(get_state(state).m["kernel"])
    checkpoint["state"][1]["exp_avg"] += 1.0
    np.testing.assert_array_equal(get_state(state).m["kernel"], before)


def aligned(array):
    """The array at an address that JAX takes over without a copy."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.lenient("optax.contrib.split_real_and_imaginary multiplies float32 by 1j")
def test_complex_moments():
    z = np.asarray([1 + 2j, -3 + 4j], np.complex64)
    entry = {"step": np.float32(3), "mu_product": np.float32(0.1), "exp_avg": z, "exp_avg_sq": abs(z.real) + 9j}
    real = {**entry, "exp_avg": np.ones(1, np.float32), "exp_avg_sq": np.ones(1, np.float32)}
    source: dict[str, Any] = {
        "state": {0: entry, 1: real},
        "param_groups": [{**GROUP, "params": [0, 1], "param_names": ["z", "r"]}],
    }
    params = {"r": jnp.zeros(1), "z": jnp.zeros(2, jnp.complex64)}
    state = ours.load_state(ours.nadam().init(params), source, keep)
    assert [x.tolist() for x in get_state(state).m["z"]] == [[1, -3], [2, 4]]
    assert [x.tolist() for x in get_state(state).v["z"]] == [[1, 3], [9, 9]]
    dumped = ours.dump_state(state, keep, param_groups=source["param_groups"])
    for i, key in [(0, "exp_avg"), (0, "exp_avg_sq"), (1, "exp_avg")]:
        np.testing.assert_array_equal(dumped["state"][i][key], source["state"][i][key])
    assert dumped["state"][0]["exp_avg"].dtype == np.complex64


def test_whole_complex_moments():
    params = {"z": jnp.zeros(2, jnp.complex64)}
    state = NadamConfig().build().init(params)
    with pytest.raises(ValueError, match=r"has complex moments.*complex_as_real=True"):
        ours.load_state(state, RECORDED.checkpoint("checkpoint"), keep)
    with pytest.raises(ValueError, match=r"has complex moments.*complex_as_real=True"):
        ours.dump_state(state, keep, config=NadamConfig())


def load(checkpoint, take=keep, **options):
    return ours.load_state(ours.nadam().init(zeros(RECORDED.params)), checkpoint, take, **options)


@pytest.mark.parametrize(
    ("key", "added", "text"),
    [
        ("mu_product", False, r"state of parameter 'kernel' lacks mu_product: it was not written by torch.optim.NAdam"),
        ("step", False, r"state of parameter 'kernel' lacks step"),
        ("exp_avg_sq", False, r"state of parameter 'kernel' lacks exp_avg_sq"),
        ("max_exp_avg_sq", True, r"state of parameter 'kernel' has unknown keys max_exp_avg_sq"),
        ("momentum_buffer", True, r"state of parameter 'kernel' has unknown keys momentum_buffer"),
    ],
)
def test_states_of_others(key, added, text):
    checkpoint = RECORDED.checkpoint("checkpoint")
    entry = checkpoint["state"][1]
    checkpoint["state"][1] = {**entry, key: 0} if added else {k: v for k, v in entry.items() if k != key}
    with pytest.raises(ValueError, match=text):
        load(checkpoint)


def test_lagging_parameters():
    checkpoint = RECORDED.checkpoint("checkpoint")
    checkpoint["state"][1] |= {"step": np.float32(4), "mu_product": np.float32(0.5)}
    with pytest.raises(ValueError, match=r"'kernel' took 4 \(product 0.5\); 3 others took 10 \(product .*'largest'"):
        load(checkpoint)
    state = get_state(load(checkpoint, mismatch="largest"))
    assert int(state.count) == 10
    assert float(state.mu_product) == float(checkpoint["state"][0]["mu_product"])
    np.testing.assert_array_equal(state.m["kernel"], checkpoint["state"][1]["exp_avg"])


def test_never_stepped():
    checkpoint = RECORDED.checkpoint("checkpoint")
    del checkpoint["state"][1]
    with pytest.raises(ValueError, match=r"'kernel' took none; 3 others took 10"):
        load(checkpoint)
    with pytest.raises(ValueError, match=r"'kernel' never stepped.*Pass weights"):
        load(checkpoint, mismatch="largest")
    state = get_state(load(checkpoint, mismatch="largest", weights=RECORDED.params))
    assert not state.m["kernel"].any()
    assert state.m["bias"].all()
    in_order = [RECORDED.params[name] for name in ORDER]
    by_order = load(without_names(checkpoint), in_their_order, mismatch="largest", weights=in_order)
    jax.tree.map(np.testing.assert_array_equal, get_state(by_order), state)
    with pytest.raises(ValueError, match=r"weights must be the 4 parameters of the checkpoint, got 3"):
        load(checkpoint, mismatch="largest", weights=in_order[:3])


def test_weights_fill_up():
    checkpoint = RECORDED.checkpoint("checkpoint")
    first = {"state": {i: checkpoint["state"][i] for i in (0, 1)}, "param_groups": checkpoint["param_groups"][:1]}

    def to_params(arrays):
        return {name: arrays[name] for name in ORDER}

    with pytest.raises(ValueError, match=r"to_params asked for 'scale', .* moments of 'conv', 'kernel' only"):
        load(first, to_params)
    state = get_state(load(first, to_params, weights=RECORDED.params))
    assert not state.m["scale"].any()
    assert state.m["conv"].all()


def test_fresh_checkpoint():
    checkpoint = {**RECORDED.checkpoint("checkpoint"), "state": {}}
    init = ours.nadam().init(zeros(RECORDED.params))
    jax.tree.map(np.testing.assert_array_equal, load(checkpoint), init)
    stepped = load(RECORDED.checkpoint("checkpoint"))
    jax.tree.map(np.testing.assert_array_equal, ours.load_state(stepped, checkpoint, keep), init)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": ["a", "b"]}, r"names must be the names of the 4 parameters of the checkpoint, got 2"),
        ({"names": ["a", "a", "b", "b"]}, r"names must differ, got a, b more than once"),
        ({"mismatch": "smallest"}, r"mismatch must be one of 'raise', 'largest', got 'smallest'"),
        ({"names": ["kernel", "conv", "bias", "scale"]}, r"at place 0 they are 'kernel' and 'conv'. Leave names out"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        load(RECORDED.checkpoint("checkpoint"), **options)


def test_key_error_of_to_params():
    with pytest.raises(KeyError):
        load(RECORDED.checkpoint("checkpoint"), lambda arrays: {}[next(iter(arrays))])


def test_dump_gives_back():
    checkpoint = RECORDED.checkpoint("checkpoint")
    dumped = ours.dump_state(load(checkpoint), keep, param_groups=checkpoint["param_groups"])
    assert dumped["param_groups"] == checkpoint["param_groups"]
    assert dumped["state"].keys() == checkpoint["state"].keys()
    for i, entry in checkpoint["state"].items():
        assert dumped["state"][i].keys() == entry.keys()
        for key, value in entry.items():
            np.testing.assert_array_equal(dumped["state"][i][key], value)
            assert dumped["state"][i][key].dtype == value.dtype


def test_dump_is_writable():
    dumped = ours.dump_state(load(RECORDED.checkpoint("checkpoint")), keep, config=ours.config_from(GROUP))
    assert list(dumped["param_groups"][0]["param_names"]) == sorted(ORDER)
    dumped["state"][0]["step"] += 1
    dumped["state"][0]["exp_avg"] += 1
    assert (dumped["state"][0]["step"], dumped["state"][1]["step"]) == (11, 10)


def test_as_tensor():
    seen: list[np.ndarray] = []
    ours.dump_state(load(RECORDED.checkpoint("checkpoint")), keep, config=NadamConfig(), as_tensor=seen.append)
    assert len(seen) == 4 * 4
    assert all(isinstance(x, np.ndarray) for x in seen)


def test_dump_in_order():
    checkpoint = without_names(RECORDED.checkpoint("checkpoint"))
    state = load(checkpoint, names=ORDER)
    one_group = [{**checkpoint["param_groups"][0], "params": [0, 1, 2, 3]}]
    for from_params, groups in (
        (lambda p: [p[name] for name in ORDER], checkpoint["param_groups"]),
        (lambda p: {name: p[name] for name in ORDER}, one_group),
    ):
        dumped = ours.dump_state(state, from_params, param_groups=groups)
        np.testing.assert_array_equal(dumped["state"][2]["exp_avg"], checkpoint["state"][2]["exp_avg"])
    dumped = ours.dump_state(state, lambda p: [p[name] for name in ORDER], config=NadamConfig())
    assert "param_names" not in dumped["param_groups"][0]
    assert dumped["param_groups"][0]["params"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("from_params", "kind", "text"),
    [
        (lambda p: p["bias"], TypeError, r"from_params must return a dict or a list of arrays, got ndarray"),
        (lambda p: [p["bias"]], ValueError, r"from_params must return the 4 parameters of param_groups, got 1"),
        (lambda p: {k.upper(): x for k, x in p.items()}, ValueError, r"'conv', 'kernel', 'scale', 'bias' are not"),
    ],
)
def test_bad_from_params(from_params, kind, text):
    checkpoint = RECORDED.checkpoint("checkpoint")
    with pytest.raises(kind, match=text):
        ours.dump_state(load(checkpoint), from_params, param_groups=checkpoint["param_groups"])


def test_state_without_nadam():
    state = optax.adam(1.0).init(zeros(RECORDED.params))
    with pytest.raises(ValueError, match="must hold one ScaleByNadamState, but holds 0"):
        ours.load_state(state, RECORDED.checkpoint("checkpoint"), keep)
    with pytest.raises(ValueError, match="must hold one ScaleByNadamState, but holds 0"):
        ours.dump_state(state, keep, config=NadamConfig())
