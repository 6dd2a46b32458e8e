"""NadamConfig: every hyperparameter as data, the hub between frameworks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._moments import real_dtype, with_parts
from optax_nadam._nadam import nadam, nadamw


@dataclasses.dataclass(frozen=True, kw_only=True)
class NadamConfig:
    r"""Every hyperparameter of a Nadam, as plain data that survives JSON.

    The optimizer it builds clips gradients by value, then by norm leaf by leaf, then by global norm; adds coupled
    weight decay; takes Nadam's step; adds decoupled weight decay; and multiplies by the learning rate
    :math:`\alpha_t = \alpha / (1 + \text{decay} \cdot (t - 1))`.

    Attributes:
      learning_rate: :math:`\alpha`, a finite number.
      b1: decay of the first moment and limit of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, not negative.
      eps_root: added under the root, not negative.
      momentum_decay: how fast the momentum rises, per step, not negative.
      rule: the dialect, see :func:`optax_nadam.scale_by_nadam`.
      weight_decay: :math:`\lambda`, not negative; 0 for none.
      coupled_weight_decay: True adds :math:`\lambda\theta` to the gradient (L2), False to the update.
      decay: inverse-time decay of the learning rate, per step, not negative.
      clip_value: the largest magnitude of a gradient's element, positive; None for no limit.
      clip_norm: the largest Euclidean norm of a leaf's gradient, positive; None for no limit.
      clip_global_norm: the largest norm of all gradients together, positive; None for no limit.
      m_dtype: ``"float32"``, ``"float64"`` or None, see :func:`optax_nadam.scale_by_nadam`.
      v_dtype: likewise.

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type; arrays and schedules are not plain data.

    Examples:
      >>> import json, optax_nadam
      >>> config = optax_nadam.NadamConfig(learning_rate=2e-3, eps=1e-8, clip_global_norm=1.0)
      >>> stored = json.dumps(config.to_dict())
      >>> optax_nadam.NadamConfig.from_dict(json.loads(stored)) == config
      True
      >>> tx = config.build()
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    eps_root: float = 0.0
    momentum_decay: float = 4e-3
    rule: str = "scheduled"
    weight_decay: float = 0.0
    coupled_weight_decay: bool = False
    decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None
    clip_global_norm: float | None = None
    m_dtype: str | None = None
    v_dtype: str | None = None

    def __post_init__(self) -> None:
        """Checks every field and turns numbers into Python floats."""
        for name, (kind, check) in _FIELDS.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            validation.check_plain(name, value, kind)
            check(name, value)
            object.__setattr__(self, name, kind(value))

    def build(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of these hyperparameters.

        Without clips, coupled weight decay and ``decay`` it is :func:`optax_nadam.nadam`, or
        :func:`optax_nadam.nadamw` where there is decoupled weight decay.
        """
        before: list[optax.GradientTransformation] = []
        if self.clip_value is not None:
            before.append(optax.clip(self.clip_value))
        if self.clip_norm is not None:
            before.append(_clip_by_norm(self.clip_norm))
        if self.clip_global_norm is not None:
            before.append(optax.clip_by_global_norm(self.clip_global_norm))
        if self.coupled_weight_decay and self.weight_decay:
            before.append(optax.add_decayed_weights(self.weight_decay))
        return optax.chain(*before, self._nadam()) if before else self._nadam()

    def _nadam(self) -> optax.GradientTransformationExtraArgs:
        keywords: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("b1", "b2", "eps", "eps_root", "momentum_decay", "rule", "m_dtype", "v_dtype")
        }
        rate = _inverse_time_decay(self.learning_rate, self.decay) if self.decay else self.learning_rate
        if self.weight_decay and not self.coupled_weight_decay:
            return nadamw(rate, weight_decay=self.weight_decay, **keywords)
        return nadam(rate, **keywords)

    def to_dict(self) -> dict[str, float | bool | str | None]:
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
        return cls(**fields)


_FIELDS: dict[str, tuple[type, Callable[[str, Any], object]]] = {
    "learning_rate": (float, validation.check_finite),
    "b1": (float, validation.check_decay),
    "b2": (float, validation.check_decay),
    "eps": (float, validation.check_not_negative),
    "eps_root": (float, validation.check_not_negative),
    "momentum_decay": (float, validation.check_not_negative),
    "rule": (str, validation.check_rule),
    "weight_decay": (float, validation.check_not_negative),
    "coupled_weight_decay": (bool, lambda name, value: None),
    "decay": (float, validation.check_not_negative),
    "clip_value": (float, validation.check_positive),
    "clip_norm": (float, validation.check_positive),
    "clip_global_norm": (float, validation.check_positive),
    "m_dtype": (str, validation.check_moment_dtype),
    "v_dtype": (str, validation.check_moment_dtype),
}


def _inverse_time_decay(learning_rate: float, decay: float) -> optax.Schedule:
    return lambda count: learning_rate / (1 + decay * jnp.asarray(count, float))


def _clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips each leaf by its own norm, which is taken in at least float32."""
    clip = optax.clip_by_global_norm(max_norm)

    def clip_leaf(g: jax.Array) -> jax.Array:
        wide = g.astype(with_parts(real_dtype(g), g))
        clipped, _ = clip.update(wide, clip.init(wide))
        return clipped.astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip_leaf, updates))
