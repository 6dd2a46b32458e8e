"""Records a state as this release stores it, and the step it takes next, for releases to come.

    python tests/recordings/record_state.py

For release 0.1.0 it writes, beside itself, ``state-0.1.0.npz`` with plain arrays by name (params and state after some
steps, the next gradients and their updates) and the versions of all libraries; and the state as Flax
(``state-0.1.0.msgpack``) and Orbax (``state-0.1.0-orbax``) store it. With moments in the narrow formats, all of that is
in ``narrow-0.1.0.msgpack``, as Flax stores it. A recording of a release is never written again.
"""

import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import serialization
from jax import numpy as jnp

import optax_nadam

FOLDER = Path(__file__).resolve().parent
STEPS = 3  # few, so that the product of the momenta still counts
MAX_NORM = 10.0  # not reached: Optax would sum the norm of the bfloat16 leaf in bfloat16
LEARNING_RATE, LEARNING_RATE_STEPS = 0.1, 20
WEIGHT_DECAY = 0.01
NARROW = ("bfloat16", "int8")
LIBRARIES = ("optax_nadam", "jax", "optax", "flax", "orbax-checkpoint", "numpy")


def optimizer(dtype: str | None = None) -> optax.GradientTransformationExtraArgs:
    """Clipping, Nadam with its defaults but for the format of the moments, weight decay and a schedule."""
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, LEARNING_RATE_STEPS)
    nadamw = optax_nadam.nadamw(schedule, weight_decay=WEIGHT_DECAY, m_dtype=dtype, v_dtype=dtype)
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), nadamw)


def initial_params(dtype: str | None = None) -> dict[str, jax.Array]:
    """A leaf of each kind; for narrow moments one that is large enough."""
    if dtype is not None:
        return {"bias": jnp.ones(3), "kernel": jnp.linspace(-8, 8, 32 * 48).reshape(32, 48)}
    x = jnp.linspace(-2, 1, 24)
    return {
        "bias": (x[:8] + 0.1).astype(jnp.bfloat16),
        "kernel": x.reshape(8, 3),
        "phase": (x[:6] + 1j * x[6:12]).astype(jnp.complex64),
    }


def gradients(params: dict[str, jax.Array], step: int) -> dict[str, jax.Array]:
    """Other ones at every step."""
    return jax.tree.map(lambda p: (1 + step) * p / 4 - 0.5, params)


def recorded(dtype: str | None = None) -> dict[str, Any]:
    """Params and state after the steps, the next gradients and their updates."""
    tx, params = optimizer(dtype), initial_params(dtype)
    update = jax.jit(tx.update)
    opt_state = tx.init(params)
    for step in range(STEPS):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
    grads = gradients(params, STEPS)
    return {
        "params": params,
        "opt_state": opt_state,
        "gradients": grads,
        "updates": update(grads, opt_state, params)[0],
    }


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves by their paths; bfloat16, which NumPy's files do not know, as the float32 of the same value."""
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
    return {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in leaves.items()}


def main() -> None:
    """Writes the recordings of the release that is installed."""
    recording, release = recorded(), metadata.version("optax_nadam")
    target = FOLDER / f"state-{release}"
    arrays, msgpack, orbax = (target.with_name(target.name + end) for end in (".npz", ".msgpack", "-orbax"))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", recording["opt_state"])
        checkpointer.wait_until_finished()
        shutil.copytree(Path(folder) / "state", orbax)  # fails where there is one
    msgpack.write_bytes(serialization.to_bytes(recording["opt_state"]))
    versions = [f"{library} {metadata.version(library)}" for library in LIBRARIES]
    np.savez(arrays, versions=versions, **by_name(recording))
    narrow_recording = serialization.to_bytes({dtype: recorded(dtype) for dtype in NARROW})
    (FOLDER / f"narrow-{release}.msgpack").write_bytes(narrow_recording)


if __name__ == "__main__":
    main()
