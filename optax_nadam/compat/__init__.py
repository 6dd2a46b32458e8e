"""Other frameworks' Nadams: their constructors, configs and checkpoints, translated by one module each."""

from optax_nadam.compat import algoperf, optax, timm, torch

__all__ = ["algoperf", "keras", "optax", "timm", "torch"]
