"""How long does a step take on the shapes of GPT-2 small?"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import interleaved, median_and_spread, milliseconds, save
from tests.reference import RULES


def gpt2_small() -> list[tuple[int, ...]]:
    """The 148 shapes of GPT-2 small, 124 million parameters."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * block), (d,), (d,)]


def compiled_step(tx: Any, shapes: list[tuple[int, ...]]) -> tuple[Callable[[], None], Any]:
    """A call that takes one step on its own donated params and state, and the executable."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = ([jnp.full(shape, x) for shape in shapes] for x in (1.0, 0.1))
    carry = [params, tx.init(params)]
    executable = step.lower(*carry, grads).compile()

    def call() -> None:
        carry[:] = executable(*carry, grads)
        jax.block_until_ready(carry)

    return call, executable


def main() -> None:
    """Measures every rule beside optax.nadam and optax.adam."""
    shapes = gpt2_small()
    size = sum(map(math.prod, shapes))
    optimizers = {f"optax_nadam.nadam, {rule}": optax_nadam.nadam(1e-3, rule=rule) for rule in RULES}
    optimizers |= {"optax.nadam": optax.nadam(1e-3), "optax.adam": optax.adam(1e-3)}
    steps = {name: compiled_step(tx, shapes) for name, tx in optimizers.items()}
    seconds = interleaved({name: call for name, (call, _) in steps.items()}, repeats=25, warmup=3)
    reference = median_and_spread(seconds["optax.nadam"])[0]
    rows = []
    for name, (_, executable) in steps.items():
        memory = executable.memory_analysis()
        rows.append(
            [
                name,
                milliseconds(seconds[name]),
                f"{median_and_spread(seconds[name])[0] / reference:.3f}",
                f"{executable.cost_analysis()['bytes accessed'] / size:.1f}",
                memory.temp_size_in_bytes,
            ]
        )
    save(
        "step_time",
        "How long does a step take on the shapes of GPT-2 small (148 leaves, 124 M float32)?",
        ["optimizer", "step", "over optax.nadam", "bytes accessed a parameter", "temporaries, bytes"],
        rows,
        "Compiled, params and state donated. Target: at most 1.02 of optax.nadam.",
    )


if __name__ == "__main__":
    main()
