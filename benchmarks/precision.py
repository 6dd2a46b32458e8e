"""How exact are one update and a whole run, relative to float64?"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
import optax
from jax import numpy as jnp

import optax_nadam
from benchmarks._report import Answer, Rows, is_quick, row_of, save
from tests.reference import FURTHER_RULES, RULES, Nadam

B2 = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
STEPS = (1, 2, 3, 5, 10, 30, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)


def error(got: Any, expected: Any) -> float:
    """Norm of the error over norm of the value."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


def of_one_update(make: Callable[..., Any], make_state: Callable[..., Any], rule: str, b2: float, t: int) -> float:
    """Error of step t on a leaf of 4096, from moments that a run of t - 1 steps could have left."""
    reference, rng = Nadam(rule, b2=b2), np.random.default_rng(t)
    g, m, v = rng.normal(size=4096), 0.3 * rng.normal(size=4096), rng.random(4096) * (1 - b2 ** (t - 1))
    single = [x.astype(np.float32) for x in (g, m * (t > 1), v)]
    g, m, v = (x.astype(np.float64) for x in single)
    product = reference.mu_product(t - 1)
    state = make_state(jnp.int32(t - 1), jnp.float32(product), *map(jnp.asarray, single[1:]))
    u, _ = jax.jit(make(b2).update)(jnp.asarray(single[0]), state)
    expected, *_ = reference.step(g, m, v, t, product)
    return error(u, np.asarray(expected, np.float64))


def of_a_run(tx: Any, rule: str, b2: float, steps: int = 3000) -> float:
    """Error of the updates of a whole run on noisy gradients with a mean."""
    grads = (np.random.default_rng(0).normal(size=(steps, 256)) + 0.5).astype(np.float32)
    _, u = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.asarray(grads[0])), jnp.asarray(grads))
    expected, *_ = Nadam(rule, b2=b2).updates(grads.astype(np.float64))
    return error(u, expected)


def answer(rows: Rows) -> Answer:
    """The worst of our rules beside Optax's."""
    theirs = float(row_of(rows, "optax.nadam")[1])
    ours = max(float(row[1]) for row in rows if row[0] != "optax.nadam")
    return Answer(
        f"The worst update of any rule is {ours:.1e} off, that of `optax.nadam` {theirs:.1e}.",
        f"1 / {theirs / ours:.0f} of `optax.nadam`",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every rule, and optax.nadam against the rule that it follows."""
    quick = is_quick(__doc__, "two rules, one value of b2, few steps", arguments)
    decays, at = ((0.99,), (1, 10)) if quick else (B2, STEPS)
    rows = []
    subjects: list[tuple[str, str, Callable[..., Any], Callable[..., Any]]] = [
        (
            f"optax_nadam, {rule}",
            rule,
            functools.partial(_ours, cast("optax_nadam.RuleName", rule)),
            optax_nadam.ScaleByNadamState,
        )
        for rule in RULES + FURTHER_RULES
    ]
    subjects.append(
        ("optax.nadam", "constant", _optax, lambda count, product, m, v: optax.ScaleByAdamState(count, m, v))
    )
    for name, rule, make, make_state in subjects[:: len(subjects) - 1] if quick else subjects:
        worst, b2, t = max((of_one_update(make, make_state, rule, b2, t), b2, t) for b2 in decays for t in at)
        runs = [f"{of_a_run(make(b2), rule, b2, steps=30 if quick else 3000):.1e}" for b2 in (0.9, 0.999, 0.99999)]
        rows.append([name, f"{worst:.1e}", f"b2={b2}, t={t}", *runs])
    save(
        "precision",
        "How exact are the updates?",
        ["optimizer", "one update, worst", "at", "run of 3000, b2=.9", "b2=.999", "b2=.99999"],
        rows,
        "Relative error of float32 against float64: of one update of a leaf of 4096 elements, the worst over b2 from .5"
        " to .99999 and t from 1 to 1e7; and of all updates of a run of 3000 steps from zero moments. Target for one"
        " update: 3e-7.",
        answer=answer,
        quick=quick,
    )


def _ours(rule: optax_nadam.RuleName, b2: float) -> Any:
    return optax_nadam.scale_by_nadam(b2=b2, rule=rule)


def _optax(b2: float) -> Any:
    return optax.scale_by_adam(b2=b2, eps=1e-7, nesterov=True)


if __name__ == "__main__":
    main()
