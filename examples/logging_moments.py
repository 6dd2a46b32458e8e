"""Logging momentum, moments and the length of a step, as scalars for any logger and in a picture."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _shared import arguments, digits_in_batches, initial_params, loss_of, report
from matplotlib.figure import Figure

import optax_nadam

PANELS = {
    "loss": ["loss"],
    "momentum": ["mu"],
    "length of the step": ["update_rms", "momentum_rms"],
    "moments": ["m_norm", "root_v_norm"],
    "m, layer by layer": ["m_norm/hidden", "m_norm/last"],
}


def draw(log: dict[str, np.ndarray], path: Path) -> None:
    """A panel for each kind of scalar."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 5, sharex=True), PANELS.items(), strict=True):
        for name in names:
            axes.plot(log[name], lw=1, label=name)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> dict[str, np.ndarray]:
    """Trains on the digits; returns each scalar over the steps."""
    chosen = arguments(__doc__, steps=300, out="out/moments.png")
    config, params = optax_nadam.NadamConfig(), initial_params(chosen.seed)
    tx = optax.chain(
        optax_nadam.scale_by_nadam(),
        optax.snapshot("update_rms", optax_nadam.diagnostics.rms),
        optax.scale_by_learning_rate(3e-3),
    )

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        layers = optax.tree.get(state, "m")  # any other part of the state can be logged too
        norms = {f"m_norm/{name}": optax.tree.norm(layer) for name, layer in layers.items()}
        shown = {"loss": loss} | norms | optax_nadam.diagnostics.scalars(state, config)
        return optax.apply_updates(params, updates), state, shown

    state, lines = tx.init(params), []
    for images, labels in digits_in_batches(chosen.steps, chosen.seed):
        params, state, shown = step(params, state, images, labels)
        lines.append(jax.device_get(shown))
    log = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    draw(log, chosen.out)
    report(list(log["loss"]))
    print(", ".join(f"{name} {values[-1]:.4f}" for name, values in log.items()))
    print(f"the whole run in {chosen.out}")
    return log


if __name__ == "__main__":
    main()
