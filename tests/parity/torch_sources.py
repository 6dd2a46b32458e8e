"""The kinds of checkpoints that torch and timm users have: how each is made, and what to pass to load it.

``python -m tests.parity.torch_sources`` prints the figures of docs/carry.md.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from optax_nadam import compat
from tests.compat.sources import AFTER, BEFORE, LR, continued, distance, from_params, gradients, to_params
from tests.parity.problem import SHAPES, gap, problem
from tests.parity.record_torch import Theirs, timm_optimizers

NAMES = list(SHAPES)
DECAYED, OTHERS = ["kernel", "conv"], ["bias", "scale"]
GROUPED = DECAYED + OTHERS


class Kind(NamedTuple):
    """A kind of checkpoint.

    Attributes:
      make: makes the optimizer of pairs of name and parameter.
      save: makes the checkpoint of the optimizer and its parameters by name.
      names: what to pass as ``names``.
      order: the order of the optimizer's parameters, where its groups have no names.
      module: the module of ``optax_nadam.compat`` that loads it.
      frozen: names of parameters that get no gradient.
    """

    make: Callable[[list[tuple[str, Any]]], Any]
    save: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda optimizer, params: optimizer.state_dict()
    names: list[str] | None = None
    order: list[str] | None = None
    module: str = "torch"
    frozen: tuple[str, ...] = ()


def unnamed(named: list[tuple[str, Any]]) -> list[Any]:
    """The parameters alone."""
    return [p for _, p in named]


def two_groups(named: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Two groups without names, decay and no decay: what the Trainer of transformers makes."""
    by_name = dict(named)
    return [
        {"params": [by_name[name] for name in DECAYED], "weight_decay": 0.1},
        {"params": [by_name[name] for name in OTHERS], "weight_decay": 0.0},
    ]


def layers(named: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """A group for each layer, as recipes of layer-wise learning rates make them."""
    by_name = dict(named)
    decays = {"kernel": 0.1, "bias": 0.0, "conv": 0.05, "scale": 0.0}
    return [
        {
            "params": [(name, by_name[name])],
            "weight_decay": decay,
            "lr": LR * 0.5 ** (name == "conv"),
            "lr_scale": 0.5 ** (name == "conv"),
            "layer_id": i,
            "group_name": f"layer {i}",
        }
        for i, (name, decay) in enumerate(decays.items())
    ]


def distributed(flat: bool) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    """What torch.distributed.checkpoint saves."""

    def save(optimizer: Any, params: dict[str, Any]) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
        return get_optimizer_state_dict(torch.nn.ParameterDict(params), optimizer, options=options)

    return save


def nadam(groups: Callable[[list[tuple[str, Any]]], Any] = list, **options: Any) -> Callable[..., Any]:
    """Makes ``torch.optim.NAdam`` of groups."""
    return lambda named: torch.optim.NAdam(groups(named), **{"lr": LR, "decoupled_weight_decay": True} | options)


def one_cycle(named: list[tuple[str, Any]]) -> Any:
    """An optimizer whose b1 a scheduler has cycled once."""
    optimizer = nadam()(named)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, 100)
    return optimizer


NAdamW, NAdamLegacy = timm_optimizers()
KINDS: dict[str, Kind] = {
    "named": Kind(nadam()),
    "unnamed": Kind(nadam(unnamed), names=NAMES, order=NAMES),
    "two unnamed groups": Kind(nadam(two_groups), names=GROUPED, order=GROUPED),
    "two groups, L2": Kind(nadam(two_groups, decoupled_weight_decay=False), names=GROUPED, order=GROUPED),
    "layer-wise groups": Kind(nadam(layers)),
    "frozen": Kind(nadam(weight_decay=0.1), frozen=("bias",)),
    "get_optimizer_state_dict": Kind(nadam(two_groups), distributed(flat=False), order=GROUPED),
    "flattened": Kind(nadam(two_groups), distributed(flat=True), order=GROUPED),
    "OneCycleLR": Kind(one_cycle),
    "timm NAdamW": Kind(
        lambda named: NAdamW(two_groups(named), lr=LR, caution=True), names=GROUPED, order=GROUPED, module="timm"
    ),
    "timm NAdamW, layers": Kind(lambda named: NAdamW(layers(named), lr=LR), module="timm"),
    "timm NAdamLegacy": Kind(
        lambda named: NAdamLegacy(two_groups(named), lr=LR), names=GROUPED, order=GROUPED, module="timm"
    ),
}


def through_file(checkpoint: Any) -> Any:
    """A checkpoint as it comes from a file."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def stopped(kind: Kind) -> tuple[Theirs, dict[str, np.ndarray], dict[str, Any], list[dict[str, Any]]]:
    """Their run after some steps, its parameters and checkpoint, and the gradients that follow."""
    params, _ = problem(21, steps=BEFORE + AFTER)
    grads = gradients(kind.frozen)
    theirs = Theirs(params, kind.make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler of OneCycleLR is made, and never stepped
        theirs.run(grads[:BEFORE])
    checkpoint = through_file(kind.save(theirs.optimizer, theirs.params))
    return theirs, theirs.arrays(), checkpoint, grads[BEFORE:]


def there_and_back(kind: Kind) -> tuple[float, float]:
    """The largest difference in units of lr, of a run that we continue, and of one that is continued from ours."""
    theirs, at, checkpoint, grads = stopped(kind)
    options = {"names": kind.names, "weights": at if kind.frozen else None}
    end, state = continued(kind.module, checkpoint, at, grads, **options)
    expected = {name: x[-1] for name, x in theirs.run(grads).items()}
    back = Theirs(expected, kind.make)

    def weights(params: Any) -> Any:
        arrays = from_params(params)
        return [arrays[name] for name in kind.order] if kind.order else arrays

    groups = back.optimizer.state_dict()["param_groups"]
    dump = getattr(compat, kind.module).dump_state
    dumped = dump(
        state, weights, param_groups=groups, params=to_params(at), as_tensor=lambda x: torch.from_numpy(np.array(x))
    )
    back.optimizer.load_state_dict(dumped)
    return distance(end, expected), gap(back.run(grads), theirs.run(grads), LR)


def main() -> None:
    """Prints the two figures of each kind."""
    warnings.simplefilter("ignore")
    for name, kind in KINDS.items():
        print(name, *(f"{x:.1e}" for x in there_and_back(kind)), sep=" | ")


if __name__ == "__main__":
    main()
