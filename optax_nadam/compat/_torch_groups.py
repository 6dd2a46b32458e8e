"""The optimizer of a whole checkpoint, however many parameter groups it has."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from optax_nadam._config import NadamConfig, build_with_masks
from optax_nadam.compat._torch_leaves import Label, call, tagged, the_tag
from optax_nadam.compat._torch_sources import Source

_FROZEN, _FROZEN_LABEL = -1, "frozen"


def from_groups(
    source: Source,
    to_params: Callable[[Any], Any],
    config_from: Callable[[Mapping[str, Any]], NadamConfig],
) -> optax.GradientTransformationExtraArgs:
    """One Nadam for groups that differ in weight decay only, each with a mask; and nothing for what is frozen."""
    configs = [config_from(group) for group in source.groups]
    distinct = list(dict.fromkeys(configs))
    tags = {label: 1 + distinct.index(configs[index]) for label, index in source.group_of.items()}
    frozen = _frozen(source)
    if len(distinct) == 1 and not frozen:
        return distinct[0].build()
    known = {_FROZEN, *tags.values()}
    tree = call(to_params, tagged(tags | frozen, source.shapes()))
    tree = jax.tree_util.tree_map_with_path(
        lambda path, x: the_tag(f"params{jax.tree_util.keystr(path)}", x, known), tree
    )
    return _optimizer(distinct, tree, with_frozen=bool(frozen))


def _frozen(source: Source) -> dict[Label, int]:
    """The parameters that took no step where others did, and those that the optimizer does not have."""
    untrained = (
        [label for label, p in source.parameters.items() if p is None] if any(source.parameters.values()) else []
    )
    return dict.fromkeys((*untrained, *(label for label in source.weights if label not in source.parameters)), _FROZEN)


def _optimizer(configs: list[NadamConfig], tags: Any, *, with_frozen: bool) -> optax.GradientTransformationExtraArgs:
    """The optimizer of leaves that are tagged with the number of their config, from 1."""
    kinds = [dataclasses.replace(config, weight_decay=0.0) for config in configs]
    distinct = list(dict.fromkeys(kinds))
    optimizers: dict[Any, optax.GradientTransformation] = {}
    for index, kind in enumerate(distinct):
        own = [tag for tag, other in enumerate(kinds, 1) if other == kind]
        decays = [(configs[tag - 1].weight_decay, _mask(tags, tag) if len(own) > 1 else None) for tag in own]
        optimizers[str(index)] = build_with_masks(kind, decays)
    if len(optimizers) == 1 and not with_frozen:
        return optimizers["0"]
    labels = jax.tree.map(lambda tag: _FROZEN_LABEL if tag == _FROZEN else str(distinct.index(kinds[tag - 1])), tags)
    return optax.partition({**optimizers, _FROZEN_LABEL: optax.set_to_zero()}, labels)


def _mask(tags: Any, tag: int) -> Any:
    """Whether a leaf has a tag."""
    return jax.tree.map(lambda other: other == tag, tags)
