"""Checkpoints laid out as ``torch.optim.Optimizer.state_dict()`` writes them: what torch's and timm's have in common.

``{"state": {id: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": [{"params": [id, ...], ...}]}``
"""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig
from optax_nadam._nadam import ScaleByNadamState
from optax_nadam._schedules import Schedule
from optax_nadam.compat._common import as_numpy, check_keys, get_numbers, put_state, unsupported

# Written by torch and by learning rate schedulers into every group, and read by no optimizer's step.
BOOKKEEPING = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "swa_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "lr_scale",
)
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
_WHOLE = (
    "opt_state keeps complex leaves whole, but {optimizer} treats the two parts as separate numbers. Build the"
    " optimizer with complex_as_real=True, as compat.torch.nadam and compat.timm.nadamw do."
)

Label = str | int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an optimizer keeps for each parameter.

    Attributes:
      optimizer: its name in the texts of errors.
      product: the key of the product of the momenta; None where it keeps none.
      plain: whether step and product are Python numbers rather than arrays.
    """

    optimizer: str
    product: str | None
    plain: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        """The keys of the numbers that a parameter keeps, the step first."""
        return ("step",) if self.product is None else ("step", self.product)


def number(name: str, value: Any) -> float:
    """A hyperparameter as a Python number; torch keeps some in tensors."""
    plain = as_numpy(value).item() if hasattr(value, "detach") or isinstance(value, np.ndarray) else value
    validation.check_plain(name, plain, float)
    return float(plain)


def pair(name: str, value: Any) -> tuple[float, float]:
    """The two decays, each a Python number in [0, 1)."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}.")
    b1, b2 = (number(f"{name}[{i}]", x) for i, x in enumerate(value))
    validation.check_decay(f"{name}[0]", b1)
    validation.check_decay(f"{name}[1]", b2)
    return b1, b2


def not_negative(group: Mapping[str, Any], *names: str) -> dict[str, float]:
    """Numbers of a group by name, none of them negative."""
    values = {name: number(name, group[name]) for name in names}
    for name, value in values.items():
        validation.check_not_negative(name, value)
    return values


def positive(name: str, value: Any) -> float | None:
    """A positive number, or None."""
    if value is None:
        return None
    plain = number(name, value)
    validation.check_positive(name, plain)
    return plain


def check_group(what: str, group: Mapping[str, Any], required: Iterable[str], known: Iterable[str]) -> None:
    """Rejects a group that lacks a key or has one that is not known, by name."""
    missing = [name for name in required if name not in group]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; it has {', '.join(sorted(group))}.")
    check_keys(what, group, (*known, *BOOKKEEPING))


def check_fields(config: NadamConfig, optimizer: str, offered: Iterable[str]) -> None:
    """Rejects a config that says what the optimizer cannot, by the field's name."""
    around = f"{optimizer} has none. Do it around the optimizer, and leave it out with dataclasses.replace."
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in offered and value != field.default:
            raise unsupported("NadamConfig", field.name, value, around)
    if isinstance(config.learning_rate, Schedule):
        raise unsupported("NadamConfig", "learning_rate", config.learning_rate, around)
    if config.learning_rate < 0:
        raise unsupported("NadamConfig", "learning_rate", config.learning_rate, f"{optimizer} takes none below 0.")


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
    names: Sequence[str] | None,
    weights: Mapping[str, Any] | Sequence[Any] | None,
    mismatch: str,
    product_after: Callable[[int], float] | None = None,
) -> Any:
    """The optimizer state with the moments and counters of a checkpoint.

    Args:
      opt_state: as in :func:`optax_nadam.compat._common.put_state`.
      source: the checkpoint.
      to_params: turns arrays by name, or in order, into the params tree.
      layout: what the checkpoint keeps.
      names: names of the parameters, in the checkpoint's order.
      weights: arrays as ``to_params`` takes them, for the shapes of what never stepped.
      mismatch: ``"raise"`` or ``"largest"``.
      product_after: the product of the momenta after a number of steps, where the checkpoint keeps none.

    Returns:
      A new state.
    """
    if mismatch not in ("raise", "largest"):
        raise ValueError(f"mismatch must be 'raise' or 'largest', got {mismatch!r}.")
    groups = groups_of(source, layout)
    labels, ids = _labels(groups, names)
    entries = {label: source["state"].get(i) or None for label, i in zip(labels, ids, strict=True)}
    for label, entry in entries.items():
        _check_entry(label, entry, layout)
    old = get_numbers(opt_state)
    if _any_complex(old.m):
        raise ValueError(_WHOLE.format(optimizer=layout.optimizer))
    if not any(entries.values()):
        zeros = jax.tree.map(jnp.zeros_like, (old.m, old.v))
        return put_state(opt_state, count=0, mu_product=1.0, m=zeros[0], v=zeros[1])
    count, product = _progress(entries, layout, mismatch)
    if product_after is not None:
        product = product_after(count)
    m, v = (_converted(_moments(entries, key, weights), to_params) for key in ("exp_avg", "exp_avg_sq"))
    return put_state(opt_state, count=count, mu_product=1.0 if product is None else product, m=m, v=v)


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


