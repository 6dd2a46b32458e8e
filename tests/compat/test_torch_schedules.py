"""Checkpoints of torch's schedulers without torch: what does not agree is refused, with the way out."""

import json
from typing import Any

import numpy as np
import pytest

from optax_nadam import NadamConfig
from optax_nadam.compat._torch_schedules import schedule_from, schedules_of

pytestmark = pytest.mark.lenient("Optax's schedules mix dtypes")


def state(base=0.1, last=0.05, epochs=5, **own):
    """What torch stores of a scheduler of two groups, the second of a fifth of the rate."""
    return {**own, "base_lrs": [base, base / 5], "last_epoch": epochs, "_last_lr": [last, last / 5], "_step_count": 6}


COSINE = state(T_max=10, eta_min=0.0)
STAIRS = state(last=0.1 * 0.5**2, milestones={"2": 1, "5": 1, "30": 2}, gamma=0.5)
LAMBDA = state(lr_lambdas=[{}, {}])
LINEAR: dict[str, Any] = {"lr_scheduler_type": "linear", "num_warmup_steps": 0, "num_training_steps": 10}
PHASES = [{"end_step": 9, "start_lr": "initial_lr", "end_lr": "max_lr"}]
CYCLE = state(total_steps=10, _schedule_phases=PHASES, _anneal_func_type="cos")


def test_through_json():
    """In a config, of epochs, with a Counter whose keys have become strings; the second group's rates are its own."""
    schedule = schedule_from(json.loads(json.dumps(STAIRS)), count=58, steps_per_epoch=10)
    config = NadamConfig(learning_rate=schedule)
    back = NadamConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    counts, factors = [0, 19, 20, 50, 299, 300], np.array([1, 1, 0.5, 0.25, 0.25, 0.0625])
    np.testing.assert_allclose([back.learning_rate(n) for n in counts], 0.1 * factors, rtol=1e-6)
    _, second = schedules_of(STAIRS, None, 58, 10)
    np.testing.assert_allclose([second(n) for n in counts], 0.02 * factors, rtol=1e-6)


def test_one_rate_is_the_optimizers():
    """lr_end is in proportion to the optimizer's rate, which is that of all groups; rates may be arrays."""
    rates = {"base_lrs": [np.array(0.1), np.array(0.1)], "_last_lr": [np.array(0.055), np.array(0.055)]}
    schedule = schedule_from(LAMBDA | rates, **LINEAR | {"lr_scheduler_type": "polynomial", "lr_end": 0.01})
    np.testing.assert_allclose([schedule(n) for n in (0, 5, 10, 20)], [0.1, 0.055, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "arguments", "text"),
    [
        pytest.param(
            [COSINE], {}, r"scheduler_state must be what.*got list. From.*\['lr_schedulers'\]\[0\]", id="list"
        ),
        pytest.param({"state": {}}, {}, r"scheduler_state must be what.*got the keys \['state'\]", id="optimizer"),
        pytest.param(state(T_max=10), {}, r"keys T_max, which are those of none of ConstantLR", id="key is missing"),
        pytest.param(
            LAMBDA,
            {},
            r"store no formula.*lr_scheduler_type=, one of 'linear', 'cosine'.*otherwise pass a",
            id="no name",
        ),
        pytest.param(
            LAMBDA,
            {**LINEAR, "lr_scheduler_type": "greedy"},
            r"lr_scheduler_type must be one of 'linear'.*'greedy'",
            id="other name",
        ),
        pytest.param(
            COSINE,
            LINEAR,
            r"lr_scheduler_type='linear' is for a LambdaLR.*has 0 of them; leave it out",
            id="own formula",
        ),
        pytest.param(
            LAMBDA,
            {"num_cycles": 2},
            r"num_cycles are arguments .*pass lr_scheduler_type= too|lr_scheduler_type=, one",
            id="arguments",
        ),
        pytest.param(
            COSINE,
            {"T_max": 10},
            r"T_max are arguments of a transformers schedule: pass lr_scheduler_type= too",
            id="its own",
        ),
        pytest.param(
            LAMBDA,
            {"lr_scheduler_type": "cosine", "num_warmup_steps": 0},
            r"arguments of lr_scheduler_type='cosine' do not fit: missing.*'num_training_steps'.*num_cycles.*= 0.5",
            id="argument is missing",
        ),
        pytest.param(
            LAMBDA, {**LINEAR, "num_warmup_steps": -np.inf}, r"num_warmup_steps must be finite", id="infinite"
        ),
        pytest.param(
            LAMBDA,
            {**LINEAR, "lr_scheduler_type": "polynomial"},
            r"groups of different learning rates need lr_init=",
            id="no base",
        ),
        pytest.param(
            LAMBDA,
            {**LINEAR, "lr_scheduler_type": "cosine_with_min_lr"},
            r"one of min_lr and min_lr_rate is needed",
            id="no minimum",
        ),
        pytest.param(
            LAMBDA,
            {**LINEAR, "num_training_steps": 11},
            r"stores the learning rate 0.05 of group 0 at its step 5, but its schedule gives 0.054545.*correct it, or",
            id="wrong steps",
        ),
        pytest.param(
            COSINE,
            {"param_groups": [{"lr": 0.05}, {"lr": 0.02}]},
            r"param_groups\[1\] has lr 0.02, but scheduler_state stores 0.01 as the last.*both from one checkpoint",
            id="changed by hand",
        ),
        pytest.param(COSINE, {"param_groups": {"param_groups": [{}]}}, r"param_groups are 1, but.*with 2", id="groups"),
        pytest.param(CYCLE, {}, r"OneCycleLR keeps its rates in the optimizer: pass param_groups=", id="no groups"),
        pytest.param(
            COSINE,
            {"count": 5000},
            r"counts 5 steps, but the optimizer took 5000. .*steps_per_epoch=.*schedule\(processes \* n\)",
            id="epochs",
        ),
        pytest.param(
            COSINE,
            {"count": 5000, "steps_per_epoch": 500},
            r"counts 5 steps, but the optimizer took 5000, 500 in an epoch",
            id="shorter epochs",
        ),
        pytest.param(COSINE, {"steps_per_epoch": 0}, r"steps_per_epoch must be finite and positive", id="no steps"),
    ],
)
def test_what_does_not_agree(source, arguments, text):
    with pytest.raises(ValueError, match=text):
        schedule_from(source, **arguments)
