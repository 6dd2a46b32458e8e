"""Strictness for every test, and the few things that tests share."""

import os

import chex
import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for tests of sharding; all else runs on the first
hypothesis.settings.register_profile("short", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile("long", parent=hypothesis.settings.get_profile("short"), max_examples=2000)
hypothesis.settings.load_profile("short")

STRICT = {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise", "jax_enable_x64": False}


def pytest_addoption(parser):
    """Adds --fail-on-skip."""
    parser.addoption("--fail-on-skip", action="store_true", help="fail when any test was skipped")


def pytest_configure(config):
    """Compiles a program once for all tests, processes and later runs; ``pytest --cache-clear`` forgets them.

    Not on old versions: with jax 0.6.0's cache, a program on a CPU has been seen to give other numbers.
    """
    if jax.__version_info__ < (0, 10):
        return
    programs = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("programs")))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_sessionfinish(session, exitstatus):
    """Fails the run for a skipped test where that was asked for."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a process that reports to another
    asked = reporter and session.config.getoption("--fail-on-skip")
    if asked and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def configuration(request):
    """Strict promotion; ``lenient`` tests call other people's code that needs it lax, ``x64`` ones need float64."""
    wanted = dict(STRICT)
    if request.node.get_closest_marker("lenient"):
        wanted |= {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    if request.node.get_closest_marker("x64"):
        wanted["jax_enable_x64"] = True
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    chex.clear_trace_counter()
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def rng():
    """A generator with a fixed seed."""
    return np.random.default_rng(20261122)
