"""compat.timm without timm; what it shares with compat.torch is tested there.

====================  ==================================================================================================
steps                 those of recorded runs of timm; caution and corrected weight decay in numbers
arguments, groups     every key reaches the config, of either optimizer; groups of others and bad numbers are rejected
configs               come back as they went; the code in every error leads to a config that timm can express
warnings              point at the caller's line, also those of load_state
checkpoints           are continued and dumped in the layout of their optimizer, which the groups' keys tell
steps that differ     are named, or carried along
====================  ==================================================================================================
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, get_state
from optax_nadam.compat import timm as ours
from tests.compat.sources import follow_advice, trajectories
from tests.compat.test_torch import UNSUPPORTED, Recording, keep, zeros
from tests.parity.problem import FEW, gap, problem, run

RECORDED = Recording("timm")
CASES = RECORDED.facts["cases"]
GROUP: dict[str, Any] = CASES["defaults"]["group"]
LEGACY_GROUP: dict[str, Any] = CASES["legacy"]["group"]
OLD_GROUP = {key: GROUP[key] for key in ("lr", "betas", "eps", "weight_decay", "foreach", "maximize", "capturable")}
SIMPLIFIED = NadamConfig(rule="simplified", complex_as_real=True)


def bound(lr):
    """In units of lr, half a unit in the last place of the largest parameter, 2.4, at each of 20 steps.

    timm multiplies parameters by 1 - lr * weight_decay, which is rounded so, always to the same side.
    """
    return 20 * 2.4 * 2**-24 / lr


@functools.cache
def every_case():
    """By its group and by its arguments."""
    optimizers: dict[str, Any] = {}
    for name, case in CASES.items():
        make = ours.nadamlegacy if name == "legacy" else ours.nadamw
        optimizers |= {name: ours.config_from(case["group"]).build(), f"{name}, by arguments": make(**case["kwargs"])}
    return trajectories(optimizers, RECORDED.params, RECORDED.grads)


@pytest.mark.parametrize("case", CASES)
def test_recorded_trajectories(case):
    lr, got, same = CASES[case]["group"]["lr"], every_case()[case], every_case()[f"{case}, by arguments"]
    assert gap(got, RECORDED.under(f"cases/{case}"), lr) < bound(lr)
    assert gap(same, got, lr) < 1e-4


# timm 1.0.31 on three parameters, in float32.
@pytest.mark.parametrize(
    ("caution", "expected"), [(True, (0.981, 0.9596053, 0.9215352)), (False, (0.97350717, 0.9606539, 0.95404685))]
)
def test_caution_on_three_numbers(caution, expected):
    grads = [np.asarray(g, np.float32) for g in ((0.5, 0.5, 0.5), (-0.05, 0.5, 0.5), (-0.05, -0.05, 0.5))]
    trajectory, _ = run(ours.nadamw(lr=0.01, weight_decay=0, caution=caution), np.ones(3, np.float32), grads)
    np.testing.assert_allclose(trajectory[-1], expected, atol=2e-7)


def test_corrected_weight_decay():
    params, grads = problem(1, steps=5, shapes=FEW)

    def decay(lr, **options):
        with_decay, _ = run(ours.nadamw(lr, weight_decay=0.5, **options), params, grads[:1])
        without, _ = run(ours.nadamw(lr, weight_decay=0), params, grads[:1])
        return (without["kernel"][0] - with_decay["kernel"][0]) / params["kernel"]

    np.testing.assert_allclose(decay(0.1), 0.05, rtol=1e-4)
    np.testing.assert_allclose(decay(0.1, corrected_weight_decay=True), 0.05, rtol=1e-4)
    np.testing.assert_allclose(decay(0.1, corrected_weight_decay=True, max_lr_snapshot=0.4), 0.0125, rtol=1e-4)
    np.testing.assert_allclose(decay(0.1, max_lr_snapshot=0.4), 0.05, rtol=1e-4)
    schedule = optax.constant_schedule(0.1)
    np.testing.assert_allclose(decay(schedule, corrected_weight_decay=True, max_lr_snapshot=0.4), 0.0125, rtol=1e-4)


def test_execution_arguments():
    params, grads = problem(2, steps=3, shapes=FEW)
    plain, _ = run(ours.nadamw(), params, grads)
    other, _ = run(ours.nadamw(foreach=True, capturable=True), params, grads)
    assert gap(plain, other, 1e-3) == 0


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "text"),
    [
        (ours.nadamw, {"lr": -1.0}, ValueError, r"lr must be finite and not negative, got -1.0"),
        (ours.nadamlegacy, {"lr": -1.0}, ValueError, r"lr must be finite and not negative, got -1.0"),
        (ours.nadamw, {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        (ours.nadamw, {"eps": -1e-8}, ValueError, r"eps must be finite and not negative"),
        (ours.nadamw, {"weight_decay": -0.1}, ValueError, r"weight_decay must be finite and not negative, got -0.1"),
        (ours.nadamlegacy, {"schedule_decay": -0.1}, ValueError, r"schedule_decay must be finite and not negative"),
        (ours.nadamw, {"clipping_threshold": 0.0}, ValueError, r"clipping_threshold must be finite and positive"),
        (ours.nadamw, {"clipping_threshold": "1"}, TypeError, r"clipping_threshold must be a number, got '1'"),
        (ours.nadamw, {"caution": 1}, TypeError, r"caution must be True or False, got 1"),
        (ours.nadamw, {"lr": 0.0, "corrected_weight_decay": True}, ValueError, r"max_lr_snapshot must be .*positive"),
        (
            ours.nadamw,
            {"lr": optax.constant_schedule(0.1), "corrected_weight_decay": True},
            ValueError,
            r"max_lr_snapshot must be the largest lr where lr is not a number",
        ),
    ],
)
def test_bad_arguments(make, arguments, kind, text):
    with pytest.raises(kind, match=text):
        make(**arguments)


def test_every_key_of_nadamw():
    group = GROUP | {"lr": 0.5, "betas": [0.7, 0.8], "eps": 0.1, "weight_decay": 0.2, "clipping_threshold": 0.3}
    group |= {"caution": True, "maximize": True, "corrected_weight_decay": True, "max_lr_snapshot": 0.6}
    group |= {"lr_scale": 0.5, "param_names": ["a"]}
    numbers: dict[str, Any] = {"learning_rate": 0.5, "b1": 0.7, "b2": 0.8, "eps": 0.1, "weight_decay": 0.2}
    numbers |= {"clip_by_gradient_rms": 0.3, "weight_decay_peak_learning_rate": 0.6}
    assert ours.config_from(group) == dataclasses.replace(SIMPLIFIED, cautious=True, maximize=True, **numbers)
    assert ours.config_from(group | {"corrected_weight_decay": False}).weight_decay_peak_learning_rate is None


def test_every_key_of_nadamlegacy():
    group = LEGACY_GROUP | {"lr": 0.5, "betas": [0.7, 0.8], "eps": 0.1, "weight_decay": 0.2, "schedule_decay": 0.3}
    assert ours.config_from(group) == NadamConfig(
        learning_rate=0.5, b1=0.7, b2=0.8, eps=0.1, weight_decay=0.2, momentum_decay=0.3, coupled_weight_decay=True
    )


def test_groups_of_old_releases():
    expected = dataclasses.replace(SIMPLIFIED, learning_rate=1e-3, eps=1e-8, weight_decay=0.01)
    assert ours.config_from(OLD_GROUP) == expected


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (GROUP | {"amsgrad": False}, r"timm.optim.NAdamW group has unknown keys amsgrad"),
        (GROUP | {"momentum_decay": 4e-3}, r"timm.optim.NAdamW group has unknown keys momentum_decay"),
        (LEGACY_GROUP | {"maximize": False}, r"timm.optim.NAdamLegacy group has unknown keys maximize"),
        ({k: v for k, v in GROUP.items() if k not in ("capturable", "maximize")}, r"lacks maximize, capturable; it"),
        ({k: v for k, v in LEGACY_GROUP.items() if k != "lr"}, r"timm.optim.NAdamLegacy group lacks lr"),
        (OLD_GROUP | {"corrected_weight_decay": True}, r"with corrected_weight_decay lacks max_lr_snapshot"),
        (GROUP | {"corrected_weight_decay": True, "max_lr_snapshot": 0.0}, r"max_lr_snapshot must be .*positive"),
    ],
    ids=["AdamW", "torch", "legacy", "LaProp", "without lr", "old corrected", "lr 0"],
)
def test_groups_of_others(group, text):
    with pytest.raises(ValueError, match=text):
        ours.config_from(group)


@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip(case):
    group = CASES[case]["group"]
    config = ours.config_from(group)
    keys = ours.config_to(config)
    assert ours.config_from(keys) == config
    assert keys | {"params": group["params"], "betas": group["betas"]} == group


DECAY = {"weight_decay": 0.1}
IN_NADAMW = {"clip_by_gradient_rms": 1.0, "cautious": True, "maximize": True, "weight_decay_peak_learning_rate": 1.0}
IN_NEITHER = {name: value for name, value in UNSUPPORTED.items() if name not in (*IN_NADAMW, "rule")}
REJECTED: list[tuple[str, str, dict[str, Any]]] = [
    *(("NAdamW", name, {"rule": "simplified", name: value}) for name, value in IN_NEITHER.items()),
    *(("NAdamLegacy", name, {name: value}) for name, value in (IN_NEITHER | IN_NADAMW).items()),
    ("NAdamW", "coupled_weight_decay", {"rule": "simplified", "coupled_weight_decay": True, **DECAY}),
    ("NAdamLegacy", "coupled_weight_decay", DECAY),
]


@pytest.mark.parametrize(("optimizer", "name", "fields"), REJECTED)
def test_advice_is_code(optimizer, name, fields):
    assert follow_advice(ours.config_to, NadamConfig(**fields)) == [(f"timm.optim.{optimizer}", name)]


def test_advice_for_another_rule():
    assert follow_advice(ours.config_to, NadamConfig(rule="constant")) == [("timm", "rule")]
    text = r"timm cannot express rule='constant'.*NAdamW follows 'simplified'.*NAdamLegacy 'scheduled'"
    with pytest.raises(ValueError, match=text):
        ours.config_to(NadamConfig(rule="constant"))


def test_no_decay_is_of_either_kind():
    assert ours.config_to(NadamConfig())["weight_decay"] == 0
    assert ours.config_to(NadamConfig(rule="simplified", coupled_weight_decay=True))["weight_decay"] == 0


def test_warnings_point_here():
    checkpoint = RECORDED.checkpoint("checkpoint")
    groups = checkpoint["param_groups"] = [{**group, "layer_id": 1} for group in checkpoint["param_groups"]]
    for warns in (lambda: ours.from_groups(groups, keep), lambda: load(checkpoint)):
        with pytest.warns(UserWarning, match="keys that are ignored: layer_id") as record:
            warns()
        assert {warning.filename for warning in record} == {__file__}


@pytest.mark.parametrize(("name", "decay"), [("checkpoint", None), ("legacy", 0.5)])
def test_continues_recording(name, decay):
    checkpoint, (at, grads, then) = RECORDED.checkpoint(name), RECORDED.after(name)
    config = ours.config_from(checkpoint["param_groups"][0])
    tx = config.build()
    state = ours.load_state(tx.init(zeros(at)), checkpoint, keep)
    product = 0.9**10 if decay is None else np.prod([0.9 * (1 - 0.5 * 0.96 ** (decay * t)) for t in range(1, 11)])
    np.testing.assert_allclose(get_state(state).mu_product, product, rtol=1e-6)
    trajectory, state = run(tx, at, grads, state)
    assert gap(trajectory, then, 0.01) < bound(0.01)
    assert int(get_state(state).count) == 20


@pytest.mark.parametrize("name", ["checkpoint", "legacy"])
def test_dump_gives_back(name):
    checkpoint = RECORDED.checkpoint(name)
    tx = ours.config_from(checkpoint["param_groups"][0]).build()
    state = ours.load_state(tx.init(zeros(RECORDED.params)), checkpoint, keep)
    dumped = ours.dump_state(state, keep, param_groups=checkpoint["param_groups"])
    assert dumped["param_groups"] == checkpoint["param_groups"]
    assert dumped["state"].keys() == checkpoint["state"].keys()
    for i, entry in checkpoint["state"].items():
        assert dumped["state"][i].keys() == entry.keys()
        for key, value in entry.items():
            np.testing.assert_allclose(dumped["state"][i][key], value, rtol=1e-7)
    kinds = {key: type(value) for key, value in dumped["state"][0].items()}
    arrays = {"exp_avg": np.ndarray, "exp_avg_sq": np.ndarray}
    expected = {"step": int, "m_schedule": float} if name == "legacy" else {"step": np.ndarray}
    assert kinds == expected | arrays


def test_config_chooses_layout():
    state = ours.nadamlegacy().init({"w": jnp.zeros(2)})
    legacy = ours.dump_state(state, keep, config=ours.config_from(LEGACY_GROUP))
    assert legacy["state"][0].keys() == {"step", "m_schedule", "exp_avg", "exp_avg_sq"}
    assert legacy["param_groups"][0]["param_names"] == ["w"]
    modern = ours.dump_state(state, lambda params: [params["w"]], config=SIMPLIFIED)
    assert modern["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "param_names" not in modern["param_groups"][0]


def load(checkpoint, **options):
    return ours.load_state(ours.nadamw().init(zeros(RECORDED.params)), checkpoint, keep, **options)


@pytest.mark.parametrize(
    ("name", "key", "added", "text"),
    [
        ("legacy", "m_schedule", False, r"'kernel' lacks m_schedule: it was not written by timm.optim.NAdamLegacy"),
        ("checkpoint", "exp_avg", False, r"'kernel' lacks exp_avg: it was not written by timm.optim.NAdamW"),
        ("checkpoint", "mu_product", True, r"state of parameter 'kernel' has unknown keys mu_product"),
        ("checkpoint", "max_exp_avg_sq", True, r"state of parameter 'kernel' has unknown keys max_exp_avg_sq"),
    ],
)
def test_states_of_others(name, key, added, text):
    checkpoint = RECORDED.checkpoint(name)
    entry = checkpoint["state"][1]
    checkpoint["state"][1] = {**entry, key: 0} if added else {k: v for k, v in entry.items() if k != key}
    with pytest.raises(ValueError, match=text):
        load(checkpoint)


def test_lagging_parameters():
    checkpoint = RECORDED.checkpoint("checkpoint")
    checkpoint["state"][1]["step"] = np.float32(4)
    del checkpoint["state"][2]
    with pytest.raises(ValueError, match=r"'kernel' took 4; 'scale' took none; 2 others took 10"):
        load(checkpoint)
    state = get_state(load(checkpoint, mismatch="largest", weights=RECORDED.params))
    assert int(state.count) == 10
    assert not state.m["scale"].any()
    np.testing.assert_array_equal(state.m["kernel"], checkpoint["state"][1]["exp_avg"])


def test_no_checkpoint():
    with pytest.raises(ValueError, match=r"source must be what optimizer.state_dict\(\) returns"):
        load({"state_dict": {}})
