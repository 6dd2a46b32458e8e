"""Nadam for JAX and Optax: every framework's, from one exact update."""

from optax_nadam._compensated import CompensatedState as CompensatedState
from optax_nadam._compensated import compensated as compensated
from optax_nadam._compensated import master_params as master_params
from optax_nadam._config import NadamConfig as NadamConfig
from optax_nadam._convert import convert_moments as convert_moments
from optax_nadam._nadam import ScaleByNadamState as ScaleByNadamState
from optax_nadam._nadam import nadam as nadam
from optax_nadam._nadam import nadamw as nadamw
from optax_nadam._nadam import scale_by_nadam as scale_by_nadam
from optax_nadam._quantized import Quantized as Quantized
from optax_nadam._schedules import Schedule as Schedule

from optax_nadam import compat as compat, diagnostics as diagnostics  # isort: skip  # they need the names above

__version__ = "0.1.0"
