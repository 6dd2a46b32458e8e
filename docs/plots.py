"""The figures of the site, drawn with the library itself while the site is built."""

import functools
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optax_nadam import scale_by_nadam
from optax_nadam._rules import RULES, Hyperparameters, momentum_at

STEPS = 10_000
ELEMENTS = 1024
MOMENTA: dict[str, dict[str, Any]] = {
    "scheduled, ψ = 0.004": {"momentum_decay": 0.004},
    "scheduled, ψ = 1": {"momentum_decay": 1.0},
    "constant": {"rule": "constant"},
}
VARIANTS = MOMENTA | {
    "simplified": {"rule": "simplified"},
    "dozat2016": {"rule": "dozat2016"},
    "loss_scaled, ψ = 1": {"rule": "loss_scaled", "momentum_decay": 1.0},
    "undebiased": {"rule": "undebiased"},
}


def momenta(rule: str = "scheduled", momentum_decay: float = 0.0) -> np.ndarray:
    """The momentum of each step."""
    h = Hyperparameters(0.9, 0.999, 0.0, 0.0, momentum_decay)
    return np.broadcast_to(momentum_at(np.arange(1.0, STEPS + 1), h, RULES[rule]).value, STEPS)


@functools.cache
def step_lengths(noise: bool, **variant: Any) -> np.ndarray:
    """The root mean square of the update at each step, for gradients of ones or of white noise of variance one."""
    tx, key, ones = scale_by_nadam(**variant), jax.random.key(0), jnp.ones(ELEMENTS)

    def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        g = jax.random.normal(jax.random.fold_in(key, t), ones.shape) if noise else ones
        u, state = tx.update(g, state)
        return state, jnp.sqrt(jnp.mean(u**2))

    return np.asarray(jax.lax.scan(step, tx.init(ones), jnp.arange(STEPS))[1])


def draw(axes: Axes, curves: dict[str, np.ndarray], **labels: str) -> None:
    """A line for each curve, over the logarithm of the step."""
    shown = np.unique(np.geomspace(1, STEPS, 400).astype(int))
    for (name, curve), dashes in zip(curves.items(), ("-", "--", "-.", ":", "-", "--", "-."), strict=False):
        axes.plot(shown, curve[shown - 1], dashes, label=name)
    axes.set(xlabel="step t", xscale="log", **labels)
    axes.grid(alpha=0.3)


def legend(figure: Figure, axes: Axes) -> None:
    """A legend below the figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def draw_momenta() -> None:
    """The momentum, and the product of the momenta."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    mu = {name: momenta(**variant) for name, variant in MOMENTA.items()}
    draw(left, mu, title="momentum $\\mu_t$")
    draw(right, {name: np.cumprod(x) for name, x in mu.items()}, title="product $P_t = \\mu_1 \\cdots \\mu_t$")
    right.set(xlim=(1, 200), ylim=(1e-8, 1), yscale="log")
    legend(figure, left)


def draw_step_lengths() -> None:
    """The length of a step of each variant."""
    figure, both = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, noise, title in zip(both, (False, True), ("gradient always 1", "white noise"), strict=True):
        draw(
            axes,
            {name: step_lengths(noise, **variant) for name, variant in VARIANTS.items()},
            title=title,
            yscale="log",
        )
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"], minor=False)
        axes.minorticks_off()
    both[0].set_ylabel("root mean square of $u_t$")
    legend(figure, both[0])
