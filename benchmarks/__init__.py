"""Benchmarks of optax_nadam, one script per question."""
