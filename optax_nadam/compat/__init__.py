"""Other frameworks' Nadams: their constructors, configs and checkpoints, translated by one module each."""

from optax_nadam.compat import algoperf, keras, optax, timm, torch
from optax_nadam.compat._checkpoint import Checkpoint

__all__ = ["Checkpoint", "algoperf", "keras", "optax", "timm", "torch"]
