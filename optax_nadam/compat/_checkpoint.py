"""What a checkpoint of another framework holds, in one record that every reader makes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_nadam._config import NadamConfig
from optax_nadam._schedules import ScheduleConfig
from optax_nadam.compat._common import listed

Label = str | int

_NO_SHAPE = (
    "{labels} never stepped, so that source does not hold the shape of the moments. Pass weights, the model's own"
    " arrays as to_params takes them."
)
_NO_STATE = (
    "parameter groups do not hold the shapes of {labels}, which groups of several kinds need. Pass the whole checkpoint"
    " of a run that took a step, or weights, the model's own arrays as to_params takes them."
)
_SEVERAL_CONFIGS = (
    "the checkpoint has {count} parameter groups with different hyperparameters, and no one config. Build the optimizer"
    " with from_groups(source, to_params), or pass one of the groups to config_from."
)
_NO_CONFIG = (
    "{source} does not hold all hyperparameters. Make a NadamConfig, or pass to config_from what the optimizer itself"
    " tells (get_config() of Keras, param_groups of torch)."
)
_NO_WEIGHTS = (
    "{source} does not tell which of its weights are trainable, and in which order. Load the model with its framework,"
    " and take its trainable parameters; for a directory that torch has written, pass names to read."
)


class Parameter(NamedTuple):
    """What is stored for a parameter that took a step.

    Attributes:
      step: steps taken.
      product: the product of the momenta, or None where it is not stored.
      dtype: the dtype in which the product is stored.
      m: first moment.
      v: second moment.
    """

    step: int
    product: float | None
    dtype: Any
    m: np.ndarray
    v: np.ndarray


class Group(NamedTuple):
    """Parameters with the same hyperparameters.

    Attributes:
      options: the hyperparameters under the framework's own names; empty where they are not stored.
      labels: the parameters.
      schedule: the learning rate as a function of the steps taken, where the source tells it.
    """

    options: Mapping[str, Any]
    labels: tuple[Label, ...]
    schedule: ScheduleConfig | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
    """What the checkpoint of another framework holds of an optimizer; printed, it says so in about ten lines.

    Each module of ``optax_nadam.compat`` makes it with its ``read``, and takes it wherever it takes a source.

    Attributes:
      optimizer: the optimizer that the checkpoint is of.
      version: which releases write such a checkpoint.
      parameters: for each parameter, by name or else by position, the steps and the moments; None where it took no
        step.
      groups: its parameter groups.
      weights: the model's trainable weights, as ``to_params`` takes them, where the checkpoint has them.
      learning_rate: the current one, where it is stored apart from the hyperparameters.
      notes: what such a checkpoint does not tell.
    """

    optimizer: str
    version: str
    parameters: Mapping[Label, Parameter | None]
    groups: tuple[Group, ...]
    parse: Callable[[Mapping[str, Any], Any], NadamConfig] = lambda options, learning_rate: NadamConfig()
    given_weights: Mapping[Label, Any] = dataclasses.field(default_factory=dict)
    stored_weights: Mapping[Label, Any] | None = None
    structure: Any = None
    learning_rate: float | None = None
    unread_schedule: str = ""
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The largest number of steps that a parameter took."""
        return max((p.step for p in self.stepped.values()), default=0)

    @property
    def product(self) -> float | None:
        """The product of the momenta after :attr:`count` steps, or None where it is not stored."""
        return next((p.product for p in self.stepped.values() if p.step == self.count), None)

    @property
    def names(self) -> list[str] | None:
        """The names of the parameters in the optimizer's order; None where they have none."""
        return [str(label) for label in self.parameters] if self.is_named else None

    @property
    def is_named(self) -> bool:
        """Whether ``to_params`` gets arrays by name."""
        return all(isinstance(label, str) for label in self.parameters)

    def configs(self, learning_rates: Sequence[Any] | None = None) -> list[NadamConfig]:
        """The hyperparameters of each group, with a learning rate for each, or with what the checkpoint tells.

        Raises:
          ValueError: they are not stored, or as ``config_from``.
        """
        if any(not group.options for group in self.groups) or not self.groups:
            raise ValueError(_NO_CONFIG.format(source=self.optimizer))
        rates = [group.schedule for group in self.groups] if learning_rates is None else learning_rates
        return [self.parse(group.options, rate) for group, rate in zip(self.groups, rates, strict=True)]

    @property
    def config(self) -> NadamConfig:
        """The hyperparameters, where all groups have the same.

        Raises:
          ValueError: they are not stored, groups differ, or as ``config_from``.
        """
        return self.config_with(None)

    def config_with(self, learning_rate: Any) -> NadamConfig:
        """As :attr:`config`, with a learning rate in place of the checkpoint's; None for that."""
        distinct = set(self.configs(None if learning_rate is None else [learning_rate] * len(self.groups)))
        if len(distinct) > 1:
            raise ValueError(_SEVERAL_CONFIGS.format(count=len(self.groups)))
        return distinct.pop()

    @property
    def schedule(self) -> ScheduleConfig | None:
        """The learning rate of the first group as a function of the steps; None where no schedule is stored.

        Raises:
          ValueError: there is a schedule that cannot be read; the text says what to pass.
        """
        if self.unread_schedule:
            raise ValueError(self.unread_schedule)
        return self.groups[0].schedule if self.groups else None

    @property
    def is_scheduled(self) -> bool:
        """Whether the learning rate of the run changed, as far as the checkpoint tells."""
        return bool(self.unread_schedule) or any(group.schedule is not None for group in self.groups)

    @property
    def weights(self) -> Any:
        """The model's trainable weights, as ``to_params`` takes them.

        Raises:
          ValueError: the checkpoint does not tell them.
        """
        if self.stored_weights is None:
            raise ValueError(_NO_WEIGHTS.format(source=self.optimizer))
        return self.arranged(self.stored_weights)

    @property
    def stepped(self) -> dict[Label, Parameter]:
        """What is stored for the parameters that took a step."""
        return {label: p for label, p in self.parameters.items() if p is not None}

    @property
    def frozen(self) -> list[Label]:
        """The parameters that took no step where others did, and those that the optimizer does not have."""
        untrained = [label for label, p in self.parameters.items() if p is None] if self.stepped else []
        return [*untrained, *(label for label in self.given_weights if label not in self.parameters)]

    @property
    def shapes(self) -> dict[Label, tuple[int, ...]]:
        """The shapes of all parameters, those of the optimizer first.

        Raises:
          ValueError: neither the checkpoint nor the weights have one of them.
        """
        known = {label: tuple(x.shape) for label, x in self.given_weights.items()}
        known |= {label: p.m.shape for label, p in self.stepped.items()}
        unknown = [label for label in self.parameters if label not in known]
        if unknown:
            raise ValueError((_NO_SHAPE if self.stepped else _NO_STATE).format(labels=listed(unknown)))
        return {label: known[label] for label in (dict(self.parameters) | known)}

    @property
    def group_of(self) -> dict[Label, int]:
        """For each parameter the index of its group."""
        return {label: index for index, group in enumerate(self.groups) for label in group.labels}

    def moments(self, name: str) -> dict[Label, np.ndarray]:
        """Copies of the moments ``m`` or ``v`` of all parameters, zero where no step was taken.

        Copies, because torch updates in place what an optimizer's state_dict() shows.
        """
        stepped = {label: np.array(getattr(p, name)) for label, p in self.stepped.items()}
        return {label: stepped.get(label, np.zeros(shape, np.float32)) for label, shape in self.shapes.items()}

    def arranged(self, arrays: Mapping[Label, Any]) -> Any:
        """Arrays, one for each parameter, in the form that ``to_params`` takes: a dict, a list or a tree."""
        if self.structure is not None:
            return jax.tree.unflatten(self.structure, list(arrays.values()))
        return dict(arrays) if self.is_named else list(arrays.values())

    def select(self, labels: Iterable[str | int]) -> "Checkpoint":
        """The checkpoint of some of the parameters, in the order given, for a model that has lost the others.

        Args:
          labels: names, or positions where the parameters have none.

        Returns:
          A checkpoint. Its parameters without names are numbered anew.

        Raises:
          ValueError: the checkpoint has no such parameter, or its moments are in a tree.
        """
        if self.structure is not None:
            raise ValueError("select is for parameters by name or in order; of a tree, pass the part that is wanted.")
        chosen = list(labels)
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"select takes each parameter once, got {listed(chosen)}.")
        unknown = [label for label in chosen if label not in self.parameters]
        if unknown:
            raise ValueError(f"the checkpoint has no parameters {listed(unknown)}; it has {listed(self.parameters)}.")
        new = {label: label if self.is_named else i for i, label in enumerate(chosen)}

        def of(values: Mapping[Label, Any]) -> dict[Label, Any]:
            return {new[label]: values[label] for label in chosen if label in values}

        groups = tuple(g._replace(labels=tuple(new[x] for x in g.labels if x in new)) for g in self.groups)
        stored = None if self.stored_weights is None else of(self.stored_weights)
        return dataclasses.replace(
            self,
            parameters=of(self.parameters),
            groups=tuple(group for group in groups if group.labels),
            given_weights=of(self.given_weights),
            stored_weights=stored,
        )

    def __str__(self) -> str:
        """What the checkpoint holds, a fact a line."""
        return "\n".join(f"{name:<13} {text}".rstrip() for name, text in self._facts())

    __repr__ = __str__

    def _facts(self) -> list[tuple[str, str]]:
        return [
            ("optimizer", f"{self.optimizer} ({self.version})"),
            ("steps", self._steps()),
            ("parameters", f"{len(self.parameters)}, with {_count(self.parameters.values())} numbers"),
            ("names", self._names()),
            *[(f"group {i}", self._group(group)) for i, group in enumerate(self.groups[:4])],
            *([("", f"and {len(self.groups) - 4} more groups")] if len(self.groups) > 4 else []),
            ("learning rate", self._learning_rate()),
            ("product", self._product()),
            ("weights", "in the checkpoint" if self.stored_weights is not None else "not read: take the model's"),
            *[("not stored", note) for note in self.notes],
        ]

    def _steps(self) -> str:
        steps = sorted({p.step for p in self.stepped.values()})
        never = f"; {len(self.parameters) - len(self.stepped)} parameters never stepped" if self.frozen else ""
        return ", ".join(map(str, steps[:6] or [0])) + never

    def _names(self) -> str:
        labels = [str(label) for label in self.parameters]
        return (
            ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "") if self.is_named else "none: a list in order"
        )

    def _group(self, group: Group) -> str:
        numbers = _count(self.parameters[label] for label in group.labels)
        stored = group.options
        while inner := stored.get("config") or stored.get("inner_optimizer"):  # as Keras serializes objects
            stored = inner
        shown = {name: stored[name] for name in _SHOWN if isinstance(stored.get(name), int | float | tuple | list)}
        options = ", ".join(f"{name}={x!r}" for name, x in shown.items()) or "hyperparameters not stored"
        plural = "" if len(group.labels) == 1 else "s"
        return f"{len(group.labels)} parameter{plural}, {numbers} numbers; {options}"

    def _learning_rate(self) -> str:
        if self.unread_schedule:
            return f"a schedule that is not read: {self.unread_schedule}"
        schedules = [group.schedule for group in self.groups]
        if not any(schedules):
            return "no schedule stored" + ("" if self.learning_rate is None else f"; now {self.learning_rate:.6g}")
        return f"{schedules[0]!r}" + (", and one of its own for other groups" if len(set(schedules)) > 1 else "")

    def _product(self) -> str:
        return "computed from steps and hyperparameters" if self.product is None else f"{self.product:.6g}, stored"


_SHOWN = tuple(str.split("lr initial_lr learning_rate weight_decay betas clipnorm global_clipnorm clipvalue"))


def _count(parameters: Iterable[Parameter | None]) -> int:
    return sum(math.prod(p.m.shape) for p in parameters if p is not None)
