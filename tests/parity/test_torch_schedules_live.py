"""torch's and transformers' schedulers beside the schedules read from their checkpoints: every step, and past the end.

- Two groups of different rates; one schedule from states saved at the start, on the way and at the end, through JSON.
- A scheduler of epochs; rates in tensors; what is no function of the step, or does not agree, is refused.
"""

import copy
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from torch.optim import lr_scheduler as theirs
from torch.optim.swa_utils import SWALR

from optax_nadam.compat._torch_schedules import schedules_of

pytestmark = pytest.mark.lenient("Optax's schedules mix dtypes")
STEPS, RATES = 70, (0.1, 0.02)
# Of the largest rate. In float32, a few roundings, more through a logarithm: measured 3.2e-7 at most.
BOUND = 6e-7

NESTED = "sequence with transformers' linear"

Make = Callable[[torch.optim.Optimizer], Any]


@dataclasses.dataclass(frozen=True)
class Transformers:
    """A scheduler as transformers.get_scheduler makes it."""

    name: str
    warmup: int = 7
    training: int | None = 52
    specific: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, optimizer):
        """The scheduler."""
        return transformers.get_scheduler(self.name, optimizer, self.warmup, self.training, dict(self.specific))

    @property
    def arguments(self):
        """What is said of it to schedules_of."""
        needs_base = self.name == "polynomial" or "min_lr" in self.specific
        steps = {"num_warmup_steps": self.warmup, "num_training_steps": self.training}
        return {**steps, **self.specific, **({"lr_init": 0.05} if needs_base else {})}


def sequential(milestones, *makes):
    return lambda o: theirs.SequentialLR(o, [make(o) for make in makes], milestones)


def chained(*makes):
    return lambda o: theirs.ChainedScheduler([make(o) for make in makes])


def one_cycle(**options):
    return lambda o: theirs.OneCycleLR(o, [0.1, 0.02], **{"total_steps": 50, "cycle_momentum": False, **options})


def rise(o):
    return theirs.LinearLR(o, 0.1, total_iters=9)


def cosine(o):
    return theirs.CosineAnnealingLR(o, 20)


