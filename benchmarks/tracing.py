"""What do tracing a step and calling it outside jit cost?"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import interleaved, median_and_spread, milliseconds, save

PAIRS: dict[str, tuple[Any, Any]] = {
    "nadamw, whole step": (optax_nadam.nadamw(1e-3), optax.nadamw(1e-3)),
    "scale_by_nadam": (optax_nadam.scale_by_nadam(), optax.scale_by_adam(nesterov=True)),
}


def whole_step(tx: Any, apply: bool) -> Callable[..., Any]:
    """Update, and apply the update where that is asked for."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates) if apply else updates), state

    return step


def _trace(step: Callable[..., Any], state: Any, params: Any) -> None:
    jax.clear_caches()
    jax.jit(step).trace(params, state, params)


def _call(tx: Any, state: Any, params: Any) -> None:
    jax.block_until_ready(tx.update(params, state, params))


def main() -> None:
    """Measures both pairs on trees of 148 and of 1000 leaves of 64 floats."""
    rows = []
    for what, pair in PAIRS.items():
        for number in (148, 1000):
            params = {f"w{i}": jnp.ones(64) for i in range(number)}
            equations: list[int] = []
            traces: dict[str, Callable[[], None]] = {}
            calls: dict[str, Callable[[], None]] = {}
            for name, tx in zip(("ours", "optax"), pair, strict=True):
                state, step = tx.init(params), whole_step(tx, "whole" in what)
                larger = params | {"one more": jnp.ones(64)}
                counts = [len(jax.make_jaxpr(step)(p, tx.init(p), p).eqns) for p in (params, larger)]
                equations.append(counts[1] - counts[0])

                traces[name] = functools.partial(_trace, step, state, params)
                calls[name] = functools.partial(_call, tx, state, params)
            traced = interleaved(traces, repeats=11)
            called = interleaved(calls, repeats=21, warmup=3)
            for kind, seconds in (("trace", traced), ("eager update", called)):
                ours, theirs = (median_and_spread(seconds[name])[0] for name in ("ours", "optax"))
                times = [milliseconds(seconds[name]) for name in ("ours", "optax")]
                rows.append([what, number, f"{equations[0]} / {equations[1]}", kind, *times, f"{ours / theirs:.2f}"])
    save(
        "tracing",
        "What do tracing a step and calling `update` outside jit cost?",
        ["what", "leaves", "equations a leaf, ours / optax", "measured", "ours", "optax", "ratio"],
        rows,
        "The whole step is update, weight decay, learning rate and apply_updates; the eager call leaves apply_updates"
        " out. Target: a ratio of 0.2. Weight decay, learning rate and apply_updates are Optax's own links in both.",
    )


if __name__ == "__main__":
    main()
