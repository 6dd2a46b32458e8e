"""Checkpoints laid out as ``torch.optim.Optimizer.state_dict()`` writes them: what torch's and timm's have in common.

``{"state": {id: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": [{"params": [id, ...], ...}]}``
"""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._leaves import is_complex
from optax_nadam._state import ScaleByNadamState, put_state
from optax_nadam._wrappers import is_pair
from optax_nadam.compat._common import Checkpoint, as_numpy, check_keys, get_numbers, load

_SOURCE = (
    "source must be what {optimizer}.state_dict() returns, with the keys 'state' and 'param_groups', got {got}. From a"
    " checkpoint of several parts, pass the optimizer's."
)
_MISSING = "state of parameter {label!r} lacks {missing}: it was not written by {optimizer}."
_BEHIND = (
    "the parameters differ in the steps they took: {differences}. One Nadam counts for all of its parameters. Pass"
    " mismatch='largest' to take the largest step and its product of momenta for all, with the moments as they are (and"
    " zero for what never stepped); or give the groups optimizers of their own (optax.partition) and load each."
)
_NO_SHAPE = (
    "{labels} never stepped, so that source does not hold the shape of the moments. Pass weights, the model's own"
    " arrays as to_params takes them."
)
_NOT_SPLIT = (
    "opt_state has complex moments, but {optimizer} updates real and imaginary parts as separate numbers. Build the"
    " optimizer with complex_as_real=True, as compat.torch.nadam and compat.timm.nadamw do."
)
_ONE_OF_TWO = "exactly one of config and param_groups must be given, got {got}."

