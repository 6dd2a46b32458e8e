"""What the frameworks share: names translated, configs built. Nothing here computes."""

import contextlib
import dataclasses
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from optax_nadam._config import NadamConfig
from optax_nadam._rules import Rule, parse_rule
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._state import ScaleByNadamState, convert_moments, get_state

_LEAVE_OUT = "Leave it out, or do it around the optimizer: pass dataclasses.replace(config, {name}={default!r})."
# Where the other side takes a schedule as a function.
SCHEDULE = "Pass config.learning_rate.build() to it, and here pass dataclasses.replace(config, learning_rate=1.0)."


def get_numbers(opt_state: Any) -> ScaleByNadamState:
    """The one Nadam state, its moments as numbers of at least 32 bits, whatever their format."""
    return convert_moments(get_state(opt_state), m_dtype=None, v_dtype=None)


def build(
    learning_rate: Any, names: Mapping[str, str], fields: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a framework's arguments.

    Args:
      learning_rate: a number or a :class:`ScheduleConfig`, which become part of the config; or an array or a schedule.
      names: the framework's name of each field, for the texts of errors.
      fields: the other fields of the config.

    Returns:
      A gradient transformation.
    """
    if isinstance(learning_rate, numbers.Real | ScheduleConfig):
        return config_of(names, {"learning_rate": learning_rate, **fields}).build()
    config = config_of(names, fields)
    with _their_names(names, {}):
        return config.build(learning_rate)


def config_of(names: Mapping[str, str], fields: Mapping[str, Any]) -> NadamConfig:
    """The config of these fields; errors name the arguments as the framework does."""
    with _their_names(names, fields):
        return NadamConfig(**fields)


@contextlib.contextmanager
def _their_names(names: Mapping[str, str], fields: Mapping[str, Any]) -> Iterator[None]:
    """Errors that begin with the name of a field begin with the framework's name of it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name, _, text = str(error).partition(" ")
        theirs = names.get(name, name)
        if isinstance(fields.get(name), jax.Array):
            text += f" Under optax.inject_hyperparams, name it in static_args=({theirs!r}, ...)."
        raise type(error)(f"{theirs} {text}") from None


def check_keys(what: str, got: Iterable[str], known: Collection[str], required: Iterable[str] = ()) -> None:
    """Rejects a mapping with a key that a translator does not know, or without one that it needs."""
    missing, unknown = [key for key in required if key not in got], sorted(set(got) - set(known))
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; it has {', '.join(sorted(got))}.")
    if unknown:
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def cannot_express(side: str, name: str, value: Any, advice: str) -> ValueError:
    """The error for an option that changes numbers and that one side lacks."""
    return ValueError(f"{side} cannot express {name}={value!r}. {advice}")


def check_expressible(config: NadamConfig, side: str, expressible: Collection[str]) -> None:
    """Rejects a config with a field that another framework lacks and that is not at its default.

    Args:
      config: the config.
      side: the framework.
      expressible: names of the fields that it has.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # Without accumulation, which has a field of its own, it does not matter what a schedule counts.
        if field.name not in (*expressible, "schedule_counts_gradients") and value != field.default:
            advice = _LEAVE_OUT.format(name=field.name, default=field.default)
            raise cannot_express(side, field.name, value, advice)


def rule_of(config: NadamConfig) -> Rule:
    """The rule of a config, whether it holds the rule or its name."""
    return parse_rule("rule", config.rule)


def as_numpy(array: Any) -> np.ndarray:
    """An array of any framework in NumPy; torch's bfloat16 becomes float32."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            array = array.float()
    return np.asarray(array)


def as_number(value: Any) -> Any:
    """A hyperparameter as a Python number where it is a tensor or an array of one element; another value as it is."""
    return as_numpy(value).item() if hasattr(value, "detach") or isinstance(value, np.ndarray) else value


def without(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A mapping without some of its names."""
    left_out = set(names)
    return {name: value for name, value in mapping.items() if name not in left_out}


def listed(labels: Collection[Any]) -> str:
    """Some labels for the text of an error."""
    shown = ", ".join(map(repr, list(labels)[:5]))
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"
