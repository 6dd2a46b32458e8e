"""timm's NAdamW and NAdamLegacy themselves beside compat.timm: trajectories, groups and checkpoints."""

from typing import Any

import numpy as np
import optax
import pytest
import torch

from optax_nadam import NadamConfig
from optax_nadam.compat import timm as ours
from tests.parity.problem import FEW, gap, long_unless, problem, run, stack
from tests.parity.record_torch import LEGACY_CASES, NADAMW_CASES, Theirs, in_groups, plain_groups, timm_optimizers

NAdamW, NAdamLegacy = timm_optimizers()

# Ten steps after a checkpoint, from equal parameters, at lr = 0.01: measured 9e-5 lr at most.
RESUMED = 2e-4
BEFORE, AFTER = 25, 10

CASES: dict[str, dict[str, Any]] = NADAMW_CASES | {
    "no decay": {"lr": 0.01, "weight_decay": 0},
    "maximize": {"lr": 0.01, "maximize": True, "caution": True, "clipping_threshold": 0.3},
    "corrected, cautious": {"lr": 0.01, "weight_decay": 0.1, "caution": True, "corrected_weight_decay": True},
    "clipped": {"lr": 0.01, "clipping_threshold": 0.3},
}
LEGACY: dict[str, dict[str, Any]] = LEGACY_CASES | {
    "legacy, defaults": {},
    "legacy, momentum": {"lr": 0.01, "betas": (0.7, 0.95), "schedule_decay": 1.0, "eps": 1e-4},
}
strict_optax = pytest.mark.lenient("optax.contrib.split_real_and_imaginary multiplies float32 by 1j")


def bound(params, grads, lr):
    """In units of lr, half a unit in the last place of the largest parameter at each step.

    timm multiplies parameters by 1 - lr * weight_decay, which is rounded so, always to the same side; whatever
    else is rounded is so to either side. Measured: up to 0.7 of it in float32, at lr = 0.001.
    """
    largest = max(float(np.max(np.abs(p))) for p in params.values())
    half_a_unit = float(np.finfo(params["kernel"].dtype).eps) / 2
    return half_a_unit * largest * len(grads) / lr


def modern(**kwargs):
    return lambda named: NAdamW(named, **kwargs)


def legacy(**kwargs):
    return lambda named: NAdamLegacy(named, **kwargs)


def complex_problem(seed):
    """Every parameter complex."""
    (params, grads), (others, other_grads) = problem(seed, shapes=FEW), problem(seed + 100, shapes=FEW)

    def whole(tree, other):
        pairs = {name: torch.from_numpy(np.stack([x, other[name]], axis=-1)) for name, x in tree.items()}
        return {name: torch.view_as_complex(x).numpy() for name, x in pairs.items()}

    return whole(params, others), [whole(*g) for g in zip(grads, other_grads, strict=True)]


def assert_close(params, grads, **kwargs):
    """Ours beside timm's loop over the parameters and its kernels of many."""
    trajectory, _ = run(ours.nadamw(foreach=True, **kwargs), params, grads)  # without effect here
    lr = kwargs.get("lr", 1e-3)
    for foreach in (False, True):
        theirs = Theirs(params, modern(foreach=foreach, **kwargs)).run(grads)
        assert gap(trajectory, theirs, lr) < bound(params, grads, lr), foreach


@pytest.mark.parametrize("case", long_unless({"defaults", "corrected"}.__contains__, CASES))  # the others in double
def test_trajectories_of_nadamw(case):
    assert_close(*problem(shapes=FEW), **CASES[case])


@pytest.mark.x64
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES)
def test_nadamw_double(case):
    assert_close(*problem(4, steps=200, shapes=FEW, dtype=np.float64), **CASES[case])


@pytest.mark.parametrize("case", LEGACY)
def test_trajectories_of_nadamlegacy(case):
    kwargs = LEGACY[case]
    params, grads = problem(shapes=FEW)
    theirs = Theirs(params, legacy(**kwargs)).run(grads)
    trajectory, _ = run(ours.nadamlegacy(**kwargs), params, grads)
    assert gap(trajectory, theirs, kwargs.get("lr", 2e-3)) < bound(params, grads, kwargs.get("lr", 2e-3))


@pytest.mark.x64
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", LEGACY)
def test_nadamlegacy_double(case):
    kwargs = LEGACY[case]
    params, grads = problem(4, steps=200, shapes=FEW, dtype=np.float64)
    theirs = Theirs(params, legacy(**kwargs)).run(grads)
    trajectory, _ = run(ours.nadamlegacy(**kwargs), params, grads)
    assert gap(trajectory, theirs, kwargs.get("lr", 2e-3)) < bound(params, grads, kwargs.get("lr", 2e-3))


@strict_optax
@pytest.mark.parametrize("case", long_unless({"caution", "clipped"}.__contains__, CASES))
def test_complex_parameters(case):
    assert_close(*complex_problem(3), **CASES[case])


