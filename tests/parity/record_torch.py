"""Records what torch's and timm's Nadams do, for the tests that run without them.

    python -m tests.parity.record_torch path/to/nadam.py

The file is ``torch/optim/nadam.py`` of torch 1.13.1, from its wheel; it runs beside the installed torch.
"""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import torch

from optax_nadam.compat._common import as_numpy
from tests.parity.problem import problem

RECORDINGS = pathlib.Path(__file__).parents[1] / "compat" / "recordings"
STEPS, RESUME_AT = 20, 10
# Two groups, so that the checkpoint has another order than the parameters.
GROUPS = (["conv", "kernel"], ["scale", "bias"])

TORCH_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "l2": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)},
    "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 1.0},
    "maximize": {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-3},
}
TORCH1_CASES: dict[str, dict[str, Any]] = {
    "torch1": {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.5},
    "torch1 foreach": {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.5, "foreach": True},
}
NADAMW_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "caution": {"lr": 0.01, "weight_decay": 0.1, "caution": True, "betas": (0.8, 0.99)},
    "corrected": {"lr": 0.01, "weight_decay": 0.1, "corrected_weight_decay": True, "maximize": True},
    "clipped": {"lr": 0.01, "weight_decay": 0, "clipping_threshold": 0.5, "caution": True, "eps": 1e-3},
}
LEGACY_CASES: dict[str, dict[str, Any]] = {"legacy": {"weight_decay": 0.1, "schedule_decay": 0.5}}


@functools.cache
def timm_optimizers():
    """``NAdamW`` and ``NAdamLegacy``, without importing timm, whose package needs torchvision."""
    spec: Any = importlib.util.find_spec("timm")
    (root,) = spec.submodule_search_locations
    for name, path in (("timm", root), ("timm.optim", f"{root}/optim")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules.setdefault(name, package)
    modern, legacy = importlib.import_module("timm.optim.nadamw"), importlib.import_module("timm.optim.nadam")
    return modern.NAdamW, legacy.NAdamLegacy


def torch1_nadam(path):
    """``NAdam`` of torch 1.13 in today's torch."""
    spec: Any = importlib.util.spec_from_file_location("torch.optim.nadam_of_torch_1", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NAdam


class Theirs:
    """Parameters by name, and the optimizer that ``make`` makes of the pairs of name and parameter."""

    def __init__(self, params, make):
        """Makes tensors of arrays."""
        self.params = {name: torch.nn.Parameter(torch.from_numpy(np.array(x))) for name, x in params.items()}
        self.optimizer = make(list(self.params.items()))

    def run(self, grads):
        """The parameters after each step, by name with a leading axis of steps."""
        trajectory = []
        for grad in grads:
            for name, p in self.params.items():
                p.grad = None if grad[name] is None else torch.from_numpy(np.array(grad[name]))
            self.optimizer.step()
            trajectory.append(self.arrays())
        return {name: np.stack([arrays[name] for arrays in trajectory]) for name in self.params}

    def arrays(self):
        """The parameters as arrays."""
        return {name: p.detach().numpy().copy() for name, p in self.params.items()}


def in_groups(make, **options):
    """Makes an optimizer of two groups of named parameters, the second without weight decay."""

    def grouped(named):
        by_name = dict(named)
        first, second = ([(name, by_name[name]) for name in names] for names in GROUPS)
        return make([{"params": first}, {"params": second, "weight_decay": 0.0}], **options)

    return grouped


def plain_groups(optimizer):
    """The parameter groups of a ``state_dict``."""
    return json.loads(json.dumps(optimizer.state_dict()["param_groups"]))


def recorded_case(make, kwargs, params, grads):
    """A trajectory and the group behind it."""
    theirs = Theirs(params, lambda named: make([p for _, p in named], **kwargs))
    group = plain_groups(theirs.optimizer)[0]
    return theirs.run(grads), group


def recorded_checkpoint(make, params, grads):
    """Parameters and checkpoint in mid-run, and the trajectory from there."""
    theirs = Theirs(params, make)
    theirs.run(grads[:RESUME_AT])
    state = {
        f"{i}/{key}": np.array(as_numpy(value))
        for i, entry in theirs.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    at = theirs.arrays()
    return at, state, plain_groups(theirs.optimizer), theirs.run(grads[RESUME_AT:])


def record(name, versions, cases, checkpoints):
    """Writes ``name.npz`` and ``name.json``."""
    params, grads = problem(steps=STEPS)
    arrays = {f"params/{k}": x for k, x in params.items()}
    arrays |= {f"grads/{k}": np.stack([g[k] for g in grads]) for k in params}
    facts = {"versions": versions, "cases": {}}
    for case, (make, kwargs) in cases.items():
        trajectory, group = recorded_case(make, kwargs, params, grads)
        arrays |= {f"cases/{case}/{k}": x for k, x in trajectory.items()}
        facts["cases"][case] = {"kwargs": kwargs, "group": group}
    for checkpoint, make in checkpoints.items():
        at, state, groups, trajectory = recorded_checkpoint(make, params, grads)
        arrays |= {f"{checkpoint}/at/{k}": x for k, x in at.items()}
        arrays |= {f"{checkpoint}/state/{k}": x for k, x in state.items()}
        arrays |= {f"{checkpoint}/then/{k}": x for k, x in trajectory.items()}
        facts[checkpoint] = {"param_groups": groups}
    np.savez_compressed(RECORDINGS / f"{name}.npz", **arrays)
    (RECORDINGS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def versions(*packages):
    """Versions by package."""
    return {package: importlib.metadata.version(package) for package in packages}


def main(path):
    """Records everything."""
    RECORDINGS.mkdir(exist_ok=True)
    old, (modern, legacy) = torch1_nadam(path), timm_optimizers()
    record(
        "torch",
        versions("torch", "numpy") | {"nadam.py of torch1": "1.13.1"},
        {case: (torch.optim.NAdam, kwargs) for case, kwargs in TORCH_CASES.items()}
        | {case: (old, kwargs) for case, kwargs in TORCH1_CASES.items()},
        {
            "checkpoint": in_groups(torch.optim.NAdam, lr=0.01, momentum_decay=0.5),
            "torch1": in_groups(old, lr=0.01, momentum_decay=0.5),
        },
    )
    record(
        "timm",
        versions("timm", "torch", "numpy"),
        {case: (modern, kwargs) for case, kwargs in NADAMW_CASES.items()}
        | {case: (legacy, kwargs) for case, kwargs in LEGACY_CASES.items()},
        {
            "checkpoint": in_groups(modern, lr=0.01, weight_decay=0.0),
            "legacy": in_groups(legacy, lr=0.01, schedule_decay=0.5),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1])
