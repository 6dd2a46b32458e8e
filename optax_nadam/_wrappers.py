"""Transformations that some variants need and Optax does not have; most wrap an inner one."""

import functools
from typing import Any

import jax
import optax
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation
from optax_nadam._leaves import abs_squared, complex_like, compute_dtype, is_complex, zeros_like
from optax_nadam._tree import by_name, by_names_of, is_pair


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    r"""Clips gradients by their global norm, as ``optax.clip_by_global_norm``, but exact in every dtype.

    .. math:: g \leftarrow g \cdot \min(1, c / \lVert g \rVert), \quad \lVert g \rVert^2 = \sum |g_i|^2

    over the elements of all leaves. The norm is computed in float32, or float64 where a leaf has 64-bit parts, and
    applied as one scalar factor, so the gradients are read once more and no array of their size is stored. Optax
    computes the norm in the dtype of the gradients: in float16 it overflows above 65504, in bfloat16 it stops growing
    after some hundred leaves of equal norm.

    Args:
      max_norm: :math:`c`, the largest norm, positive; a number or a scalar array.

    Returns:
      A gradient transformation without state, whose updates have the dtypes of the gradients.

    Raises:
      ValueError: a number that is not positive and finite, or an array that is not a scalar.
      TypeError: a ``max_norm`` that is neither a number nor an array.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax.chain(optax_nadam.clip_by_global_norm(1.0), optax_nadam.nadamw(1e-3))
      >>> clip = optax_nadam.clip_by_global_norm(1.0)
      >>> clipped, _ = clip.update(jnp.full(1000, 10.0, jnp.float16), clip.init(None))
      >>> clipped[0].item()  # 1 / sqrt(1000), as float16
      0.0316162109375

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    validation.check_positive("max_norm", max_norm)
    return optax.stateless(lambda updates, params: _clipped(updates, max_norm))


def clip_by_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Clips each leaf by its own norm, as :func:`clip_by_global_norm` clips all leaves together."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda g: _clipped(g, max_norm), updates))


def _clipped(updates: Any, max_norm: ArrayLike) -> Any:
    """The updates, scaled so that their norm is at most the given one."""
    leaves = jax.tree.leaves(updates)
    dtype = compute_dtype(*leaves)
    squares = (jnp.sum(abs_squared(g.astype(complex_like(dtype, g)))) for g in leaves)
    norm = jnp.sqrt(sum(squares, jnp.zeros((), dtype)))
    limit = jnp.asarray(max_norm, dtype)
    factor = jnp.where(norm < limit, 1, limit / norm)
    return jax.tree.map(lambda g: (_widened(g) * factor.astype(_widened(g).dtype)).astype(g.dtype), updates)


def _widened(x: jax.Array) -> jax.Array:
    """An array in the dtype to compute in."""
    return x.astype(complex_like(compute_dtype(x), x))


def accumulate(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step of an optimizer with the mean gradient of several calls, as ``optax.MultiSteps``.

    .. math:: \bar g \leftarrow \bar g + (g_i - \bar g) / i, \quad i = 1, \dots, \text{steps}

    In call number ``steps`` the optimizer gets the mean; in the calls before it the updates are zero and the state of
    the optimizer does not change. Each leaf is averaged in its own dtype, or in float32 where that is narrower, and the
    mean is sharded like the parameter also where ``init`` runs under ``jax.jit``; Optax has one dtype for all leaves,
    and a whole copy of the mean on each device there.

    Args:
      tx: any Optax optimizer.
      steps: how many gradients make a step, at least 1.

    Returns:
      A gradient transformation whose state is an ``optax.MultiStepsState``. ``params`` and extra arguments of the last
      call go to ``tx``.

    Raises:
      ValueError: ``steps`` is less than 1; gradients that do not fit the state, while ``update`` is traced.
      TypeError: ``steps`` is not a whole number; a gradient that is not an array of numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_nadam
      >>> tx = optax_nadam.accumulate(optax_nadam.nadamw(0.1), 2)
      >>> params, updates = jnp.array(1.0), []
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     u, state = tx.update(jnp.array(gradient), state, params)
      ...     updates.append(f"{float(u):.3f}")
      >>> updates
      ['0.000', '-0.106']

    Source: ``optax/transforms/_accumulation.py`` of Optax 0.2.8.
    """
    steps = validation.parse_positive_int("steps", steps)
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.MultiStepsState:
        return optax.MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
            inner_opt_state=inner.init(params),
            acc_grads=jax.tree.map(lambda p: zeros_like(p, complex_like(compute_dtype(p), p)), params),
            skip_state=(),
        )

    def accumulated(updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        validation.check_like_moments("gradients", updates, state.acc_grads)
        is_last = state.mini_step == steps - 1

        def average(mean: jax.Array, g: jax.Array) -> jax.Array:
            return mean + (g.astype(mean.dtype) - mean) / (state.mini_step + 1).astype(mean.dtype)

        def step(mean: Any, inner_state: Any) -> tuple[Any, Any]:
            return inner.update(_like(updates, mean), inner_state, params, **extra_args)

        def last(mean: Any, inner_state: Any) -> tuple[Any, Any]:
            u, stepped = step(mean, inner_state)
            return _like(mean, u), _like(inner_state, stepped)

        # One buffer holds the mean or, in the last call, the update; so no compiler copies anything. Behind a boolean,
        # lax.cond, XLA:GPU would.
        mean = jax.tree.map(average, state.acc_grads, updates)
        u_like, _ = jax.eval_shape(step, mean, state.inner_opt_state)
        branch, keep = is_last.astype(jnp.int32), lambda *same: same
        mean_or_u, inner_state = jax.lax.switch(branch, [keep, last], mean, state.inner_opt_state)
        zero = jax.tree.map(jnp.zeros_like, mean_or_u)
        u, mean = (jax.tree.map(functools.partial(jnp.where, x), mean_or_u, zero) for x in (is_last, ~is_last))
        return _like(u_like, u), optax.MultiStepsState(
            mini_step=jnp.where(is_last, 0, state.mini_step + 1),
            gradient_step=jnp.where(is_last, optax.safe_increment(state.gradient_step), state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=mean,
            skip_state=state.skip_state,
        )

    compiled = jax.jit(accumulated)  # outside of jit, lax.switch would be compiled in every call

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        validation.check_state("accumulate", state, optax.MultiStepsState)
        # A function, such as value_fn, cannot be traced; as a static argument, what it closes over would be kept.
        has_functions = any(map(callable, extra_args.values()))
        return (accumulated if has_functions else compiled)(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _like(tree: Any, values: Any) -> Any:
    """Values in the dtypes of a tree."""
    return jax.tree.map(lambda x, value: value.astype(x.dtype), tree, values)


def _mean(leaf: Any) -> jax.Array:
    """The mean over a leaf, or over both parts of a split one."""
    parts = jax.tree.leaves(leaf)
    return sum(map(jnp.sum, parts)) / sum(x.size for x in parts)


def split_real_and_imaginary(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Optax's transformation of that name, also where Flax nnx has made mappings of the pairs in its variables."""
    split = optax.with_extra_args_support(optax.contrib.split_real_and_imaginary(tx))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not any(map(is_complex, jax.tree.leaves(updates))):
            return split.update(updates, state, params, **extra_args)
        pairs = as_pairs(updates)
        names = by_name(pairs).keys()

        def is_like_params(node: Any) -> bool:
            return by_name(node).keys() == names

        in_pairs = jax.tree.map(lambda node: by_names_of(pairs, node), state, is_leaf=is_like_params)
        updates, new = split.update(updates, in_pairs, params, **extra_args)
        return updates, by_names_of(state, new)

    return optax.GradientTransformationExtraArgs(split.init, update)


def as_pairs(tree: Any) -> Any:
    """A tree like the params as its transformation sees it: a complex leaf is a pair of real ones."""
    identity = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    split: Any = optax.contrib.split_real_and_imaginary(identity).init(tree)
    return split.inner_state


def cautious(
    inner: optax.GradientTransformationExtraArgs, plain: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    r"""Drops the elements of an update that point away from the gradient, and scales up the others, leaf by leaf.

    .. math:: u \leftarrow u \odot M / \max(\operatorname{mean} M, 10^{-3}), \quad M = [\operatorname{Re}(u \bar g) > 0]

    The mean is over a whole leaf, also where its real and imaginary parts are updated separately.

    Args:
      inner: makes the update.
      plain: makes an update of the same sign from the same state. Without a root and a division, it can be computed
        twice; XLA:CPU stores the results of these for a second use.

    Returns:
      A transformation with the state of ``inner``.

    Source: Liang et al., `Cautious Optimizers <https://arxiv.org/abs/2411.16085>`_, 2024.
    """

    def agreement(u: jax.Array, g: jax.Array) -> jax.Array:
        return (jnp.real(jnp.sign(u) * jnp.conj(g)) > 0).astype(compute_dtype(g))

    def mask(u: Any, signed: Any, g: Any) -> Any:
        agrees = jax.tree.map(agreement, signed, g)
        factor = 1 / jnp.maximum(_mean(agrees), 1e-3)
        return jax.tree.map(lambda u, a: u * (a * factor).astype(u.dtype), u, agrees)  # a product: NaN stays NaN

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        u, stepped = inner.update(updates, state, params, **extra_args)
        signed, _ = plain.update(updates, state, params, **extra_args)
        return jax.tree.map(mask, u, signed, updates, is_leaf=is_pair), stepped

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clip_by_gradient_rms(
    inner: optax.GradientTransformationExtraArgs, plain: optax.GradientTransformationExtraArgs, threshold: float
) -> optax.GradientTransformationExtraArgs:
    r"""Scales down the update of a leaf where the gradient is large relative to its second moment.

    .. math:: u \leftarrow u / \max(1, \operatorname{rms}(|g| / (\sqrt{\hat v} + \varepsilon)) / \text{threshold})

    The mean is over a whole leaf, also where its real and imaginary parts are updated separately.

    Args:
      inner: makes the update.
      plain: makes the normalised gradient from the same state. It gets an ``m`` of zero, so that none is read.
      threshold: the largest root mean square that leaves the update unchanged.

    Returns:
      A transformation with the state of ``inner``.

    Source: Wortsman et al., `Stable and low-precision training <https://arxiv.org/abs/2304.13013>`_, 2023.
    """

    def square(normalised: jax.Array, g: jax.Array) -> jax.Array:
        x = abs_squared(_widened(normalised))
        return jnp.where(g != 0, x, jnp.zeros_like(x))

    def shrink(u: Any, normalised: Any, g: Any) -> Any:
        rms = jnp.sqrt(_mean(jax.tree.map(square, normalised, g)))
        factor = 1 / jnp.maximum(1.0, rms / threshold)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), u)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        u, stepped = inner.update(updates, state, params, **extra_args)
        without_m = state._replace(m=jax.tree.map(lambda g: jnp.zeros_like(_widened(g)), updates))
        normalised, _ = plain.update(updates, without_m, params, **extra_args)
        return jax.tree.map(shrink, u, normalised, updates, is_leaf=is_pair), stepped

    return optax.GradientTransformationExtraArgs(inner.init, update)


def freeze_rows_without_gradient(
    inner: optax.GradientTransformationExtraArgs, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """Does not move rows of chosen leaves while their gradient is zero; their moments still decay.

    Args:
      inner: makes the update.
      mask: a tree of booleans like the params, or a prefix of it: which leaves are tables of rows, along axis 0.

    Returns:
      A transformation with the state of ``inner``.
    """

    def freeze(chosen: bool, u: Any, g: Any) -> Any:
        if not chosen:
            return u

        def freeze_leaf(u: jax.Array, g: jax.Array) -> jax.Array:
            has_gradient = jnp.any(g != 0, axis=tuple(range(1, g.ndim)), keepdims=True)
            return jnp.where(has_gradient, u, jnp.zeros_like(u))

        return jax.tree.map(freeze_leaf, u, g)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        u, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(freeze, mask(updates) if callable(mask) else mask, u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
