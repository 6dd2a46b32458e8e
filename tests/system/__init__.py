"""Tests of the package as a part of larger systems: devices, processes, checkpoints, other libraries."""