Label = str | int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an optimizer stores for each parameter.

    Attributes:
      optimizer: its name in the texts of errors.
      product: the key of the product of the momenta; None where it is not stored.
      plain: whether step and product are Python numbers rather than arrays.
    """

    optimizer: str
    product: str | None
    plain: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        """The keys of the numbers of a parameter, the step first."""
        return ("step",) if self.product is None else ("step", self.product)


def groups_of(source: Any, layout: Layout) -> list[Mapping[str, Any]]:
    """The parameter groups of a checkpoint."""
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= set(source):
        got = f"the keys {sorted(map(str, source))[:10]}" if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(_SOURCE.format(optimizer=layout.optimizer, got=got))
    return list(source["param_groups"])


def load_state(
    opt_state: Any,
    source: Mapping[str, Any],
    to_params: Callable[[Any], Any],
    *,
    layout: Layout,
    config: NadamConfig | None,
    names: Sequence[str] | None,
    weights: Mapping[str, Any] | Sequence[Any] | None,
    mismatch: str,
) -> Any:
    """The optimizer state that continues from a checkpoint.

    Args:
      opt_state: a state of the optimizer that is to continue.
      source: the checkpoint.
      to_params: turns arrays by name, or in order, into a tree like the params.
      layout: what the checkpoint stores.
      config: the hyperparameters of the optimizer, from which a product that is not stored is computed.
      names: names of the parameters, in the checkpoint's order.
      weights: arrays as ``to_params`` takes them, for the shapes of what never stepped.
      mismatch: ``"raise"`` or ``"largest"``.

    Returns:
      A new state.
    """
    validation.check_choice("mismatch", mismatch, ("raise", "largest"))
    old = _numbers_of(opt_state, layout)
    entries = _entries(source, layout, names)
    if not any(entries.values()):
        zeros = jax.tree.map(jnp.zeros_like, old)
        return put_state(opt_state, count=0, mu_product=1.0, m=zeros.m, v=zeros.v)
    progress = _progress(entries, layout, mismatch)
    m, v = (_moments(entries, key, weights) for key in ("exp_avg", "exp_avg_sq"))
    found = Checkpoint(layout.optimizer, progress.step, progress.product, m, v)
    return load(opt_state, found, lambda arrays: _converted(arrays, to_params), config)


def _numbers_of(opt_state: Any, layout: Layout) -> ScaleByNadamState:
    """The Nadam state, if its complex leaves are stored as torch stores them."""
    state = get_numbers(opt_state)
    if any(map(is_complex, jax.tree.leaves(state.m))):
        raise ValueError(_NOT_SPLIT.format(optimizer=layout.optimizer))
    return state


def _entries(source: Any, layout: Layout, names: Sequence[str] | None) -> dict[Label, Mapping[str, Any] | None]:
    """What the checkpoint stores of each parameter, by its name or else its position; None if it never stepped."""
    labels, ids = _labels(groups_of(source, layout), names)
    entries = {label: source["state"].get(i) or None for label, i in zip(labels, ids, strict=True)}
    for label, entry in entries.items():
        _check_entry(label, entry, layout)
    return entries


def _labels(groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> tuple[list[Any], list[Any]]:
    """A name, or else a position, for each parameter, and the ids that the checkpoint knows them by."""
    ids = [i for group in groups for i in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None:
        # Ids are names already where torch.distributed has written the checkpoint.
        return (ids if ids and all(isinstance(i, str) for i in ids) else list(range(len(ids)))), ids
    _check_names(names, len(ids))
    return list(names), ids


def _check_names(names: Sequence[str], expected: int) -> None:
    if len(names) != expected:
        raise ValueError(f"names must name the {expected} parameters of the checkpoint, got {len(names)} names.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names must differ, got {', '.join(twice)} more than once.")


def _check_entry(label: Label, entry: Mapping[str, Any] | None, layout: Layout) -> None:
    if entry is None:
        return
    expected = (*layout.scalars, "exp_avg", "exp_avg_sq")
    missing = [key for key in expected if key not in entry]
    if missing:
        raise ValueError(_MISSING.format(label=label, missing=", ".join(missing), optimizer=layout.optimizer))
    check_keys(f"state of parameter {label!r}", entry, expected)


class _Progress(NamedTuple):
    """How far a parameter has come: its step, its product of the momenta, and the bytes that this is stored in."""

    step: int
    product: float | None = None
    width: int = 0

    def __str__(self) -> str:
        product = "" if self.product is None else f" (product {self.product:.6g})"
        return f"{self.step}{product}" if self.step else "none"

    def agrees(self, other: "_Progress") -> bool:
        """Whether two parameters took the same steps; products were rounded apart, of late to denormal numbers.

        torch makes the product of a parameter the dtype of the parameter, so a narrower one tells nothing.
        """
        if self.step != other.step or self.product is None or other.product is None or self.width != other.width:
            return self.step == other.step
        return bool(np.isclose(self.product, other.product, rtol=1e-4, atol=1e-9))


def _progress(entries: Mapping[Label, Mapping[str, Any] | None], layout: Layout, mismatch: str) -> _Progress:
    """The step and the product that stand for all parameters: the largest step, the product in the widest dtype."""
    taken = {label: _progress_of(entry, layout) for label, entry in entries.items()}
    largest = max(taken.values(), key=lambda progress: (progress.step, progress.width))
    apart = {label: progress for label, progress in taken.items() if not progress.agrees(largest)}
    if apart and mismatch == "raise":
        raise ValueError(_BEHIND.format(differences=_described(apart, largest, len(taken) - len(apart))))
    return largest


def _progress_of(entry: Mapping[str, Any] | None, layout: Layout) -> _Progress:
    if entry is None:
        return _Progress(0)
    step = int(as_numpy(entry["step"]).item())
    if layout.product is None:
        return _Progress(step)
    product = entry[layout.product]
    return _Progress(step, float(as_numpy(product).item()), getattr(product, "itemsize", 8))


def _described(apart: Mapping[Label, _Progress], largest: _Progress, others: int) -> str:
    kinds = {
        str(progress): [label for label, p in apart.items() if str(p) == str(progress)] for progress in apart.values()
    }
    behind = "; ".join(f"{_listed(labels)} took {kind}" for kind, labels in kinds.items())
    return f"{behind}; {others} others took {largest}"


def _listed(labels: Sequence[Label]) -> str:
    shown = ", ".join(map(repr, labels[:5]))
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"


def _moments(entries: Mapping[Label, Mapping[str, Any] | None], key: str, weights: Any) -> Any:
    """One moment of each parameter, by name or in order: what ``to_params`` takes."""
    shapes = _shapes(weights, list(entries))
    unknown = [label for label, entry in entries.items() if entry is None and label not in shapes]
    if unknown:
        raise ValueError(_NO_SHAPE.format(labels=_listed(unknown)))
    # Copies: torch updates in place what an optimizer's state_dict() shows.
    known = {label: np.array(as_numpy(entry[key])) for label, entry in entries.items() if entry is not None}
    zeros = {label: np.zeros_like(as_numpy(x)) for label, x in shapes.items() if label not in known}
    arrays = {label: (known | zeros)[label] for label in dict.fromkeys((*entries, *shapes))}
    return arrays if all(isinstance(label, str) for label in arrays) else list(arrays.values())


def _shapes(weights: Any, labels: list[Label]) -> Mapping[Label, Any]:
    """The model's own arrays by label."""
    if weights is None or isinstance(weights, Mapping):
        return weights or {}
    if len(weights) != len(labels):
        raise ValueError(f"weights must be the {len(labels)} parameters of the checkpoint, got {len(weights)}.")
    return dict(zip(labels, weights, strict=True))


