"""The project: docs, examples, benchmarks, versions."""
