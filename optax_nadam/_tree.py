"""The search through an optimizer state by type, and the matching of trees by name."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

_Kind = type | tuple[type, ...]

_NOT_ONE = (
    "{name} must hold one {kind}, but holds {number}. Pass what init or update of the optimizer returned, or the part"
    " of it that holds one; with nnx the nnx.Optimizer, not its nnx.state."
)


def is_masked(node: Any) -> bool:
    """Whether a node stands for a leaf that another optimizer has."""
    return isinstance(node, optax.MaskedNode)


def is_pair(node: Any) -> bool:
    """Whether a node stands for a complex leaf that ``optax.contrib.split_real_and_imaginary`` has split."""
    return getattr(node, "_fields", None) == ("real", "imaginary")


def children_of(node: Any) -> list[Any]:
    """The nodes right below a node."""
    return jax.tree.leaves(node, is_leaf=lambda child: child is not node)


def nodes_of(tree: Any, kind: _Kind) -> Iterator[Any]:
    """The nodes of a kind in an optimizer state, at any depth, also those inside others of the kind."""
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind)):
        if isinstance(node, kind):
            yield node
            yield from (inner for child in children_of(node) for inner in nodes_of(child, kind))


def map_nodes(f: Callable[[Any], Any], tree: Any, kind: _Kind) -> Any:
    """The tree with every node of a kind replaced by ``f`` of it, inner nodes first."""

    def mapped(node: Any) -> Any:
        if not isinstance(node, kind):
            return node
        return f(jax.tree.map(lambda child: map_nodes(f, child, kind), node, is_leaf=lambda child: child is not node))

    return jax.tree.map(mapped, tree, is_leaf=lambda node: isinstance(node, kind))


def map_parts(f: Callable[[Any], Any], tree: Any, kind: _Kind) -> Any:
    """The tree with ``f`` of each largest part that has one node of a kind: of the whole where that has one."""

    def mapped(node: Any) -> Any:
        found = sum(1 for _ in nodes_of(node, kind))
        if found <= 1:
            return f(node) if found else node
        return jax.tree.map(mapped, node, is_leaf=lambda child: child is not node)

    return mapped(tree)


def the_node(name: str, tree: Any, kind: _Kind) -> Any:
    """The one node of a kind in an optimizer state.

    Raises:
      ValueError: there is none, or more than one; the text begins with the argument's name.
    """
    found = list(nodes_of(tree, kind))
    if len(found) != 1:
        first = kind[0] if isinstance(kind, tuple) else kind
        raise ValueError(_NOT_ONE.format(name=name, kind=first.__name__, number=len(found)))
    return found[0]


def unzip(structure: Any, values: list[tuple[Any, ...]], number: int) -> tuple[Any, ...]:
    """Trees of a structure from ``number`` values for each leaf; some nodes would not accept a tuple of values."""
    return tuple(jax.tree.unflatten(structure, [value[i] for value in values]) for i in range(number))


def by_names_of(like: Any, tree: Any) -> Any:
    """``tree`` in the structure of ``like``, leaf by leaf of the same name, whatever the containers.

    Checkpoints keep names but not containers: Orbax without a target restores tuples as lists and an empty container as
    None. Where a leaf of one has no counterpart in the other, the tree is returned unchanged.
    """
    found, wanted = by_name(tree), by_name(like)
    if found.keys() != wanted.keys():
        return tree
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[tuple[str, ...], Any]:
    """The leaves, in order, by the names along their paths, whether these are fields or keys."""
    return {tuple(names_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)}


def names_of(path: Any) -> list[str]:
    """The names along a path to a leaf, without the ``value`` of a variable of Flax."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return names[:-1] if names[-1:] == ["value"] else names
