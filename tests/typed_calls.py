"""What mypy finds in a user's calls; read by mypy alone, which reports an ignored error that is none.

A user's own configuration needs ``follow_untyped_imports`` for ``optax.*``, which has annotations but no ``py.typed``.
"""

from typing import assert_type

import optax

import optax_nadam
from optax_nadam import compat


def right_calls() -> None:
    """The types of what the library returns are known."""
    assert_type(optax_nadam.nadam(1e-3), optax.GradientTransformationExtraArgs)
    assert_type(optax_nadam.NadamConfig().build(), optax.GradientTransformationExtraArgs)
    assert_type(compat.torch.nadam(), optax.GradientTransformationExtraArgs)
    assert_type(optax_nadam.nadam(optax.constant_schedule(1e-3)).init({}), optax.OptState)
    assert_type(optax_nadam.get_state(()), optax_nadam.ScaleByNadamState | optax_nadam.QuantizedNadamState)
    compat.torch.load_state((), compat.torch.read({}), dict)  # what read returns is taken wherever a source is
    compat.timm.load_state((), compat.timm.read({}), dict)
    compat.keras.load_state((), compat.keras.read("model.keras"), dict)


def wrong_calls() -> None:
    """Each of these is an error."""
    optax_nadam.nadam("wrong")  # type: ignore[arg-type]
    optax_nadam.nadam(rule="nesterov")  # type: ignore[arg-type]
    optax_nadam.nadamw(weight_decay="1e-4")  # type: ignore[arg-type]
    optax_nadam.accumulate(1e-3, 4)  # type: ignore[arg-type]
    optax_nadam.NadamConfig(b1="0.9")  # type: ignore[arg-type]
    compat.optax.adamw([1e-3])  # type: ignore[arg-type]
