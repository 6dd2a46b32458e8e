"""NadamConfig: every hyperparameter as data, the common form of all frameworks' configs."""

import dataclasses
import functools
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, TypeVar

import optax

from optax_nadam import _validation as validation
from optax_nadam import _wrappers as wrappers
from optax_nadam._moments import parse_format
from optax_nadam._nadam import scale_by
from optax_nadam._rules import Hyperparameters, Rule, RuleName, mu_product_after, parse_rule
from optax_nadam._schedules import ScheduleConfig, parse_learning_rate

_TINY = 2.0**-126  # the smallest normal float32
_T = TypeVar("_T")
_Parse = Callable[[str, Any], _T]  # takes the field's name and value


def _number(check: Callable[[str, Any], None]) -> _Parse[float]:
    """Parses a number, Python's or NumPy's, into a Python float."""

    def parse(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        check(name, value)
        return float(value)

    return parse


def _optional(parse: _Parse[_T]) -> _Parse[_T | None]:
    """Parses None, or what another parser accepts."""
    return lambda name, value: None if value is None else parse(name, value)


def _bool(name: str, value: Any) -> bool:
    validation.check_bool(name, value)
    return value


def _learning_rate(name: str, value: Any) -> float | ScheduleConfig:
    return value if isinstance(value, ScheduleConfig) else _number(validation.check_finite)(name, value)


def _rule(name: str, value: Any) -> str | Rule:
    parse_rule(name, value)
    return value


def _formats(name: str, value: Any) -> Any:
    """Parses a format, or a tree of formats in dicts and lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _formats(f"{name}[{key!r}]", x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_formats(f"{name}[{i}]", x) for i, x in enumerate(value)]
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, None, or a dict or list of such, got {value!r}.")
    parse_format(name, value)
    return value


_decay = _number(validation.check_decay)
_not_negative = _number(validation.check_not_negative)
_positive = _number(validation.check_positive)


def _by(parse: _Parse[Any]) -> dict[str, _Parse[Any]]:
    """The metadata of a field that this function parses."""
    return {"parse": parse}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NadamConfig:
    r"""Every hyperparameter of a Nadam, as plain data: hashable, and JSON both ways.

    The optimizer it builds negates the gradient to ascend; clips it by value, then leaf by leaf by norm, then by
    global norm; adds coupled weight decay; takes Nadam's step; scales it down where the gradient is large; drops
    elements that point away from the gradient; adds decoupled weight decay; and multiplies by the learning rate. Parts
    at their defaults are left out.

    Attributes:
      learning_rate: :math:`\alpha`, a finite number, or a :class:`ScheduleConfig`.
      b1: decay of the first moment and limit of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the variant, see :func:`optax_nadam.scale_by_nadam`.
      weight_decay: :math:`\lambda`, not negative; 0 for no decay.
      coupled_weight_decay: True adds :math:`\lambda\theta` to the gradient (L2), False to the update.
      weight_decay_peak_learning_rate: :math:`\alpha_{peak}`, positive. With it, decoupled weight decay is
        :math:`\lambda \alpha_t / \alpha_{peak}` in place of :math:`\lambda`, so that it falls with the square of the
        learning rate after its peak; it does not limit the learning rate. None for :math:`\lambda`.
      clip_value: the largest magnitude of a gradient's element, positive; None for no limit.
      clip_norm: the largest Euclidean norm of a leaf's gradient, positive; None for no limit.
      clip_global_norm: the largest norm of all gradients together, positive; None for no limit.
      clip_by_gradient_rms: the largest root mean square of :math:`g / (\sqrt{\hat v} + \varepsilon)` in a leaf, above
        which its update is scaled down, positive; None for no limit.
      cautious: drop elements of the update that point away from the gradient.
      maximize: ascend, for an objective to maximize.
      complex_as_real: treat a complex leaf as two real ones.
      accumulate_steps: gradients that are averaged for one step, at least 1.
      schedule_counts_gradients: a learning rate schedule, the config's or that given to :meth:`build`, is a function of
        the gradients seen, ``accumulate_steps`` for each step, as in Keras; otherwise of the steps taken.
      m_dtype: ``"int8"``, ``"bfloat16"``, ``"float32"``, ``"float64"`` or None, or a tree of such in dicts and lists,
        see :func:`optax_nadam.scale_by_nadam`; a function of the path is not data.
      v_dtype: likewise.

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type; arrays and functions are not plain data.

    Examples:
      >>> import json, optax_nadam
      >>> config = optax_nadam.NadamConfig(learning_rate=2e-3, eps=1e-8, clip_global_norm=1.0)
      >>> stored = json.dumps(config.to_dict())
      >>> optax_nadam.NadamConfig.from_dict(json.loads(stored)) == config
      True
      >>> tx = config.build()
    """

    learning_rate: float | ScheduleConfig = field(default=1e-3, metadata=_by(_learning_rate))
    b1: float = field(default=0.9, metadata=_by(_decay))
    b2: float = field(default=0.999, metadata=_by(_decay))
    eps: float = field(default=1e-7, metadata=_by(_not_negative))
    eps_root: float = field(default=0.0, metadata=_by(_not_negative))
    momentum_decay: float = field(default=4e-3, metadata=_by(_not_negative))
    rule: RuleName | Rule = field(default="scheduled", metadata=_by(_rule))
    weight_decay: float = field(default=0.0, metadata=_by(_not_negative))
    coupled_weight_decay: bool = field(default=False, metadata=_by(_bool))
    weight_decay_peak_learning_rate: float | None = field(default=None, metadata=_by(_optional(_positive)))
    clip_value: float | None = field(default=None, metadata=_by(_optional(_positive)))
    clip_norm: float | None = field(default=None, metadata=_by(_optional(_positive)))
    clip_global_norm: float | None = field(default=None, metadata=_by(_optional(_positive)))
    clip_by_gradient_rms: float | None = field(default=None, metadata=_by(_optional(_positive)))
    cautious: bool = field(default=False, metadata=_by(_bool))
    maximize: bool = field(default=False, metadata=_by(_bool))
    complex_as_real: bool = field(default=False, metadata=_by(_bool))
    accumulate_steps: int = field(default=1, metadata=_by(validation.parse_positive_int))
    schedule_counts_gradients: bool = field(default=False, metadata=_by(_bool))
    m_dtype: Any = field(default=None, metadata=_by(_formats))
    v_dtype: Any = field(default=None, metadata=_by(_formats))

    def __post_init__(self) -> None:
        """Parses every field."""
        for entry in dataclasses.fields(self):
            value = entry.metadata["parse"](entry.name, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)

    def __hash__(self) -> int:
        """Equal for equal configs."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        formats = json.dumps([values.pop("m_dtype"), values.pop("v_dtype")], sort_keys=True)  # may be dicts
        return hash((formats, *values.values()))

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule | None = None,
        *,
        mask: Any | Callable[[optax.Params], Any] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of these hyperparameters.

        Where only the fields of :func:`optax_nadam.nadam` or :func:`optax_nadam.nadamw` are set, its state is that of
        those, so that their checkpoints are interchangeable.

        Args:
          learning_rate: a number, a scalar array or a schedule in place of the config's own.
          mask: a tree of booleans like the params, a prefix of it, or a function from params to one: the leaves that
            have weight decay. None for all.

        Returns:
          A gradient transformation. Its ``update`` needs ``params`` where there is weight decay.

        Raises:
          ValueError: a learning rate that is not finite or not a scalar; a mask without weight decay.
          TypeError: a learning rate that is none of the above.

        Examples:
          >>> import optax, optax_nadam
          >>> config = optax_nadam.NadamConfig(weight_decay=0.1, clip_global_norm=1.0, accumulate_steps=4)
          >>> tx = config.build(optax.cosine_decay_schedule(1e-3, 1000), mask={"kernel": True, "bias": False})
        """
        if mask is not None and not self.weight_decay:
            raise ValueError("mask chooses the leaves that have weight decay, but weight_decay is 0.")
        return build_with_masks(self, [(self.weight_decay, mask)], learning_rate)

    def _schedule_or_number(self, learning_rate: Any) -> optax.ScalarOrSchedule:
        """The learning rate, a schedule as a function of the steps taken."""
        alpha, k = parse_learning_rate(learning_rate), self.accumulate_steps
        if not callable(alpha) or not self.schedule_counts_gradients:
            return alpha
        return lambda count: alpha(count * k + (k - 1))  # step n comes with gradient number n k + (k - 1)

    def _decay(self, weight_decay: float, learning_rate: Any) -> Any:
        """The weight decay as a factor of the params in the gradient or in the update."""
        if self.coupled_weight_decay or self.weight_decay_peak_learning_rate is None:
            return weight_decay
        factor = weight_decay / self.weight_decay_peak_learning_rate
        return (lambda count: factor * learning_rate(count)) if callable(learning_rate) else factor * learning_rate

    def _step(self) -> optax.GradientTransformationExtraArgs:
        rule = parse_rule("rule", self.rule)
        h = Hyperparameters(*(getattr(self, name) for name in Hyperparameters._fields))
        make = functools.partial(scale_by, rule, m_dtype=self.m_dtype, v_dtype=self.v_dtype)
        tx = make(h, power=rule.power)
        if self.clip_by_gradient_rms is not None:
            # The roots differ by less than is ever seen: two equal ones are computed once and stored by XLA:CPU.
            normalise = make(h._replace(b1=0.0, eps_root=self.eps_root + _TINY), power=rule.power)
            tx = wrappers.clip_by_gradient_rms(tx, normalise, self.clip_by_gradient_rms)
        if self.cautious:
            tx = wrappers.cautious(tx, make(h, power=0.0))
        return tx

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "NadamConfig":
        """The config that :meth:`to_dict` wrote.

        Raises:
          ValueError: a field is missing or unknown, named in the text; or as the class.
          TypeError: as the class.
        """
        records: dict[str, Any] = {"learning_rate": ScheduleConfig, "rule": Rule}
        nested = {
            name: _from_fields(kind, fields[name])
            for name, kind in records.items()
            if isinstance(fields.get(name), Mapping)
        }
        return _from_fields(cls, {**fields, **nested})


def _from_fields(kind: Any, fields: Mapping[str, Any]) -> Any:
    """A dataclass from all of its fields by name."""
    validation.check_names(kind.__name__, fields, [entry.name for entry in dataclasses.fields(kind)])
    return kind(**fields)


def build_with_masks(
    config: NadamConfig,
    decays: Sequence[tuple[float, Any]],
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config with several weight decays in place of its own, each with a mask as in ``nadamw``."""
    alpha = config._schedule_or_number(config.learning_rate if learning_rate is None else learning_rate)
    decay = [optax.add_decayed_weights(config._decay(x, alpha), mask) for x, mask in decays if x]
    parts = [
        optax.scale(-1.0) if config.maximize else None,
        optax.clip(config.clip_value) if config.clip_value is not None else None,
        wrappers.clip_by_norm(config.clip_norm) if config.clip_norm is not None else None,
        wrappers.clip_by_global_norm(config.clip_global_norm) if config.clip_global_norm is not None else None,
        *(decay if config.coupled_weight_decay else ()),
        config._step(),
        *(() if config.coupled_weight_decay else decay),
        optax.scale_by_learning_rate(alpha),
    ]
    tx = optax.chain(*[part for part in parts if part is not None])
    if config.complex_as_real:
        tx = wrappers.split_real_and_imaginary(tx)
    return tx if config.accumulate_steps == 1 else wrappers.accumulate(tx, config.accumulate_steps)


def product_after(count: int, config: NadamConfig) -> float:
    """The product of the momenta after a number of steps."""
    return mu_product_after(count, config.b1, config.momentum_decay, parse_rule("rule", config.rule))
