"""What the translators share: names that fit, and states found and put back in any optimizer state.

Nothing here computes; a framework's module turns its own checkpoint into the arguments of :func:`put_state`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._convert import convert_moments
from optax_nadam._moments import Moment, kept_like, real_dtype, with_parts
from optax_nadam._nadam import ScaleByNadamState, get_state, is_nadam
from optax_nadam._rounding import Chance
from optax_nadam._rules import Rule, mu_product_after, rule_named


def check_keys(what: str, got: Iterable[str], known: Iterable[str]) -> None:
    """Rejects keys that a translator does not know, by name."""
    unknown = sorted(set(got) - set(known))
    if unknown:
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def unsupported(what: str, name: str, value: Any, advice: str) -> ValueError:
    """The error for an option that changes numbers and has no counterpart."""
    return ValueError(f"{what} option {name}={value!r} has no counterpart here. {advice}")


def rule_of(config: NadamConfig) -> Rule:
    """The rule of a config, whether it holds the rule or its name."""
    return rule_named(config.rule)


def rebuilt_product(count: int, config: NadamConfig) -> float:
    """The product of the momenta after ``count`` steps, for checkpoints that lack it."""
    return mu_product_after(count, config.b1, config.momentum_decay, rule_of(config))


def get_numbers(opt_state: Any) -> ScaleByNadamState:
    """The one Nadam state, its moments as numbers of at least 32 bits, whatever they are kept in."""
    return convert_moments(get_state(opt_state))


def put_state(opt_state: Any, *, count: ArrayLike, mu_product: ArrayLike, m: Any, v: Any) -> Any:
    """The optimizer state with these values in its Nadam state, and ``count`` in every schedule's counter.

    Args:
      opt_state: a state of the optimizer that is to go on, as its ``init`` makes it; it is not changed.
      count: steps taken.
      mu_product: the product of the momenta so far.
      m: first moments, a tree like the params.
      v: second moments, a tree like the params.

    Returns:
      A new state, its arrays of the dtypes and its moments in the format that the old one has.

    Raises:
      ValueError: the moments do not fit the state in structure or shape; the text names the leaf.
      TypeError: a moment is no array of numbers.
    """
    old = get_state(opt_state)
    for name, moments, target in (("m", m, old.m), ("v", v, old.v)):
        validation.check_like_state(name, moments, target)
    new = ScaleByNadamState(
        # Copies: jnp.asarray may go on using the memory of an array that its framework updates in place.
        count=jnp.array(count, old.count.dtype),
        mu_product=jnp.array(mu_product, old.mu_product.dtype),
        m=jax.tree.map(lambda x, like: _kept_copy(x, like, Chance(jnp.asarray(count), 0)), m, old.m),
        v=jax.tree.map(lambda x, like: _kept_copy(x, like, Chance(jnp.asarray(count), 1)), v, old.v),
    )
    return _replaced(opt_state, new)


def _kept_copy(x: Any, like: Moment, chance: Chance) -> Moment:
    """An array of any dtype as a moment in the format of another."""
    return kept_like(jnp.array(x, with_parts(real_dtype(like), like)), like, chance)


def _replaced(node: Any, new: ScaleByNadamState) -> Any:
    """The tree with the Nadam state replaced and every other counter set."""
    if is_nadam(node):
        return new
    if _counts(node):
        fields = {name: _replaced(getattr(node, name), new) for name in node._fields}
        return node._replace(**{**fields, "count": jnp.asarray(new.count, node.count.dtype)})
    return jax.tree.map(
        lambda child: _replaced(child, new) if is_nadam(child) or _counts(child) else child,
        node,
        is_leaf=lambda child: child is not node and (is_nadam(child) or _counts(child)),
    )


def _counts(node: Any) -> bool:
    """Whether a node is a state with a counter: of a schedule, or of injected hyperparameters."""
    return "count" in getattr(node, "_fields", ()) and not is_nadam(node)


def as_numpy(array: Any) -> np.ndarray:
    """An array of any framework in NumPy; torch's bfloat16 becomes float32."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            array = array.float()
    return np.asarray(array)


def without(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A mapping without some of its names."""
    left_out = set(names)
    return {name: value for name, value in mapping.items() if name not in left_out}
