"""Parameter groups of torch's and timm's optimizers: the keys they share, and the optimizer of several groups."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, build_with_masks
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._tree import by_name, is_pair
from optax_nadam.compat._common import as_number, cannot_express, check_expressible, check_keys, without
from optax_nadam.compat._torch_leaves import NO_TAG, Matched, the_tag

NAMES = {"learning_rate": "lr", "b1": "betas[0]", "b2": "betas[1]"}
# What config_to can write for any of these optimizers.
FIELDS = ("learning_rate", "b1", "b2", "eps", "momentum_decay", "rule", "weight_decay", "coupled_weight_decay")

# Written into groups by torch and by learning rate schedulers; no optimizer's step reads it.
_BOOKKEEPING = frozenset(
    str.split("params param_names name initial_lr swa_lr max_lr min_lr lr_scale base_momentum max_momentum")
)
# Hyperparameters of the optimizers of torch and timm: a group that has one, and no use for it, is not a Nadam's.
_HYPERPARAMETERS = frozenset(
    str.split(
        "adjust_lr_fn alpha always_adapt amsgrad beta2_cap beta2_decay beta3 betas bias_correction capturable caution"
        " centered clipping_threshold corrected_weight_decay d dampening decay_rate decoupled decoupled_decay"
        " decoupled_weight_decay delta differentiable eps eps_scale etas fixed_decay foreach fused gamma grad_averaging"
        " history_size initial_accumulator_value lambd line_search_fn lr_decay lr_in_momentum max_eval max_grad_norm"
        " max_iter max_lr_snapshot maximize momentum momentum_decay mu_dtype nesterov no_prox ns_coefficients ns_steps"
        " rectify rho schedule_decay step_sizes t0 tolerance_change tolerance_grad trust_clip use_muon wd_ratio"
        " weight_decouple"
    )
)
_IGNORED = (
    "{what} has keys that are ignored: {keys}. torch's optimizer does not read them either; if a subclass of it does,"
    " do the same here."
)
_CYCLED = (
    "{what} has {keys}: OneCycleLR has cycled betas[0], which is constant here. The config has its current value,"
    " {b1!r}; give the scheduler cycle_momentum=False to compare runs."
)
_NO_SCHEDULE = (
    "Pass dataclasses.replace(config, learning_rate=1.0), and torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step:"
    " float(schedule(step))) with schedule = config.learning_rate.build()."
)
_NEGATIVE = (
    "It takes no number below 0: pass dataclasses.replace(config, learning_rate={lr!r}) and negate the loss, which is"
    " the same without weight decay."
)
_FROZEN = "frozen"


def check_group(what: str, group: Mapping[str, Any], required: Iterable[str], known: Collection[str]) -> None:
    """Rejects a group of another optimizer, and warns of what is in a group besides hyperparameters."""
    others = set(group) - set(known) - _BOOKKEEPING - _HYPERPARAMETERS
    check_keys(what, without(group, {*others, *(_BOOKKEEPING - {*known})}), known, required)
    if others:
        validation.warn(_IGNORED.format(what=what, keys=", ".join(sorted(others))))
    cycled = sorted({"base_momentum", "max_momentum"} & set(group))
    if cycled:
        validation.warn(_CYCLED.format(what=what, keys=" and ".join(cycled), b1=group["betas"][0]))


def pair(betas: Any) -> dict[str, Any]:
    """The two decays as fields of a config."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}.")
    return {"b1": as_number(betas[0]), "b2": as_number(betas[1])}


def parse_lr(lr: Any) -> Any:
    """A learning rate, which is not negative where it is a number."""
    if validation.is_number(lr):
        validation.check_not_negative("lr", lr)
    return lr


def check_fields(config: NadamConfig, optimizer: str, expressible: Collection[str]) -> None:
    """Rejects a config with something that one of these optimizers lacks."""
    check_expressible(config, optimizer, expressible)
    lr = config.learning_rate
    if isinstance(lr, ScheduleConfig):
        raise cannot_express(optimizer, "learning_rate", lr, _NO_SCHEDULE)
    if lr < 0:
        raise cannot_express(optimizer, "learning_rate", lr, _NEGATIVE.format(lr=-lr))


def shared_arguments(config: NadamConfig) -> dict[str, Any]:
    """The arguments that all of these optimizers have."""
    return {
        "lr": config.learning_rate,
        "betas": (config.b1, config.b2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def optimizer_of(matched: Matched, configs: Sequence[NadamConfig]) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole checkpoint, with a config for each of its groups; what is frozen stands still."""
    distinct, found = list(dict.fromkeys(configs)), matched.found
    if len(distinct) == 1 and not found.frozen:
        return distinct[0].build()
    tags = {label: distinct.index(configs[index]) + 1 for label, index in found.group_of.items()}
    tree = matched.tagged(tags | dict.fromkeys(found.frozen, NO_TAG))
    known = {NO_TAG, *tags.values()}
    one_each = jax.tree_util.tree_map_with_path(
        lambda path, leaf: the_tag(f"params{jax.tree_util.keystr(path)}", leaf, known), tree
    )
    return _partition(distinct, one_each, with_frozen=bool(found.frozen))


def _partition(configs: list[NadamConfig], tags: Any, *, with_frozen: bool) -> optax.GradientTransformationExtraArgs:
    """The optimizer of leaves that are tagged with the number of their config, from 1."""
    kinds = [dataclasses.replace(config, weight_decay=0.0) for config in configs]
    distinct = list(dict.fromkeys(kinds))
    optimizers = [_with_decays(kind, kinds, configs, tags) for kind in distinct]
    if len(optimizers) == 1 and not with_frozen:
        return optimizers[0]
    labels = jax.tree.map(lambda tag: _FROZEN if tag == NO_TAG else str(distinct.index(kinds[tag - 1])), tags)
    by_label: dict[Any, optax.GradientTransformation] = {str(i): tx for i, tx in enumerate(optimizers)}
    return optax.partition(by_label | {_FROZEN: optax.set_to_zero()}, _by_names(labels))


def _with_decays(
    kind: NadamConfig, kinds: list[NadamConfig], configs: list[NadamConfig], tags: Any
) -> optax.GradientTransformationExtraArgs:
    """One Nadam for the configs of a kind, which differ in weight decay only, with a mask for each of several."""
    own = [tag for tag, other in enumerate(kinds, 1) if other == kind]
    masks = [_by_names(jax.tree.map(lambda x, tag=tag: x == tag, tags)) if len(own) > 1 else None for tag in own]
    return build_with_masks(kind, [(configs[tag - 1].weight_decay, mask) for tag, mask in zip(own, masks, strict=True)])


def _by_names(tree: Any) -> Callable[[Any], Any]:
    """A function from params to the leaves of the same names in a tree, whatever the containers of the two."""
    found = by_name(tree)

    def of(params: Any) -> Any:
        names = by_name(params, is_leaf=is_pair)
        if not names.keys() <= found.keys():
            validation.check_structure("params", params, tree)
        return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_pair), [found[name] for name in names])

    return of
