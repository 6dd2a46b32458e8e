"""Parameter groups of torch's and timm's optimizers: the keys they share, and the optimizer of several groups."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, build_with_masks
from optax_nadam._schedules import ScheduleConfig
from optax_nadam._tree import by_name, is_pair
from optax_nadam.compat._checkpoint import Checkpoint, Label
from optax_nadam.compat._common import as_number, cannot_express, check_expressible, check_keys
from optax_nadam.compat._match import NO_TAG, Matched, the_tag

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
        "adjust_lr_fn alpha always_adapt amsgrad beta2_cap beta2_decay beta3 betas bias_correction buffer capturable"
        " caution centered clipping_threshold corrected_weight_decay d dampening decay_rate decoupled decoupled_decay"
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
    " float(schedule(step))) with schedule = config.learning_rate.build(). To continue after count steps, load the"
    " optimizer's state, set group['initial_lr'] = 1.0 in each group, and add last_epoch=count - 1."
)
_SCHEDULED = (
    "{what} has initial_lr={initial!r}: a scheduler sets its learning rate, and the current one, {lr!r}, is taken for"
    " all steps to come. Pass learning_rate=, a schedule of the run's steps, or the scheduler's state to read."
)
_UNREAD = "the current learning rate of each group, {lr}, is taken for all steps to come: {reason}"
_ENDED = (
    "{what} has lr=0, with which no parameter moves: its scheduler has ended, or has not begun"
    " (initial_lr={initial!r}). Pass learning_rate=, a number or a schedule of the run's steps, or the scheduler's"
    " state to read."
)
_ANOTHER_RATE = (
    "learning_rate gives {given:.6g} after the {count} steps of the run, the checkpoint has lr={lr:.6g}: the run goes"
    " on with another learning rate. A schedule counts optimizer steps from the beginning of the run."
)
_NO_RATE = "{what} has lr=0, with which no parameter moves."
_NEGATIVE = (
    "It takes no number below 0: pass dataclasses.replace(config, learning_rate={lr!r}) and negate the loss, which is"
    " the same without weight decay."
)
_NO_PROPORTION = (
    "learning_rate is the first group's, and that of others is in proportion to their initial ones, but these are"
    " {rates}: one is not stored, or the first is 0. Build an optax.partition of config_from(group, learning_rate=)."
)
_FROZEN = "frozen"


def check_class(what: str, group: Mapping[str, Any], required: Iterable[str], known: Collection[str]) -> None:
    """Rejects a group of another optimizer."""
    own = {key: x for key, x in group.items() if key in known or key in _HYPERPARAMETERS - _BOOKKEEPING}
    check_keys(what, own, known, required)


def check_group(what: str, group: Mapping[str, Any], required: Iterable[str], known: Collection[str]) -> None:
    """Rejects a group of another optimizer, and warns of what is in a group besides hyperparameters."""
    check_class(what, group, required, known)
    if others := set(group) - set(known) - _BOOKKEEPING - _HYPERPARAMETERS:
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


def learning_rate_of(what: str, group: Mapping[str, Any], given: Any) -> Any:
    """The learning rate that the caller gives, or else the group's; what a scheduler set is no constant."""
    if given is not None:
        return given
    lr, initial = _current_lr(what, group), as_number(group.get("initial_lr"))
    if initial is not None:
        validation.warn(_SCHEDULED.format(what=what, initial=initial, lr=lr))
    elif validation.is_number(lr) and lr == 0:
        validation.warn(_NO_RATE.format(what=what))
    return lr


def _current_lr(what: str, group: Mapping[str, Any]) -> Any:
    """The learning rate of a group, unless a scheduler has taken it to 0."""
    lr, initial = parse_lr(as_number(group["lr"])), as_number(group.get("initial_lr"))
    if validation.is_number(lr) and lr == 0 and initial:
        raise ValueError(_ENDED.format(what=what, initial=initial))
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


def optimizer_of(found: Checkpoint, to_params: Callable[[Any], Any], learning_rate: Any) -> Any:
    """The optimizer of a whole checkpoint, a Nadam for each kind of parameter; what is frozen stands still.

    Args:
      found: the checkpoint.
      to_params: the user's function.
      learning_rate: the first group's, in place of the checkpoint's; other groups have it in the proportion of their
        initial ones. None for what the checkpoint tells.
    """
    configs = found.configs(_rates(found)) if learning_rate is None else _in_proportion(found)
    _warn_of_another_rate(found, learning_rate)
    kinds = {label: _kind(found, configs, label) for label in found.parameters}
    distinct = list(dict.fromkeys(kinds.values()))
    if len(distinct) == 1 and not found.frozen:
        return _built(distinct[0].config, [(distinct[0].config.weight_decay, None)], learning_rate)
    tags = {label: distinct.index(kind) + 1 for label, kind in kinds.items()} | dict.fromkeys(found.frozen, NO_TAG)
    tree, known = Matched(found, to_params).tagged(tags), {NO_TAG, *tags.values()}
    one_each = jax.tree_util.tree_map_with_path(
        lambda path, leaf: the_tag(f"params{jax.tree_util.keystr(path)}", leaf, known), tree
    )
    return _partition(distinct, one_each, learning_rate, with_frozen=bool(found.frozen))


