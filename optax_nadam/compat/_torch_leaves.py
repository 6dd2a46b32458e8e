"""Parameters of torch and leaves of the params, matched by the functions that the user has for the weights."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optax_nadam import _validation as validation
from optax_nadam._tree import by_name, is_masked, is_pair
from optax_nadam.compat._torch_read import Label, Parameter, Source, listed

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
_NO_NADAM = (
    "no Nadam in opt_state has {leaf}, so that its shape is not there. Pass params, the tree that"
    " the optimizer updates."
)
NO_TAG = -1  # of what no Nadam has
_LARGEST_TAG = 256  # the last whole number that bfloat16 has, and all before it


@dataclasses.dataclass(frozen=True)
class Matched:
    """A checkpoint in trees like the params, each made by ``to_params`` where it is first asked for.

    Attributes:
      found: the checkpoint.
      to_params: the user's function from weights to params.
    """

    found: Source
    to_params: Callable[[Any], Any]

    @functools.cached_property
    def moments(self) -> tuple[Any, Any]:
        """The first and the second moments."""
        return call(self.to_params, self.found.moments("m")), call(self.to_params, self.found.moments("v"))

    def tagged(self, tags: Mapping[Label, int]) -> Any:
        """The params with the tags of the parameters that each leaf is made of, in place of their numbers.

        A tag is not 0, so that what pads with zeros is told from it, and small, so that every dtype holds it.
        """
        if max(tags.values(), default=1) > _LARGEST_TAG:
            raise ValueError("the checkpoint has too many different parameter groups; merge those that are alike.")
        shapes = self.found.shapes
        return call(self.to_params, {label: np.broadcast_to(np.int32(tags[label]), shapes[label]) for label in shapes})

    def parameters_of(self, moments: Any) -> Mapping[Label, Parameter | None]:
        """The parameters in the moments of a Nadam: all of them where it has all leaves, or where none has stepped."""
        if not any_masked(moments) or not self.found.stepped:
            return self.found.parameters
        tags, tree = self._owners
        leaves = jax.tree.leaves(select("m", tree, moments))
        own = set().union(*(tags_in(leaf, {NO_TAG, *tags.values()}) for leaf in leaves))
        return {label: parameter for label, parameter in self.found.parameters.items() if tags[label] in own}

    @functools.cached_property
    def _owners(self) -> tuple[Mapping[Label, int], Any]:
        """A tag for each parameter, which tells its group and whether it took a step, and the params with the tags."""
        found = self.found
        tags = {label: 1 + 2 * found.group_of[label] + (p is not None) for label, p in found.parameters.items()}
        return tags, self.tagged(dict.fromkeys(found.weights, NO_TAG) | tags)


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


def tags_in(leaf: Any, known: Collection[int]) -> set[int]:
    """The tags in a leaf of what the user's function made of tagged arrays."""
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


def any_masked(tree: Any) -> bool:
    """Whether another optimizer has some of the leaves."""
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def select(name: str, tree: Any, like: Any) -> Any:
    """The tree in the containers of the moments ``like``, with a masked node where these have one."""
    found, wanted = by_name(tree), by_name(like, is_leaf=lambda node: is_masked(node) or is_pair(node))
    if found.keys() != wanted.keys():
        validation.check_structure(name, tree, like)
    leaves = [found[label] for label, node in wanted.items() if not is_masked(node)]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_pair), leaves)


def filled(tree: Any, number: float) -> Any:
    """Arrays of the shapes of a tree, all of one number."""
    return jax.tree.map(lambda x: np.full(np.shape(x), number, np.float32), tree)


def merged(trees: Sequence[Any]) -> Any:
    """A tree of NumPy arrays from trees that mask each other's leaves; pairs are complex arrays again."""

    def merge(path: Any, *nodes: Any) -> np.ndarray:
        node = next((node for node in nodes if not is_masked(node)), None)
        if node is None:
            raise ValueError(_NO_NADAM.format(leaf=f"params{jax.tree_util.keystr(path)}"))
        return np.asarray(jax.lax.complex(node.real, node.imaginary) if is_pair(node) else node)

    return jax.tree_util.tree_map_with_path(merge, *trees, is_leaf=lambda node: is_masked(node) or is_pair(node))
