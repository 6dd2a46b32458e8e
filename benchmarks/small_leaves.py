"""What is the fastest way to step very many small leaves?"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

import optax_nadam
from benchmarks._report import Answer, Rows, interleaved, is_quick, median_and_spread, milliseconds, save
from benchmarks.tracing import whole_step

TX = optax_nadam.nadamw(1e-3)
FLAT = optax.flatten(TX)
STEPS = 10  # in one call, for the arrangement that takes several
NOTE = """\
A whole step of `nadamw` on a CPU: update, weight decay, learning rate, `apply_updates`; gradients given, compiled,
params and state donated. All arrangements give the same params. "Nothing computed" returns its arrays as they are, with
only the count advanced: nearly all of the time of a step of 1000 leaves is the dispatch of 4000 arguments and 3000
results. So little can be gained within the step, and concatenating, stacking or scanning the leaves there is slower
than the bare step. Fewer arrays from call to call, as under `optax.flatten`, or more steps a call are faster. Flat
params (`jax.flatten_util.ravel_pytree`; the loss takes them through `unravel`, inside the same call) are fastest."""


class Arrangement(NamedTuple):
    """A step, its arguments, and whether the state has the structure of the params."""

    step: Callable[..., Any]
    params: Any
    state: Any
    grads: Any
    like_params: bool
    steps: int = 1


def with_moments(state: Any, rearrange: Callable[[Any], Any]) -> Any:
    """The state of ``TX`` with its moments rearranged."""
    return optax.tree.set(state, m=rearrange(optax.tree.get(state, "m")), v=rearrange(optax.tree.get(state, "v")))


def rearranged(step: Callable[..., Any], there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Callable[..., Any]:
    """A step that is computed on other trees than its arguments and results."""

    def rearranged_step(params: Any, state: Any, grads: Any) -> Any:
        params, state = step(there(params), with_moments(state, there), there(grads))
        return back(params), with_moments(state, back)

    return rearranged_step


def scanned(params: jax.Array, state: Any, grads: jax.Array) -> Any:
    """A step on stacked leaves, one after the other."""

    def leaf(_: None, leaf: tuple[jax.Array, ...]) -> Any:
        p, m, v, g = leaf
        return None, whole_step(TX, apply=True)(p, optax.tree.set(state, m=m, v=v), g)

    stacked = params, optax.tree.get(state, "m"), optax.tree.get(state, "v"), grads
    _, (params, states) = jax.lax.scan(leaf, None, stacked)
    return params, jax.tree.map(
        lambda old, new: new.reshape(-1, *old.shape)[-1] if not old.ndim else new, state, states
    )


def arrangements(number: int) -> dict[str, Arrangement]:
    """All that are compared, on a number of leaves of 64 floats."""
    params = {f"w{i}": jnp.full(64, 1 + i / number) for i in range(number)}
    grads = {f"w{i}": jnp.full(64, 0.1 - i / (5 * number)) for i in range(number)}
    state, (flat_params, unravel) = TX.init(params), ravel_pytree(params)
    flat_state, bare = TX.init(flat_params), whole_step(TX, apply=True)

    def nothing(params: Any, state: Any, grads: Any) -> Any:
        del grads
        return params, optax.tree.set(state, count=optax.tree.get(state, "count") + 1)

    def several(params: Any, state: Any, grads: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (bare(*carry, grads), None), (params, state), length=STEPS)[0]

    def applied_flat(params: Any, state: Any, grads: Any) -> Any:
        params, state = bare(flat(params), state, flat(grads))
        return unravel(params), state

    def flat(tree: Any) -> jax.Array:
        return ravel_pytree(tree)[0]

    def stack(tree: Any) -> jax.Array:
        return jnp.stack(jax.tree.leaves(tree))

    def unstack(array: jax.Array) -> Any:
        return jax.tree.unflatten(jax.tree.structure(params), jnp.unstack(array))

    like = params, state, grads, True
    return {
        "bare": Arrangement(bare, *like),
        "nothing computed": Arrangement(nothing, *like),
        "concatenated in the step": Arrangement(rearranged(bare, flat, unravel), *like),
        "stacked in the step": Arrangement(rearranged(bare, stack, unstack), *like),
        "stacked in the step, `lax.scan`": Arrangement(rearranged(scanned, stack, unstack), *like),
        f"bare, {STEPS} steps a call (`lax.scan`)": Arrangement(several, *like, steps=STEPS),
        "`optax.flatten`": Arrangement(whole_step(FLAT, apply=True), params, FLAT.init(params), grads, False),
        "state flat, params flat in the step": Arrangement(applied_flat, params, flat_state, grads, False),
        "params and state flat": Arrangement(
            lambda params, state, grads: bare(params, state, flat(grads)), flat_params, flat_state, grads, True
        ),
        "params, state and gradients flat": Arrangement(bare, flat_params, flat_state, flat(grads), True),
    }


class Measured(NamedTuple):
    """A compiled arrangement: a call that takes steps, its current params and state, figures of the executable."""

    call: Callable[[], None]
    carry: list[Any]
    arrays: str
    compilation: float
    temporaries: int


def compiled(x: Arrangement) -> Measured:
    """Compiles, and gives the arrangement copies of its params and state, to donate."""
    carry = list(jax.tree.map(jnp.copy, (x.params, x.state)))
    started = time.perf_counter()
    executable: Any = jax.jit(x.step, donate_argnums=(0, 1)).lower(*carry, x.grads).compile()
    seconds = time.perf_counter() - started

    def call() -> None:
        carry[:] = executable(*carry, x.grads)
        jax.block_until_ready(carry)

    results = len(jax.tree.leaves(carry))
    arrays = f"{results + len(jax.tree.leaves(x.grads))} / {results}"
    return Measured(call, carry, arrays, seconds, executable.memory_analysis().temp_size_in_bytes)


def check_same_params(everything: dict[str, Arrangement], ready: dict[str, Measured]) -> None:
    """Raises where an arrangement has other params than the bare step."""
    after = {}
    for name, x in everything.items():
        for _ in range(STEPS // x.steps):
            ready[name].call()
        after[name] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ready[name].carry[0])])
    for name in everything.keys() - {"nothing computed"}:
        np.testing.assert_allclose(after[name], after["bare"], rtol=2e-7, err_msg=name)


def rows(number: int, repeats: int) -> Iterator[list[Any]]:
    """One row for each arrangement."""
    everything = arrangements(number)
    ready = {name: compiled(x) for name, x in everything.items()}
    check_same_params(everything, ready)
    calls = interleaved({name: x.call for name, x in ready.items()}, repeats)
    seconds = {name: [s / everything[name].steps for s in calls[name]] for name in calls}
    bare = median_and_spread(seconds["bare"])[0]
    for name, x in ready.items():
        yield [
            name,
            "yes" if everything[name].like_params else "no",
            x.arrays,
            milliseconds(seconds[name]),
            f"{median_and_spread(seconds[name])[0] / bare:.2f}",
            f"{x.temporaries / (64 * number):.1f}",
            f"{x.compilation:.1f}",
        ]


def answer(rows: Rows) -> Answer:
    """The fastest arrangement."""
    best = min(rows, key=lambda row: float(row[4]))
    return Answer(f"Fastest: {best[0]}. Nearly all of the time is the dispatch of the arrays.", f"{best[4]} of bare")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures 1000 leaves of 64 floats."""
    quick = is_quick(__doc__, "ten leaves, few steps", arguments)
    save(
        "small_leaves",
        "What is the fastest way to step 1000 leaves of 64 floats?",
        [
            "arrangement",
            "state like the params",
            "arrays in / out",
            "step",
            "over bare",
            "temporaries a parameter, bytes",
            "start to compiled, s",
        ],
        list(rows(10, repeats=3) if quick else rows(1000, repeats=25)),
        NOTE,
        answer=answer,
        quick=quick,
    )


if __name__ == "__main__":
    main()
