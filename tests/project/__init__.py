"""Tests of what stands around the package: pages, examples, benchmarks, versions."""
