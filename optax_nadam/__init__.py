"""Nadam for JAX and Optax: every framework's variant, from one exact update."""

from optax_nadam import compat, diagnostics
from optax_nadam._compensated import CompensatedState, compensated, master_params, set_master_params
from optax_nadam._config import NadamConfig
from optax_nadam._load import set_count, set_state
from optax_nadam._nadam import nadam, nadamw, scale_by_nadam
from optax_nadam._rules import Rule, RuleName
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._state import QuantizedNadamState, ScaleByNadamState, convert_moments, get_state
from optax_nadam._wrappers import accumulate, clip_by_global_norm

__version__ = "0.3.0"
__all__ = [
    "CompensatedState",
    "NadamConfig",
    "QuantizedNadamState",
    "Rule",
    "RuleName",
    "ScaleByNadamState",
    "ScheduleConfig",
    "accumulate",
    "clip_by_global_norm",
    "compat",
    "compensated",
    "convert_moments",
    "diagnostics",
    "get_state",
    "master_params",
    "nadam",
    "nadamw",
    "scale_by_nadam",
    "set_count",
    "set_master_params",
    "set_state",
]