def _converted(arrays: Any, to_params: Callable[[Any], Any]) -> Any:
    """The moments as a tree like that of the optimizer state: a complex leaf is a pair of real ones."""
    try:
        tree = to_params(arrays)
    except KeyError as error:
        if not isinstance(arrays, Mapping) or not error.args or error.args[0] in arrays:
            raise
        raise ValueError(
            f"to_params asked for {error.args[0]!r}, but the checkpoint has moments of {_listed(list(arrays))} only."
            " Pass weights, the model's own arrays by name, to fill up with zeros."
        ) from error
    keep = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    return optax.contrib.split_real_and_imaginary(keep).init(tree).inner_state


def groups_to_dump(
    config: NadamConfig | None,
    param_groups: Sequence[Mapping[str, Any]] | None,
    config_to: Callable[[NadamConfig], dict[str, Any]],
) -> Sequence[Mapping[str, Any]]:
    """The groups of a checkpoint to write: those given, or one made of a config."""
    if (config is None) == (param_groups is None):
        raise ValueError(_ONE_OF_TWO.format(got="neither" if config is None else "both"))
    return [config_to(config)] if config is not None else list(param_groups or ())


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    groups: Sequence[Mapping[str, Any]],
    *,
    layout: Layout,
    as_tensor: Callable[[np.ndarray], Any] | None,
) -> dict[str, Any]:
    """The checkpoint of an optimizer state.

    Args:
      opt_state: a state that holds one Nadam state.
      from_params: turns a tree like the params into arrays by name, or in order.
      groups: parameter groups as the checkpoint is to have them; a single one without ``params`` gets all of them.
      layout: what the checkpoint stores.
      as_tensor: applied to every array.

    Returns:
      A dict with ``state`` and ``param_groups``.
    """
    state = _numbers_of(opt_state, layout)
    m, v = (_by_label(from_params(_merged(tree))) for tree in (state.m, state.v))
    groups = _filled(groups, list(m))
    labels, ids = _dumped_labels(groups, list(m))
    tensor = as_tensor or (lambda array: array)
    scalars = _dumped_scalars(state, layout, tensor)
    entries = {
        i: {**scalars(), "exp_avg": tensor(np.array(m[label])), "exp_avg_sq": tensor(np.array(v[label]))}
        for label, i in zip(labels, ids, strict=True)
    }
    return {"state": entries, "param_groups": groups}


def _dumped_scalars(
    state: ScaleByNadamState, layout: Layout, tensor: Callable[[np.ndarray], Any]
) -> Callable[[], dict[str, Any]]:
    """Makes a step and a product for each parameter, of its own: torch updates them in place."""
    values = {"step": np.asarray(state.count, np.float32), layout.product: np.asarray(state.mu_product)}
    if layout.plain:
        numbers_only = {"step": int(state.count), layout.product: float(state.mu_product)}
        return lambda: {key: numbers_only[key] for key in layout.scalars}
    return lambda: {key: tensor(np.array(values[key])) for key in layout.scalars}


def _by_label(arrays: Any) -> dict[Any, np.ndarray]:
    """What ``from_params`` gave, by name or by position."""
    if not isinstance(arrays, Mapping | Sequence):
        raise TypeError(f"from_params must return a dict or a list of arrays, got {type(arrays).__name__}.")
    return dict(arrays if isinstance(arrays, Mapping) else enumerate(arrays))


def _filled(groups: Sequence[Mapping[str, Any]], labels: list[Label]) -> list[dict[str, Any]]:
    """The groups, of which a single one without parameters gets all, with their names where there are any."""
    if len(groups) != 1 or "params" in groups[0]:
        return [dict(group) for group in groups]
    named = all(isinstance(label, str) for label in labels)
    return [{**groups[0], "params": list(range(len(labels))), **({"param_names": labels} if named else {})}]


def _dumped_labels(groups: list[dict[str, Any]], labels: list[Label]) -> tuple[list[Label], list[Any]]:
    """For each parameter of the groups the label that ``from_params`` gave it, and its id."""
    wanted, ids = _labels(groups, None)
    if len(labels) != len(ids):
        raise ValueError(f"from_params must return the {len(ids)} parameters of param_groups, got {len(labels)}.")
    if any(isinstance(label, numbers.Integral) for label in (*wanted, *labels)):
        return labels, ids
    if set(wanted) != set(labels):
        lacking = _listed([label for label in wanted if label not in labels])
        raise ValueError(f"from_params must return the parameters that param_groups names; {lacking} are not there.")
    return wanted, ids


def _merged(tree: Any) -> Any:
    """A tree of NumPy arrays, in which pairs are complex arrays again."""

    def merge(node: Any) -> np.ndarray:
        return np.asarray(jax.lax.complex(node.real, node.imaginary) if is_pair(node) else node)

    return jax.tree.map(merge, tree, is_leaf=is_pair)