CASES: dict[str, Make] = {
    "constant": lambda o: theirs.ConstantLR(o, 0.3, total_iters=12),
    "linear": lambda o: theirs.LinearLR(o, 0.2, 0.7, total_iters=30),
    "linear to zero": lambda o: theirs.LinearLR(o, 1.0, 0.0, total_iters=30),
    "stairs": lambda o: theirs.StepLR(o, 8, 0.5),
    "milestones, one twice": lambda o: theirs.MultiStepLR(o, [30, 5, 5, 41], 0.3),
    "exponential": lambda o: theirs.ExponentialLR(o, 0.95),
    "polynomial": lambda o: theirs.PolynomialLR(o, 40, 1.7),
    "cosine that rises again": lambda o: theirs.CosineAnnealingLR(o, 19, 0.005),
    "warm restarts": lambda o: theirs.CosineAnnealingWarmRestarts(o, 9),
    "warm restarts, longer ones": lambda o: theirs.CosineAnnealingWarmRestarts(o, 5, 2, 0.005),
    "one cycle": one_cycle(pct_start=0.3),
    "one cycle, phase ends are fractions": one_cycle(total_steps=43, pct_start=0.31),
    "one cycle of three": one_cycle(pct_start=0.25, three_phase=True),
    "one cycle, lines": one_cycle(anneal_strategy="linear", total_steps=47),
    "one cycle that starts at its top": one_cycle(pct_start=0.0),
    "warm-up then cosine": sequential([9], rise, cosine),
    "sequence of four": sequential(
        [6, 20, 45],
        rise,
        lambda o: theirs.CosineAnnealingWarmRestarts(o, 4, 2),
        lambda o: theirs.MultiStepLR(o, [5, 9], 0.5),
        lambda o: theirs.ExponentialLR(o, 0.9),
    ),
    "sequence that starts with a chain": sequential([15], chained(rise, lambda o: theirs.StepLR(o, 6, 0.9)), cosine),
    "chain of warm-up and stairs": chained(rise, lambda o: theirs.StepLR(o, 10, 0.5)),
    "chain of four": chained(
        lambda o: theirs.ExponentialLR(o, 0.99),
        lambda o: theirs.ConstantLR(o, 0.5, 6),
        lambda o: theirs.MultiStepLR(o, [20], 0.1),
        lambda o: theirs.PolynomialLR(o, 50, 2.0),
    ),
    "chain of warm-up and cosine": chained(rise, cosine),
    "chain of one": chained(lambda o: theirs.CosineAnnealingLR(o, 19, 0.005)),
    NESTED: sequential([12], rise, Transformers("linear")),
    "transformers linear": Transformers("linear"),
    "transformers linear, no warm-up": Transformers("linear", warmup=0),
    "transformers linear, warm-up only": Transformers("linear", warmup=20, training=20),
    "transformers cosine": Transformers("cosine"),
    "transformers cosine, two waves": Transformers("cosine", specific={"num_cycles": 2}),
    "transformers restarts": Transformers("cosine_with_restarts", specific={"num_cycles": 3}),
    "transformers restarts, lengths are fractions": Transformers(
        "cosine_with_restarts", training=43, specific={"num_cycles": 8}
    ),
    "transformers restarts, a cycle cut": Transformers("cosine_with_restarts", specific={"num_cycles": 2.6}),
    "transformers polynomial": Transformers("polynomial", specific={"lr_end": 0.003, "power": 2.0}),
    "transformers constant": Transformers("constant"),
    "transformers warm-up": Transformers("constant_with_warmup"),
    "transformers inverse root": Transformers("inverse_sqrt"),
    "transformers inverse root, no warm-up": Transformers("inverse_sqrt", warmup=0, specific={"timescale": 5}),
    "transformers cosine to a rate": Transformers("cosine_with_min_lr", specific={"min_lr": 0.01}),
    "transformers cosine to a ratio": Transformers("cosine_with_min_lr", specific={"min_lr_rate": 0.2}),
    **{
        f"transformers stable, {kind} ends": Transformers(
            "warmup_stable_decay",
            specific={"num_decay_steps": 20, "warmup_type": kind, "decay_type": kind, "min_lr_ratio": 0.1},
        )
        for kind in ("linear", "cosine", "1-sqrt")
    },
    "transformers stable, given": Transformers(
        "warmup_stable_decay", specific={"num_decay_steps": 9, "num_stable_steps": 4}
    ),
}


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in RATES]
    return torch.optim.NAdam(groups, lr=0.05)


def follow(make, steps=STEPS, steps_per_epoch=1):
    """The rates of the groups at each step, and the states of scheduler and groups there."""
    nadam = optimizer()
    scheduler = make(nadam)
    steps = min(steps, getattr(scheduler, "total_steps", steps))  # torch refuses a step past the end of OneCycleLR
    rates, states = [], []
    for count in range(steps + 1):
        rates.append([float(group["lr"]) for group in nadam.param_groups])
        states.append(copy.deepcopy((scheduler.state_dict(), nadam.state_dict()["param_groups"])))
        nadam.step()
        if count < steps and (count + 1) % steps_per_epoch == 0:
            scheduler.step()
    return np.array(rates), states


def named(case):
    """The name and arguments of the transformers schedule in a case."""
    make = Transformers("linear") if case == NESTED else CASES[case]
    return (make.name, make.arguments) if isinstance(make, Transformers) else (None, {})


def read(saved, count, case, steps_per_epoch=None):
    """The groups' schedules from a case's saved states."""
    name, arguments = named(case)
    return schedules_of(saved[0], saved[1], count, steps_per_epoch, name, arguments)


