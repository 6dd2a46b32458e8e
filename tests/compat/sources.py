"""A tree of params unlike the model of tests/parity/problem.py, and a recorded checkpoint continued with it."""

import dataclasses
import json
import pathlib
import re
import warnings
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import numpy as jnp

from optax_nadam import compat
from tests.parity.problem import SHAPES, problem, program, run

BEFORE, AFTER, LR = 12, 8, 0.01
_ADVICE = re.compile(r"^(.+?) cannot express (\w+)=.*?(dataclasses\.replace\(config, \w+=[^)]*\))", re.DOTALL)
RECORDINGS = pathlib.Path(__file__).parent / "recordings"


def to_params(weights):
    """Another tree than the model's, and a transpose."""
    return {
        "block": {"kernel": weights["kernel"].T, "bias": weights["bias"]},
        "rest": [weights["conv"], weights["scale"]],
    }


def from_params(params):
    """The way back."""
    block, (conv, scale) = params["block"], params["rest"]
    return {"kernel": block["kernel"].T, "bias": block["bias"], "conv": conv, "scale": scale}


def gradients(frozen):
    """The gradients of all steps, None for what is frozen."""
    _, grads = problem(21, steps=BEFORE + AFTER)
    return [{name: None if name in frozen else g for name, g in step.items()} for step in grads]


def continuation(module: str, checkpoint: Any, at: Any, grads: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Our optimizer, params, gradients by step and optimizer state, at a checkpoint."""
    ours = getattr(compat, module)
    tx = ours.from_groups(checkpoint, to_params, **options)
    params = jax.tree.map(jnp.asarray, to_params(at))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what from_groups has warned of
        state = ours.load_state(tx.init(params), checkpoint, to_params, **options)
    filled = [{k: np.zeros(SHAPES[k], np.float32) if g is None else g for k, g in step.items()} for step in grads]
    return tx, params, [to_params(step) for step in filled], state


def continued(*source: Any, **options: Any) -> tuple[dict[str, Any], Any]:
    """The parameters by name some steps after a checkpoint, and the optimizer state there."""
    trajectory, state = run(*continuation(*source, **options))
    return from_params(jax.tree.map(lambda x: x[-1], trajectory)), state


def trajectories(optimizers: dict[Any, Any], params: Any, grads: list[Any]) -> dict[Any, Any]:
    """The parameters after each step of several optimizers, from one program, which compiles faster than several."""
    stacked = jax.tree.map(lambda *g: np.stack(g), *grads)
    names, every = [*optimizers], [program(tx) for tx in optimizers.values()]
    together = jax.jit(lambda params, grads: [steps(params, None, grads)[1] for steps in every])
    return dict(zip(names, jax.device_get(together(params, stacked)), strict=True))


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference of two sets of parameters, in units of the learning rate."""
    return max(float(np.max(np.abs(ours[name] - theirs[name]))) for name in theirs) / LR


def follow_advice(config_to: Any, config: Any) -> list[tuple[str, str]]:
    """The optimizer and the field in each error of ``config_to``, one after the other, as the code in it is run."""
    rejected: list[tuple[str, str]] = []
    while len(rejected) < 5:
        try:
            config_to(config)
            return rejected
        except ValueError as error:
            optimizer, name, code = _ADVICE.findall(str(error))[0]
            rejected.append((optimizer, name))
            config = eval(code, {"dataclasses": dataclasses, "config": config})
    raise AssertionError(f"the advice leads nowhere: {rejected}")


def encode(node: Any, arrays: list[np.ndarray]) -> Any:
    """A checkpoint as JSON, its arrays in a list."""
    if isinstance(node, dict):
        return {"dict": [[key, encode(value, arrays)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [encode(value, arrays) for value in node]}
    if not hasattr(node, "detach"):
        return {"value": node}
    name = str(node.dtype).removeprefix("torch.")
    arrays.append((node.float() if name == "bfloat16" else node).numpy())
    return {"array": len(arrays) - 1, "dtype": name}


def decode(node: Any, arrays: Any) -> Any:
    """The checkpoint that :func:`encode` took."""
    if "dict" in node:
        return {key: decode(value, arrays) for key, value in node["dict"]}
    if "list" in node:
        return [decode(value, arrays) for value in node["list"]]
    if "value" in node:
        return node["value"]
    dtype = ml_dtypes.bfloat16 if node["dtype"] == "bfloat16" else node["dtype"]
    return arrays[str(node["array"])].astype(dtype)


def recorded(name: str) -> dict[str, Any]:
    """Every kind of checkpoint in a recording, with what followed."""
    with np.load(RECORDINGS / f"{name}.npz") as arrays:
        loaded = dict(arrays)
    return {kind: decode(node, loaded) for kind, node in json.loads((RECORDINGS / f"{name}.json").read_text()).items()}