def test_corrected_weight_decay():
    params, grads = problem(5, shapes=FEW)
    theirs = Theirs(params, modern(lr=0.02, weight_decay=0.5, corrected_weight_decay=True))
    scheduler = torch.optim.lr_scheduler.LinearLR(theirs.optimizer, 1.0, 0.1, 40)
    expected = []
    for grad in grads:
        theirs.run([grad])
        expected.append(theirs.arrays())
        scheduler.step()
    tx = ours.nadamw(
        optax.linear_schedule(0.02, 0.002, 40), weight_decay=0.5, corrected_weight_decay=True, max_lr_snapshot=0.02
    )
    trajectory, _ = run(tx, params, grads)
    # lr itself is rounded to float32 here, at every step.
    assert gap(trajectory, stack(expected), 0.02) < bound(params, grads, 0.02)


@pytest.mark.parametrize("case", CASES)
def test_nadamw_round_trip(case):
    (group,) = plain_groups(modern(**CASES[case])([torch.nn.Parameter(torch.zeros(1))]))
    config = ours.config_from(group)
    keys = ours.config_to(config)
    assert keys | {"params": [0], "betas": list(keys["betas"])} == group
    rebuilt = NAdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], **keys}])
    assert plain_groups(rebuilt) == [group]
    assert ours.config_from(keys) == config


@pytest.mark.parametrize("case", LEGACY)
def test_nadamlegacy_round_trip(case):
    (group,) = plain_groups(legacy(**LEGACY[case])([torch.nn.Parameter(torch.zeros(1))]))
    config = ours.config_from(group)
    keys = ours.config_to(config)
    assert keys | {"params": [0], "betas": list(keys["betas"])} == group
    assert plain_groups(legacy(**keys)([torch.nn.Parameter(torch.zeros(1))])) == [group]
    assert ours.config_from(keys) == config


def keep(arrays):
    """``to_params`` and ``from_params`` of parameters that are alike on either side."""
    return dict(arrays)


def through_file(checkpoint, path):
    torch.save(checkpoint, path)
    return torch.load(path)


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nadamw": (NAdamW, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.0, "caution": True}),
    "nadamlegacy": (NAdamLegacy, {"lr": 0.01, "betas": (0.8, 0.99), "schedule_decay": 0.5}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_we_continue_where_timm_stopped(name, tmp_path):
    optimizer, kwargs = OPTIMIZERS[name]
    params, grads = problem(6, steps=BEFORE + AFTER)
    theirs = Theirs(params, in_groups(optimizer, **kwargs))
    theirs.run(grads[:BEFORE])
    at, checkpoint = theirs.arrays(), through_file(theirs.optimizer.state_dict(), tmp_path / "optimizer.pt")
    tx = ours.config_from(checkpoint["param_groups"][0]).build()
    new = tx.init(at)
    trajectory, _ = run(tx, at, grads[BEFORE:], ours.load_state(new, checkpoint, keep))
    assert gap(trajectory, theirs.run(grads[BEFORE:]), 0.01) < RESUMED
    fresh, _ = run(tx, at, grads[BEFORE:], new)
    assert gap(fresh, trajectory, 0.01) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_timm_continues_where_we_stopped(name, tmp_path):
    optimizer, kwargs = OPTIMIZERS[name]
    params, grads = problem(7, steps=BEFORE + AFTER)
    tx = getattr(ours, name)(**kwargs)
    trajectory, state = run(tx, params, grads[:BEFORE])
    at = {name: x[-1] for name, x in trajectory.items()}
    theirs = Theirs(at, in_groups(optimizer, **kwargs))
    groups = theirs.optimizer.state_dict()["param_groups"]
    dumped = ours.dump_state(state, keep, param_groups=groups, as_tensor=torch.from_numpy)
    theirs.optimizer.load_state_dict(through_file(dumped, tmp_path / "optimizer.pt"))
    expected, _ = run(tx, at, grads[BEFORE:], state)
    assert gap(theirs.run(grads[BEFORE:]), expected, 0.01) < RESUMED


@pytest.mark.parametrize(
    ("optimizer", "config"),
    [
        (
            NAdamW,
            NadamConfig(
                rule="simplified", learning_rate=0.01, eps=1e-8, weight_decay=0.1, weight_decay_peak_learning_rate=0.1
            ),
        ),
        (NAdamLegacy, NadamConfig(learning_rate=0.01, eps=1e-8, weight_decay=0.1, coupled_weight_decay=True)),
    ],
    ids=["nadamw", "nadamlegacy"],
)
def test_timm_takes_the_group(optimizer, config, tmp_path):
    params, grads = problem(8, steps=BEFORE + AFTER)
    tx = config.build()
    trajectory, state = run(tx, params, grads[:BEFORE])
    at = {name: x[-1] for name, x in trajectory.items()}
    dumped = ours.dump_state(state, keep, config=config, as_tensor=torch.from_numpy)
    theirs = Theirs({name: at[name] for name in dumped["param_groups"][0]["param_names"]}, optimizer)
    theirs.optimizer.load_state_dict(through_file(dumped, tmp_path / "optimizer.pt"))
    expected, _ = run(tx, at, grads[BEFORE:], state)
    assert gap(theirs.run(grads[BEFORE:]), expected, 0.01) < RESUMED