class _Kind(NamedTuple):
    """What parameters of one Nadam have in common, and their weight decay."""

    config: NadamConfig
    steps: int | None

    @property
    def nadam(self) -> "_Kind":
        """The kind of their Nadam, whose weight decays differ by mask."""
        return self._replace(config=dataclasses.replace(self.config, weight_decay=0.0))


def _kind(found: Checkpoint, configs: Sequence[NadamConfig], label: Label) -> _Kind:
    parameter = found.parameters[label]
    return _Kind(configs[found.group_of[label]], None if parameter is None else parameter.step)


def _rates(found: Checkpoint) -> list[Any]:
    """The learning rate of each group: its schedule, or else its current one, with a warning where that was set."""
    if not found.unread_schedule or any("lr" not in group.options for group in found.groups):
        return [group.schedule for group in found.groups]
    rates = [_current_lr(f"{found.optimizer} group", group.options) for group in found.groups]
    validation.warn(_UNREAD.format(lr=", ".join(map(repr, rates[:3])), reason=found.unread_schedule))
    return rates


def _warn_of_another_rate(found: Checkpoint, schedule: Any) -> None:
    """Warns of a schedule that does not give the first group's current learning rate, where that is known and not 0."""
    group = found.groups[0].options if found.groups else {}
    lr, initial = as_number(group.get("lr")), as_number(group.get("initial_lr"))
    if callable(schedule) and found.count and validation.is_number(lr) and lr:
        given = float(schedule(jnp.int32(found.count)))
        if not math.isclose(given, lr, rel_tol=1e-3, abs_tol=1e-6 * abs(initial or lr)):  # rounding, where it ends
            validation.warn(_ANOTHER_RATE.format(given=given, count=found.count, lr=lr))


def _in_proportion(found: Checkpoint) -> list[NadamConfig]:
    """The config of each group, with its initial learning rate over that of the first group."""
    rates = [group.options.get("initial_lr", group.options.get("lr")) for group in found.groups]
    first = as_number(rates[0]) if rates else None
    if len(rates) > 1 and not (first and all(rate is not None for rate in rates)):
        raise ValueError(_NO_PROPORTION.format(rates=rates))
    return found.configs([as_number(rate) / first if len(rates) > 1 else 1.0 for rate in rates])


def _built(config: NadamConfig, decays: list[tuple[float, Any]], learning_rate: Any) -> Any:
    """The optimizer of a config, whose learning rate is a factor of the one that is given."""
    return build_with_masks(config, decays, _scaled(learning_rate, config.learning_rate))


def _scaled(learning_rate: Any, factor: Any) -> Any:
    if learning_rate is None or factor == 1.0:
        return learning_rate
    return (lambda count: factor * learning_rate(count)) if callable(learning_rate) else factor * learning_rate


def _partition(kinds: list[_Kind], tags: Any, learning_rate: Any, *, with_frozen: bool) -> Any:
    """The optimizer of leaves that are tagged with the number of their kind, from 1."""
    distinct = list(dict.fromkeys(kind.nadam for kind in kinds))
    optimizers = [_with_decays(nadam, kinds, tags, learning_rate) for nadam in distinct]
    if len(optimizers) == 1 and not with_frozen:
        return optimizers[0]
    labels = jax.tree.map(lambda tag: _FROZEN if tag == NO_TAG else str(distinct.index(kinds[tag - 1].nadam)), tags)
    by_label: dict[Any, optax.GradientTransformation] = {str(i): tx for i, tx in enumerate(optimizers)}
    return optax.partition(by_label | {_FROZEN: optax.set_to_zero()}, _by_names(labels))


def _with_decays(nadam: _Kind, kinds: list[_Kind], tags: Any, learning_rate: Any) -> Any:
    """One Nadam for kinds that differ in weight decay only, with a mask for each of several."""
    own = [tag for tag, kind in enumerate(kinds, 1) if kind.nadam == nadam]
    masks = [_by_names(jax.tree.map(lambda x, tag=tag: x == tag, tags)) if len(own) > 1 else None for tag in own]
    decays = [(kinds[tag - 1].config.weight_decay, mask) for tag, mask in zip(own, masks, strict=True)]
    return _built(nadam.config, decays, learning_rate)


def _by_names(tree: Any) -> Callable[[Any], Any]:
    """A function from params to the leaves of the same names in a tree, whatever the containers of the two."""
    found = by_name(tree)

    def of(params: Any) -> Any:
        names = by_name(params, is_leaf=is_pair)
        if not names.keys() <= found.keys():
            validation.check_structure("params", params, tree)
        return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_pair), [found[name] for name in names])

    return of
