"""Transformations that some variants need and Optax lacks, most of them around an inner one."""

from typing import Any

import jax
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._leaves import complex_like, compute_dtype


def chain(name: str, *transformations: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain``, with an error that says whose state it got where that is of another chain."""
    chained, length = optax.chain(*transformations), len(transformations)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not isinstance(state, tuple) or len(state) != length:
            got = [type(part).__name__ for part in state] if isinstance(state, tuple) else type(state).__name__
            raise validation.wrong_state(name, str(got), f"{length} states")
        return chained.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chained.init, update)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips each leaf by its own norm, which is taken in at least float32."""
    clip = optax.clip_by_global_norm(max_norm)

    def clip_leaf(g: jax.Array) -> jax.Array:
        wide = g.astype(complex_like(compute_dtype(g), g))
        clipped, _ = clip.update(wide, clip.init(wide))
        return clipped.astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip_leaf, updates))


def cautious(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    r"""Drops the elements of an update that point away from the gradient, and scales up the others, leaf by leaf.

    .. math:: u \leftarrow u \odot M / \max(\operatorname{mean} M, 10^{-3}), \quad M = [u \odot g > 0]

    Source: Liang et al., `Cautious Optimizers <https://arxiv.org/abs/2411.16085>`_, 2024.
    """

    def mask(u: jax.Array, g: jax.Array) -> jax.Array:
        agrees = (u * g > 0).astype(compute_dtype(g))
        return u * (agrees / jnp.maximum(jnp.mean(agrees), 1e-3)).astype(u.dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        u, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(mask, u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clip_by_gradient_rms(
    inner: optax.GradientTransformationExtraArgs, plain: optax.GradientTransformationExtraArgs, threshold: float
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the update of a leaf where the gradient has outgrown its second moment.

    .. math:: u \leftarrow u / \max(1, \operatorname{rms}(g / (\sqrt{\hat v} + \varepsilon)) / \text{threshold})

    Args:
      inner: makes the update.
      plain: the same without momentum, whose update is the normalised gradient; it shares the state of ``inner``.
      threshold: the largest root mean square that changes nothing.

    Returns:
      A transformation with the state of ``inner``.

    Source: Wortsman et al., `Stable and low-precision training <https://arxiv.org/abs/2304.13013>`_, 2023.
    """

    def shrink(u: jax.Array, normalised: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(normalised.astype(compute_dtype(u)))))
        return u / jnp.maximum(1.0, rms / threshold).astype(u.dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        normalised, _ = plain.update(updates, state, params, **extra_args)
        u, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(shrink, u, normalised), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def keep_rows_without_gradient(
    inner: optax.GradientTransformationExtraArgs, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """Does not move rows of chosen leaves while their gradient is zero; their moments decay all the same.

    Args:
      inner: makes the update.
      mask: a tree of booleans like the params, or a prefix of it: which leaves are tables of rows, along axis 0.

    Returns:
      A transformation with the state of ``inner``.
    """

    def keep(chosen: bool, u: Any, g: Any) -> Any:
        if not chosen:
            return u

        def keep_leaf(u: jax.Array, g: jax.Array) -> jax.Array:
            looked_up = jnp.any(g != 0, axis=tuple(range(1, g.ndim)), keepdims=True)
            return jnp.where(looked_up, u, jnp.zeros_like(u))

        return jax.tree.map(keep_leaf, u, g)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        u, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(keep, mask(updates) if callable(mask) else mask, u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
