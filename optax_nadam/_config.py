"""NadamConfig: every hyperparameter as data, the hub between frameworks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax

from optax_nadam import _links as links
from optax_nadam import _validation as validation
from optax_nadam._nadam import scale_by_nadam
from optax_nadam._rules import Rule
from optax_nadam._schedules import Schedule, inverse_time_decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class NadamConfig:
    r"""Every hyperparameter of a Nadam, as plain data that survives JSON.

    The optimizer it builds turns the gradient round to ascend; clips it by value, then by norm leaf by leaf, then by
    global norm; adds coupled weight decay; takes Nadam's step; shrinks it, drops what the gradient disagrees with;
    adds decoupled weight decay; and multiplies by the learning rate
    :math:`\alpha_t = \alpha / (1 + \text{decay} \cdot (t - 1))`. What is left at its default is left out.

    Attributes:
      learning_rate: :math:`\alpha`, a finite number, or a :class:`Schedule`.
      b1: decay of the first moment and limit of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the dialect, see :func:`optax_nadam.scale_by_nadam`.
      weight_decay: :math:`\lambda`, not negative; 0 for none.
      coupled_weight_decay: True adds :math:`\lambda\theta` to the gradient (L2), False to the update.
      max_learning_rate: with it, decoupled weight decay is :math:`\lambda \alpha_t / \alpha_{max}`, so that it falls
        with the square of the learning rate; positive; None for :math:`\lambda`.
      decay: inverse-time decay of the learning rate, per step, not negative; only beside a number.
      clip_value: the largest magnitude of a gradient's element, positive; None for no limit.
      clip_norm: the largest Euclidean norm of a leaf's gradient, positive; None for no limit.
      clip_global_norm: the largest norm of all gradients together, positive; None for no limit.
      clip_update_rms: the largest root mean square of :math:`g / (\sqrt{\hat v} + \varepsilon)` in a leaf that does
        not shrink the update, positive; None for no limit.
      caution: drop elements of the update that point away from the gradient.
      maximize: ascend.
      complex_as_real: treat a complex leaf as two real ones.
      accumulate_steps: gradients that are averaged for one step, at least 1.
      m_dtype: ``"int8"``, ``"bfloat16"``, ``"float32"``, ``"float64"`` or None, see :func:`optax_nadam.scale_by_nadam`.
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

    learning_rate: float | Schedule = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    eps_root: float = 0.0
    momentum_decay: float = 4e-3
    rule: str | Rule = "scheduled"
    weight_decay: float = 0.0
    coupled_weight_decay: bool = False
    max_learning_rate: float | None = None
    decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None
    clip_global_norm: float | None = None
    clip_update_rms: float | None = None
    caution: bool = False
    maximize: bool = False
    complex_as_real: bool = False
    accumulate_steps: int = 1
    m_dtype: str | None = None
    v_dtype: str | None = None

    def __post_init__(self) -> None:
        """Checks every field and turns numbers into Python floats."""
        for name, (kind, check) in _FIELDS.items():
            value = getattr(self, name)
            if (value is None and getattr(type(self), name) is None) or isinstance(value, Rule | Schedule):
                continue
            validation.check_plain(name, value, kind)
            check(name, value)
            object.__setattr__(self, name, kind(value))
        if self.decay and isinstance(self.learning_rate, Schedule):
            raise ValueError(f"decay must be 0 beside a schedule, got {self.decay!r}.")

    def build(self, learning_rate: optax.ScalarOrSchedule | None = None) -> optax.GradientTransformationExtraArgs:
        """The optimizer of these hyperparameters.

        Args:
          learning_rate: a number, an array or a schedule in place of the config's own and its ``decay``.

        Where only the fields of :func:`optax_nadam.nadam` or :func:`optax_nadam.nadamw` are set, its state is that of
        those, so that a checkpoint of one fits the other.
        """
        rate = self._rate() if learning_rate is None else learning_rate
        validation.check_learning_rate(rate)
        decoupled = self.weight_decay and not self.coupled_weight_decay
        chain = [
            optax.scale(-1.0) if self.maximize else None,
            optax.clip(self.clip_value) if self.clip_value is not None else None,
            links.clip_by_norm(self.clip_norm) if self.clip_norm is not None else None,
            optax.clip_by_global_norm(self.clip_global_norm) if self.clip_global_norm is not None else None,
            optax.add_decayed_weights(self.weight_decay) if self.coupled_weight_decay and self.weight_decay else None,
            self._step(),
            optax.add_decayed_weights(self._decay_rate(rate)) if decoupled else None,
            optax.scale_by_learning_rate(rate),
        ]
        tx = optax.chain(*[link for link in chain if link is not None])
        if self.complex_as_real:
            tx = optax.with_extra_args_support(optax.contrib.split_real_and_imaginary(tx))
        if self.accumulate_steps > 1:
            tx = optax.with_extra_args_support(optax.MultiSteps(tx, self.accumulate_steps).gradient_transformation())
        return tx

    def _rate(self) -> optax.ScalarOrSchedule:
        if isinstance(self.learning_rate, Schedule):
            schedule, k = self.learning_rate.build(), self.accumulate_steps
            # A schedule counts gradients: step n comes with gradient number n k + (k - 1).
            return schedule if k == 1 else lambda count: schedule(count * k + (k - 1))
        return inverse_time_decay(self.learning_rate, 1.0, self.decay) if self.decay else self.learning_rate

    def _decay_rate(self, rate: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        if self.max_learning_rate is None:
            return self.weight_decay
        factor = self.weight_decay / self.max_learning_rate
        return (lambda count: factor * rate(count)) if callable(rate) else factor * rate

    def _step(self) -> optax.GradientTransformationExtraArgs:
        names = ("b1", "b2", "eps", "eps_root", "momentum_decay", "rule", "m_dtype", "v_dtype")
        make = functools.partial(scale_by_nadam, **{name: getattr(self, name) for name in names})
        tx = make()
        if self.clip_update_rms is not None:
            tx = links.clip_by_gradient_rms(tx, make(b1=0.0), self.clip_update_rms)
        return links.cautious(tx) if self.caution else tx

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
        validation.check_names("NadamConfig", fields, _FIELDS)
        records = {name: _NESTED[name](**fields[name]) for name in _NESTED if isinstance(fields[name], Mapping)}
        return cls(**{**fields, **records})


_NESTED: dict[str, Callable[..., Any]] = {"learning_rate": Schedule, "rule": Rule}

_FIELDS: dict[str, tuple[type, Callable[[str, Any], object]]] = {
    "learning_rate": (float, validation.check_finite),
    "b1": (float, validation.check_decay),
    "b2": (float, validation.check_decay),
    "eps": (float, validation.check_not_negative),
    "eps_root": (float, validation.check_not_negative),
    "momentum_decay": (float, validation.check_not_negative),
    "rule": (str, validation.check_rule),
    "weight_decay": (float, validation.check_not_negative),
    "coupled_weight_decay": (bool, validation.accept),
    "max_learning_rate": (float, validation.check_positive),
    "decay": (float, validation.check_not_negative),
    "clip_value": (float, validation.check_positive),
    "clip_norm": (float, validation.check_positive),
    "clip_global_norm": (float, validation.check_positive),
    "clip_update_rms": (float, validation.check_positive),
    "caution": (bool, validation.accept),
    "maximize": (bool, validation.accept),
    "complex_as_real": (bool, validation.accept),
    "accumulate_steps": (int, validation.check_positive),
    "m_dtype": (str, validation.check_moment_dtype),
    "v_dtype": (str, validation.check_moment_dtype),
}
