"""From torch's parameters to the leaves of the params and back, by the functions that the user has for the weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._quantized import is_quantized
from optax_nadam._tree import is_masked, is_pair

Label = str | int

_UNNAMED = (
    "to_params got a list of {count} arrays in the optimizer's order, since the checkpoint does not name its"
    " parameters, and failed: {error}. If it takes arrays by name, pass names=[n for n, _ in model.named_parameters()];"
    " where the optimizer has several groups, the names of one group after another, as they went into it."
)
_ABSENT = (
    "to_params asked for {name!r}, but the checkpoint has moments of {labels} only. {advice}If it is not trained, pass"
    " weights, the model's own arrays by name: its moments are then zero. If it is tied to another parameter (one"
    " tensor under two names), its moments are under the first name: let to_params take that one."
)
_PREFIXED = (
    "The checkpoint has it as {found!r}: torch.compile puts '_orig_mod.' into names, DistributedDataParallel 'module.'."
    " Pass names=[n.replace({prefix!r}, '') for n, _ in model.named_parameters()]. "
)
_PREFIXES = ("_orig_mod.", "module.")
_MIXED = (
    "{leaf} is made of parameters of several parameter groups, or of trained and untrained ones, and has one optimizer"
    " only. Split the leaf, or build the optimizer with config_from(...).build()."
)
_CHANGED = (
    "the function between weights and params must rearrange numbers only (transpose, reshape, concatenate, pad with"
    " zeros, convert), since moments go through it too, but it made {got} of {known}."
)
_LARGEST_TAG = 256  # the last whole number that bfloat16 has, and all before it


class Placeholder:
    """Stands for an array of unknown shape: what transposes or reshapes an array returns the placeholder itself."""

    def __init__(self, value: int) -> None:
        """Takes the number that it is as an array."""
        self._value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value, np.int32 if dtype is None else dtype)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self._value, jnp.int32)

    def __getattr__(self, name: str) -> "Placeholder":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return self

    def __getitem__(self, index: Any) -> "Placeholder":
        return self


def call(to_params: Callable[[Any], Any], arrays: Mapping[Label, Any]) -> Any:
    """What ``to_params`` makes of arrays, which it gets by name, or as a list where they have none."""
    named = all(isinstance(label, str) for label in arrays)
    try:
        return to_params(dict(arrays) if named else list(arrays.values()))
    except KeyError as error:
        if not named or not error.args or error.args[0] in arrays:
            raise
        name, labels = error.args[0], list(arrays)
        raise ValueError(_ABSENT.format(name=name, labels=listed(labels), advice=_advice(name, labels))) from error
    except (AttributeError, TypeError, ValueError) as error:
        if named:
            raise
        raise ValueError(_UNNAMED.format(count=len(arrays), error=error)) from error


def _advice(name: Any, labels: Sequence[Label]) -> str:
    """What to do about a name that the checkpoint has with a prefix."""
    for prefix in _PREFIXES:
        for label in labels:
            if prefix in str(label) and str(label).replace(prefix, "") == name:
                return _PREFIXED.format(found=label, prefix=prefix)
    return ""


def tagged(tags: Mapping[Label, int], shapes: Mapping[Label, tuple[int, ...]]) -> dict[Label, Any]:
    """For each parameter, an array of its shape that is filled with its tag, or a placeholder.

    A tag is not 0, so that what pads with zeros is told from it, and small, so that every dtype holds it.
    """
    if max(tags.values(), default=1) > _LARGEST_TAG:
        raise ValueError("the checkpoint has too many different parameter groups; merge those that are alike.")
    return {
        label: np.broadcast_to(np.int32(tag), shapes[label]) if label in shapes else Placeholder(tag)
        for label, tag in tags.items()
    }


def tags_in(leaf: Any, known: Collection[int]) -> set[int]:
    """The tags in a leaf of what ``to_params`` made of tagged arrays."""
    array = np.real(np.asarray(leaf))
    constant = array.size and array.min() == array.max()
    tags = {float(tag) for tag in (array.flat[:1] if constant else np.unique(array))} - {0.0}
    if not tags <= set(known):
        raise ValueError(_CHANGED.format(got=sorted(tags - set(known)), known=sorted(known)))
    return {int(tag) for tag in tags}


def the_tag(place: str, leaf: Any, known: Collection[int]) -> int:
    """The one tag in a leaf."""
    tags = tags_in(leaf, known)
    if len(tags) != 1:
        raise ValueError(_MIXED.format(leaf=place))
    return tags.pop()


def select(name: str, tree: Any, like: Any) -> Any:
    """The tree, with a masked node where the moments ``like`` have one."""

    def is_leaf(node: Any) -> bool:
        return is_masked(node) or is_pair(node) or is_quantized(node)

    try:
        return jax.tree.map(lambda old, new: old if is_masked(old) else new, like, tree, is_leaf=is_leaf)
    except ValueError:
        validation.check_structure(name, tree, like)
        raise


def as_pairs(tree: Any) -> Any:
    """A tree like that of an optimizer state: a complex leaf is a pair of real ones."""
    identity = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    return optax.contrib.split_real_and_imaginary(identity).init(tree).inner_state


def merged(trees: Sequence[Any], default: Any) -> Any:
    """A tree of NumPy arrays from trees that mask each other's leaves; pairs are complex arrays again."""

    def merge(*nodes: Any) -> Any:
        node = next((node for node in nodes if not is_masked(node)), default)
        if node is default:
            return default
        return np.asarray(jax.lax.complex(node.real, node.imaginary) if is_pair(node) else node)

    return jax.tree.map(merge, *trees, is_leaf=lambda node: is_masked(node) or is_pair(node))


def listed(labels: Collection[Label]) -> str:
    """Some labels for the text of an error."""
    shown = ", ".join(map(repr, list(labels)[:5]))
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"