def _progress(
    entries: Mapping[Label, Mapping[str, Any] | None], layout: Layout, mismatch: str
) -> tuple[int, float | None]:
    """The step and the product that stand for all parameters."""
    taken = {label: _scalars(entry, layout) for label, entry in entries.items()}
    count, product = max(taken.values(), key=lambda scalars: scalars[0])
    apart = {label: scalars for label, scalars in taken.items() if not _same(scalars, (count, product))}
    if apart and mismatch == "raise":
        raise ValueError(_BEHIND.format(differences=_described(taken, apart, (count, product))))
    return count, product


def _scalars(entry: Mapping[str, Any] | None, layout: Layout) -> tuple[int, float | None]:
    if entry is None:
        return 0, None
    step, *product = (as_numpy(entry[key]).item() for key in layout.scalars)
    return int(step), float(product[0]) if product else None


def _same(ours: tuple[int, float | None], theirs: tuple[int, float | None]) -> bool:
    """Whether two parameters went on together; their products were rounded apart, of late to denormal numbers."""
    (step, product), (other_step, other_product) = ours, theirs
    if step != other_step or product is None or other_product is None:
        return step == other_step
    return bool(np.isclose(product, other_product, rtol=1e-4, atol=1e-9))


def _described(
    taken: Mapping[Label, tuple[int, float | None]],
    apart: Mapping[Label, tuple[int, float | None]],
    largest: tuple[int, float | None],
) -> str:
    def text(scalars: tuple[int, float | None]) -> str:
        product = "" if scalars[1] is None else f" (product {scalars[1]:.6g})"
        return f"{scalars[0]}{product}" if scalars[0] else "none"

    kinds = {text(scalars): [label for label, s in apart.items() if s == scalars] for scalars in apart.values()}
    behind = "; ".join(f"{_listed(labels)} took {kind}" for kind, labels in kinds.items())
    return f"{behind}; {len(taken) - len(apart)} others took {text(largest)}"


def _listed(labels: Sequence[Label]) -> str:
    shown = ", ".join(map(repr, labels[:5]))
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"


def _moments(entries: Mapping[Label, Mapping[str, Any] | None], key: str, weights: Any) -> Any:
    """One moment of each parameter, by name or in order: what ``to_params`` takes."""
    shapes = _shapes(weights, list(entries))
    unknown = [label for label, entry in entries.items() if entry is None and label not in shapes]
    if unknown:
        raise ValueError(_NO_SHAPE.format(labels=_listed(unknown)))
    # Copies: torch goes on in place in what an optimizer's state_dict() shows.
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
      from_params: turns the params tree into arrays by name, or in order.
      groups: parameter groups as the checkpoint is to have them; a single one without ``params`` gets all of them.
      layout: what the checkpoint keeps.
      as_tensor: applied to every array.

    Returns:
      A dict with ``state`` and ``param_groups``.
    """
    state = get_numbers(opt_state)
    if _any_complex(state.m):
        raise ValueError(_WHOLE.format(optimizer=layout.optimizer))
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
    """Makes step and product, anew for each parameter: torch counts on in place."""
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


def _is_pair(node: Any) -> bool:
    """Whether a node stands for a complex leaf."""
    return getattr(node, "_fields", None) == ("real", "imaginary")


def _merged(tree: Any) -> Any:
    """A tree of NumPy arrays, in which pairs are complex arrays again."""

    def merge(node: Any) -> np.ndarray:
        return np.asarray(jax.lax.complex(node.real, node.imaginary) if _is_pair(node) else node)

    return jax.tree.map(merge, tree, is_leaf=_is_pair)


def _any_complex(tree: Any) -> bool:
    return any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(tree))
