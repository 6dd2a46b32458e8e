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
from optax_nadam._state import ScaleByNadamState
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
_COMPLEX = (
    "opt_state has complex moments, but {optimizer} treats the two parts of a complex number as separate numbers. Build"
    " the optimizer with complex_as_real=True, as compat.torch.nadam and compat.timm.nadamw do."
)

Label = str | int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an optimizer stores for each parameter.

    Attributes:
      optimizer: its name in the texts of errors.
      product: the key of the product of the momenta; None where it stores none.
      python_numbers: whether step and product are Python numbers rather than arrays.
    """

    optimizer: str
    product: str | None
    python_numbers: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        """The keys of the numbers that are stored for a parameter, the step first."""
        return ("step",) if self.product is None else ("step", self.product)


class Parameter(NamedTuple):
    """What is stored for a parameter that took a step."""

    step: int
    product: float | None
    m: np.ndarray
    v: np.ndarray


Parameters = Mapping[Label, Parameter | None]  # None where it took no step


def groups_of(source: Any, optimizer: str) -> list[Mapping[str, Any]]:
    """The parameter groups of a checkpoint."""
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= set(source):
        got = f"the keys {sorted(map(str, source))[:10]}" if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(_SOURCE.format(optimizer=optimizer, got=got))
    return list(source["param_groups"])


def load_state(
    opt_state: Any,
    source: Mapping[str, Any],
    to_params: Callable[[Any], Any],
    *,
    layout: Layout,
    checkpoint_config: Callable[[], NadamConfig],
    config: NadamConfig | None,
    names: Sequence[str] | None,
    weights: Mapping[str, Any] | Sequence[Any] | None,
    mismatch: str,
) -> Any:
    """The optimizer state that continues from a checkpoint; see :func:`optax_nadam.compat.torch.load_state`."""
    validation.check_choice("mismatch", mismatch, ("raise", "largest"))
    parameters = _read(source, layout, names)
    like = get_numbers(opt_state)
    _check_real(like, layout)
    if not any(parameters.values()):
        m, v = jax.tree.map(jnp.zeros_like, (like.m, like.v))
        fresh = Checkpoint(layout.optimizer, 0, 1.0, m, v)
        return load(opt_state, fresh, lambda moments: moments, None)
    count, product = _progress(parameters, mismatch)
    found = Checkpoint(
        layout.optimizer,
        count,
        product,
        _moments(parameters, "m", weights),
        _moments(parameters, "v", weights),
        checkpoint_config() if product is None else None,
    )
    return load(opt_state, found, lambda arrays: _converted(arrays, to_params), config)


def _read(source: Any, layout: Layout, names: Sequence[str] | None) -> Parameters:
    """What a checkpoint stores for each parameter, by name or by position."""
    labels, ids = _labels(groups_of(source, layout.optimizer), names)
    return {label: _parameter(label, source["state"].get(i), layout) for label, i in zip(labels, ids, strict=True)}


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


def _parameter(label: Label, entry: Mapping[str, Any] | None, layout: Layout) -> Parameter | None:
    if not entry:
        return None
    expected = (*layout.scalars, "exp_avg", "exp_avg_sq")
    missing = [key for key in expected if key not in entry]
    if missing:
        raise ValueError(_MISSING.format(label=label, missing=", ".join(missing), optimizer=layout.optimizer))
    check_keys(f"state of parameter {label!r}", entry, expected)
    step, *product = (as_numpy(entry[key]).item() for key in layout.scalars)
    m, v = as_numpy(entry["exp_avg"]), as_numpy(entry["exp_avg_sq"])
    return Parameter(int(step), float(product[0]) if product else None, m, v)


def _progress(parameters: Parameters, mismatch: str) -> tuple[int, float | None]:
    """The step and the product that stand for all parameters."""
    taken = {label: (0, None) if p is None else (p.step, p.product) for label, p in parameters.items()}
    largest = max(taken.values(), key=lambda scalars: scalars[0])
    apart = {label: scalars for label, scalars in taken.items() if not _same(scalars, largest)}
    if apart and mismatch == "raise":
        raise ValueError(_BEHIND.format(differences=_described(taken, apart, largest)))
    return largest


def _same(ours: tuple[int, float | None], theirs: tuple[int, float | None]) -> bool:
    """Whether two parameters took the same steps; their products were rounded apart, of late to denormal numbers."""
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


def _moments(parameters: Parameters, moment: str, weights: Any) -> Any:
    """One moment of each parameter, by name or in order: what ``to_params`` takes."""
    shapes = _shapes(weights, list(parameters))
    unknown = [label for label, parameter in parameters.items() if parameter is None and label not in shapes]
    if unknown:
        raise ValueError(_NO_SHAPE.format(labels=_listed(unknown)))
    # Copies: torch updates in place what an optimizer's state_dict() shows.
    known = {label: np.array(getattr(p, moment)) for label, p in parameters.items() if p is not None}
    zeros = {label: np.zeros_like(as_numpy(x)) for label, x in shapes.items() if label not in known}
    arrays = {label: (known | zeros)[label] for label in dict.fromkeys((*parameters, *shapes))}
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
    identity = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    return optax.contrib.split_real_and_imaginary(identity).init(tree).inner_state


def dump_state(
    opt_state: Any,
    from_params: Callable[[Any], Any],
    groups: Sequence[Mapping[str, Any]],
    *,
    layout: Layout,
    as_tensor: Callable[[np.ndarray], Any] | None,
) -> dict[str, Any]:
    """The checkpoint of an optimizer state; see :func:`optax_nadam.compat.torch.dump_state`.

    Of the groups, a single one without ``params`` gets all parameters.
    """
    state = get_numbers(opt_state)
    _check_real(state, layout)
    m, v = (_by_label(from_params(_merged(tree))) for tree in (state.m, state.v))
    groups = _filled(groups, list(m))
    labels, ids = _dumped_labels(groups, list(m))
    tensor = as_tensor or (lambda array: array)
    entries = {
        i: {
            **_dumped_scalars(state, layout, tensor),
            "exp_avg": tensor(np.array(m[label])),
            "exp_avg_sq": tensor(np.array(v[label])),
        }
        for label, i in zip(labels, ids, strict=True)
    }
    return {"state": entries, "param_groups": groups}


def groups_to_dump(
    config: NadamConfig | None,
    param_groups: Sequence[Mapping[str, Any]] | None,
    config_to: Callable[[NadamConfig], dict[str, Any]],
) -> Sequence[Mapping[str, Any]]:
    """The groups of a checkpoint that is to be written, of which one argument or the other tells."""
    if (config is None) == (param_groups is None):
        raise ValueError(
            "dump_state needs either config, for one group of all parameters, or param_groups, the groups of the"
            f" optimizer that continues; got {'neither' if config is None else 'both'}."
        )
    return [config_to(config)] if param_groups is None else param_groups  # type: ignore[arg-type]  # one is given


def _dumped_scalars(state: ScaleByNadamState, layout: Layout, tensor: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Step and product, in arrays of their own for each parameter, since torch updates them in place."""
    if layout.python_numbers:
        return dict(zip(layout.scalars, (int(state.count), float(state.mu_product)), strict=False))
    arrays = np.array(state.count, np.float32), np.array(state.mu_product)
    return {key: tensor(array) for key, array in zip(layout.scalars, arrays, strict=False)}


def _by_label(arrays: Any) -> dict[Any, np.ndarray]:
    """What ``from_params`` returned, by name or by position."""
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


def _check_real(state: ScaleByNadamState, layout: Layout) -> None:
    """Rejects a state with complex moments."""
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(state.m)):
        raise ValueError(_COMPLEX.format(optimizer=layout.optimizer))