def gap(schedules, rates):
    """The largest difference of the groups' schedules from rates, each in units of its group's own."""
    counts = np.arange(len(rates))
    built = [schedule.build() for schedule in schedules]
    got = jax.jit(jax.vmap(lambda count: [of_group(count) for of_group in built]))(counts)
    return np.max(np.abs(np.stack(got, axis=1) - rates) / RATES)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:Both num_training_steps and")
@pytest.mark.parametrize("case", CASES)
def test_every_step(case):
    rates, states = follow(CASES[case])
    counts = [0, 4, len(rates) // 2, len(rates) - 1]
    schedules, *others = [
        read(saved, count, case) for count in counts for saved in (states[count], json.loads(json.dumps(states[count])))
    ]
    assert all(other == schedules for other in others)
    assert gap(schedules, rates) < BOUND


@pytest.mark.parametrize("case", ["milestones, one twice", "warm-up then cosine", "transformers linear"])
def test_steps_of_epochs(case):
    rates, states = follow(CASES[case], steps_per_epoch=3)
    for count in (0, 4, 69):
        assert gap(read(states[count], count, case, steps_per_epoch=3), rates) < BOUND


def test_rates_in_tensors():
    """As saved by torch, and loaded."""

    def make(o):
        for group in o.param_groups:
            group |= {"lr": torch.tensor(group["lr"]), "foreach": False}
        return theirs.MultiStepLR(o, [30, 5, 5, 41], 0.5)

    rates, states = follow(make)
    file = io.BytesIO()
    torch.save(states[33], file)
    file.seek(0)
    state, groups = torch.load(file)
    assert gap(schedules_of(state, groups, 33), rates) < BOUND


def fractions(o):
    scheduler = theirs.CosineAnnealingWarmRestarts(o, 5)
    scheduler.step(1.5)
    return scheduler


REFUSED: dict[str, tuple[Make, str]] = {
    "a factor by a function": (
        lambda o: theirs.LambdaLR(o, lambda n: 0.9**n),
        r"LambdaLR or Mult.*lr_scheduler_type=, one of 'lin",
    ),
    "a product by a function": (lambda o: theirs.MultiplicativeLR(o, lambda n: 0.9), r"LambdaLR or MultiplicativeLR"),
    "cycles": (lambda o: theirs.CyclicLR(o, 0.1, 0.2, cycle_momentum=False), r"max_lrs.*none of ConstantLR.*function"),
    "plateau": (theirs.ReduceLROnPlateau, r"ReduceLROnPlateau.*optax.contrib.reduce_on_plateau"),
    "averaged weights": (lambda o: SWALR(o, 0.05), r"keys _anneal_strategy, anneal_epochs, which are those of none"),
    "fractions of epochs": (fractions, r"T_cur=1.5: pass a function"),
    "chained cosine to a rate": (
        chained(rise, lambda o: theirs.CosineAnnealingLR(o, 20, 0.01)),
        r"CosineAnnealingLR that is no factor of the others' rate with eta_min",
    ),
    "chained cosine and decay": (
        chained(cosine, lambda o: theirs.ExponentialLR(o, 0.99)),
        r"CosineAnnealingLR that is no factor of the others' rate after T_max",
    ),
    "chain undone by its sequence": (
        sequential([15], chained(rise, lambda o: theirs.ExponentialLR(o, 0.9)), cosine),  # it takes 0.9 once too often
        r"stores the learning rate 0.0090\d* of group 0 at its step 0, but its schedule gives 0.00999",
    ),
    "chained restarts": (
        chained(rise, lambda o: theirs.CosineAnnealingWarmRestarts(o, 20)),
        r"CosineAnnealingWarmRestarts that is no factor of the others' rate; pass a function",
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("case", REFUSED)
def test_no_functions_of_the_step(case):
    make, text = REFUSED[case]
    nadam = optimizer()
    scheduler = make(nadam)
    with pytest.raises(ValueError, match=text):
        schedules_of(scheduler.state_dict(), nadam.param_groups, None)
