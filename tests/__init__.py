"""Tests of optax_nadam; ``reference.py`` is the oracle."""
