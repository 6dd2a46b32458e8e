"""Keras' checkpoints of every version and kind, read into one record and written from one state.

A checkpoint is a list of arrays, with names or without, or a file that holds one. Names tell what an array is; where
there are none, the layouts of all versions are tried on the shapes, and exactly one must fit.
"""

import collections
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_nadam._config import NadamConfig
from optax_nadam._quantized import is_quantized
from optax_nadam._state import get_state
from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat._common import Checkpoint, as_numpy, get_numbers, rule_of
from optax_nadam.compat._keras_files import Stored, read_file

_NO_FIT = (
    "the optimizer arrays, of shapes {shapes}, fit no known layout. Expected one of: {layouts}; every m and v has the"
    " shape of its weight."
)
_AMBIGUOUS = (
    "the optimizer arrays, of shapes {shapes}, fit more than one layout: {layouts}. Pass dialect={dialects} to choose,"
    " or the optimizer's variables themselves, which have names."
)
_ACCUMULATED = (
    "config is needed: the checkpoint holds accumulated gradients or averages. Pass"
    " config=config_from(optimizer.get_config())."
)
_IN_THE_MIDDLE = (
    "the checkpoint was saved after {gradients} gradients, in the middle of accumulating {steps} for a step; save it"
    " after a multiple of {steps}."
)
_REBUILT = (
    "the checkpoint stores no product of the momenta; it was computed from {count} steps, b1={config.b1} and"
    " momentum_decay={config.momentum_decay}.{aside}"
)
_ASIDES = {
    "legacy": "",
    "tf_keras": " tf_keras inside fit() multiplies it about once per variable and step, so its own run differs.",
    "keras": " Under LossScaleOptimizer and JAX, Keras loses it at every step: that is rule='loss_scaled'.",
}
_OTHER_LEARNING_RATE = (
    "the checkpoint's learning rate is {theirs!r}, the config's {ours!r}; the optimizer continues with its own."
)


class _Roles(NamedTuple):
    """Which array of a source is what, by its index.

    Attributes:
      dialect: the dialect that wrote the source.
      iterations: the number of gradients seen.
      product: the product of the momenta, or None where it is not stored.
      learning_rate: likewise.
      m: first moments, in the order of the model's trainable weights.
      v: second moments, likewise.
      accumulates: whether there are accumulated gradients; None where a layout cannot tell them from averages of the
        weights.
    """

    dialect: str
    iterations: int
    product: int | None
    learning_rate: int | None
    m: tuple[int, ...]
    v: tuple[int, ...]
    accumulates: bool | None


class _Names(NamedTuple):
    """What the names of a dialect look like; those of m and v name their weight."""

    dialect: str
    iterations: str
    m: str
    v: str
    product: str = r"(?!)"
    learning_rate: str = r"(?!)"
    accumulator: str = r"(?!)"


_NAMES = (
    _Names("legacy", r"(.*/)?iter:0", r"(?P<weight>.*)/m:0", r"(?P<weight>.*)/v:0", r"(.*/)?momentum_cache:0"),
    _Names(
        "legacy",
        r"(.*/)?iterations:0",
        r"(.*/)?m_(?P<weight>\d+):0",
        r"(.*/)?v_(?P<weight>\d+):0",
        r"(.*/)?m_schedule:0",
    ),
    _Names("tf_keras", r"(.*/)?iteration:0", r"([^/]*/)?m/(?P<weight>.*):0", r"([^/]*/)?v/(?P<weight>.*):0"),
    _Names(
        "keras",
        r"(.*/)?iteration",
        r"(?P<weight>.*)_momentum",
        r"(?P<weight>.*)_velocity",
        r"(.*/)?variable(_\d+)?",
        r"(.*/)?learning_rate",
        r".*_gradient_accumulator",
    ),
)


class _Layout(NamedTuple):
    """An order of arrays: scalars, then m and v in pairs or in groups, with scalars between and behind.

    ``before``, ``between`` and ``behind`` hold one letter for each scalar: ``i`` iterations, ``l`` learning rate,
    ``p`` product, ``-`` something else. Between ``before`` and ``between`` come the ``extras``: so many further
    arrays for each weight.
    """

    text: str
    dialect: str
    before: str
    between: str = ""
    behind: str = ""
    paired: bool = True
    extras: Sequence[int] = (0,)


_EXTRAS = (0, 1, 2)
_LAYOUTS = (
    _Layout("tf.keras and Keras 2.3 [iterations, product, *m, *v]", "legacy", "ip", paired=False),
    _Layout("Keras 2.2 [iterations, *m, *v]", "legacy", "i", paired=False),
    _Layout("tf_keras [iteration, m, v, m, v, ...]", "tf_keras", "i", extras=(0, 1)),
    _Layout("Keras 3.10 [iteration, learning_rate, m, v, ..., product]", "keras", "il", "", "p", extras=_EXTRAS),
    _Layout("Keras 3.10 with a schedule [iteration, m, v, ..., product]", "keras", "i", "", "p", extras=_EXTRAS),
    _Layout("Keras 3.0 [iteration, learning_rate, product, m, v, ...]", "keras", "il", "p", extras=_EXTRAS),
    _Layout("Keras 3.0 with a schedule [iteration, product, m, v, ...]", "keras", "i", "p", extras=_EXTRAS),
    _Layout("LossScaleOptimizer [4 scalars, iteration, learning_rate, m, v, ...]", "keras", "----il", extras=_EXTRAS),
    _Layout("LossScaleOptimizer with a schedule [4 scalars, iteration, m, v, ...]", "keras", "----i", extras=_EXTRAS),
)


def read(opt_state: Any, source: Any, config: NadamConfig | None, dialect: str | None) -> Checkpoint:
    """The checkpoint in a source, from which an optimizer state is to continue; called by the public function."""
    check_between_steps(opt_state)
    stored = _stored(source, dialect)
    roles = _by_names(stored) or _by_shapes(stored, _size(opt_state))
    if config is None and stored.config and (roles.product is None or roles.accumulates is not False):
        config = configs.config_from(stored.config)
    iterations, product, learning_rate = (
        None if i is None else stored.arrays[i].item() for i in (roles.iterations, roles.product, roles.learning_rate)
    )
    m, v = ([stored.arrays[i] for i in indices] for indices in (roles.m, roles.v))
    count = _steps_taken(iterations, roles.accumulates, config)
    found = Checkpoint("this Keras checkpoint", count, product, m, v, config)
    for note in _notes(roles.dialect, found, learning_rate):
        warnings.warn(note, stacklevel=3)
    return found


def _stored(source: Any, dialect: str | None) -> Stored:
    """The arrays of a file, or of a list of arrays or variables."""
    if isinstance(source, str | os.PathLike):
        stored = read_file(os.fspath(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        items = list(source)
        stored = Stored([as_numpy(x) for x in items], [_name_of(x) for x in items])
    else:
        raise ValueError(f"source must be a path or a list of arrays or variables, got {source!r}.")
    if dialect is None:
        return stored
    configs.check_dialect(dialect)
    return stored._replace(dialects=[dialect])


def _name_of(variable: Any) -> str | None:
    """A variable's name, with its path where it has one; None for a plain array."""
    return getattr(variable, "path", None) or getattr(variable, "name", None)


def _size(opt_state: Any) -> int:
    """How many numbers the params have, by which one of two layouts that fit is chosen."""
    return sum(math.prod(m.shape) for m in jax.tree.leaves(get_state(opt_state).m, is_quantized))


def _by_names(stored: Stored) -> _Roles | None:
    """Which array is what, if the names tell it of every one."""
    if None in stored.names:
        return None
    found = (_named(names, stored) for names in _NAMES if names.dialect in (stored.dialects or configs.SIDES))
    return next((roles for roles in found if roles is not None), None)


def _named(names: _Names, stored: Stored) -> _Roles | None:
    """Which array is what, if the names are those of this dialect."""
    found = {role: _matching(getattr(names, role), stored.names) for role in _Names._fields[1:]}
    m, v = found["m"], found["v"]
    if not (found["iterations"] and m and m.keys() == v.keys()):
        return None
    order = _in_order(list(m), stored.weights)
    # Of two iteration counters, the first is that of a wrapper, which does not count.
    iterations, product, learning_rate = (
        next(reversed(found[role].values()), None) for role in ("iterations", "product", "learning_rate")
    )
    assert iterations is not None  # checked above
    return _Roles(
        names.dialect,
        iterations,
        product,
        learning_rate,
        tuple(m[weight] for weight in order),
        tuple(v[weight] for weight in order),
        bool(found["accumulator"]),
    )


_Weight = tuple[str, int]  # a weight's name, and how many of that name came before it


def _matching(pattern: str, names: Sequence[Any]) -> dict[_Weight, int]:
    """Indices of the names that fit, by the weight that each names; two weights may have one name."""
    found: dict[_Weight, int] = {}
    seen: collections.Counter[str] = collections.Counter()
    for index, name in enumerate(names):
        if match := re.fullmatch(pattern, name):
            weight = match.groupdict().get("weight", "")
            found[weight, seen[weight]] = index
            seen[weight] += 1
    return found


def _in_order(found: list[_Weight], weights: Sequence[str]) -> list[_Weight]:
    """Weights in the model's order, where that is known; else as they were found, with one seen later at the end."""
    known = [weight.removesuffix(":0") for weight in weights]
    places = {weight: _place(weight, known) for weight in found}
    return found if None in places.values() else sorted(found, key=lambda weight: places[weight] or 0)


def _place(weight: _Weight, known: Sequence[str]) -> int | None:
    """The place of a weight among the model's, whose name is the longest that the optimizer's name ends with."""
    name, occurrence = weight
    longest = max((x for x in known if f"/{name}".endswith(f"/{x}")), key=len, default=None)
    places = [i for i, x in enumerate(known) if x == longest]
    return places[occurrence] if occurrence < len(places) else None


def _by_shapes(stored: Stored, size: int) -> _Roles:
    """Which array is what, if exactly one layout fits the shapes, or one with so many numbers in the weights."""
    layouts = [layout for layout in _LAYOUTS if layout.dialect in (stored.dialects or configs.SIDES)]
    shapes = [x.shape for x in stored.arrays]
    fits = _fits(layouts, shapes)
    if len(fits) > 1:  # a scalar may be a weight
        right = [fit for fit in fits if sum(math.prod(shapes[i]) for i in fit[1].m) == size]
        fits = right or fits
    if len(fits) != 1:
        raise _not_one(layouts, [layout for layout, _ in fits], ", ".join(map(str, shapes)))
    return fits[0][1]


def _fits(layouts: Sequence[_Layout], shapes: Sequence[tuple[int, ...]]) -> list[tuple[_Layout, _Roles]]:
    """The layouts that fit the shapes. Two may be one and the same: with a single weight, pairs are groups."""
    fits: dict[_Roles, tuple[_Layout, _Roles]] = {}
    for layout in layouts:
        for extras in layout.extras:
            if roles := _fit(layout, extras, shapes):
                fits.setdefault(roles._replace(dialect=""), (layout, roles))
    return list(fits.values())


def _fit(layout: _Layout, extras: int, shapes: Sequence[tuple[int, ...]]) -> _Roles | None:
    """Which array is what under a layout, if the shapes allow it, with so many further arrays for each weight."""
    letters = layout.before + layout.between + layout.behind
    weights, left_over = divmod(len(shapes) - len(letters), extras + 2)
    if weights < 1 or left_over:
        return None
    indices = iter(range(len(shapes)))
    counts = (len(layout.before), extras * weights, len(layout.between), 2 * weights, len(layout.behind))
    before, extra, between, moments, behind = (tuple(itertools.islice(indices, count)) for count in counts)
    m, v = (moments[0::2], moments[1::2]) if layout.paired else (moments[:weights], moments[weights:])
    scalars, like = before + between + behind, [shapes[i] for i in m]
    if [shapes[i] for i in v] != like or [shapes[i] for i in extra] != extras * like or any(shapes[i] for i in scalars):
        return None
    roles = dict(zip(letters, scalars, strict=True))
    return _Roles(layout.dialect, roles["i"], roles.get("p"), roles.get("l"), m, v, None if extras else False)


def _not_one(layouts: Sequence[_Layout], fitting: Sequence[_Layout], shapes: str) -> ValueError:
    """The error for shapes that fit no layout, or more than one."""
    texts = "; ".join(layout.text for layout in fitting or layouts)
    dialects = " or ".join(sorted({repr(layout.dialect) for layout in fitting}))
    return ValueError((_AMBIGUOUS if fitting else _NO_FIT).format(shapes=shapes, layouts=texts, dialects=dialects))


def _steps_taken(iterations: Any, accumulates: bool | None, config: NadamConfig | None) -> int:
    """Steps of the gradients seen: several make one step where they are accumulated."""
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"the number of iterations must be whole and not negative, got {iterations!r}.")
    if accumulates is False:
        return int(iterations)
    if config is None:
        raise ValueError(_ACCUMULATED)
    steps = config.accumulate_steps
    if accumulates and steps == 1:
        raise ValueError("the checkpoint holds accumulated gradients, but config has accumulate_steps=1.")
    if iterations % steps:
        raise ValueError(_IN_THE_MIDDLE.format(gradients=int(iterations), steps=steps))
    return int(iterations) // steps


def _notes(dialect: str, found: Checkpoint, learning_rate: float | None) -> Iterator[str]:
    """What the user should know of a checkpoint: its product is computed, its learning rate is not the config's."""
    config = found.config
    if config is None:
        return
    if found.product is None and rule_of(config).keeps_product:
        yield _REBUILT.format(count=found.count, config=config, aside=_ASIDES[dialect])
    ours = config.learning_rate
    if learning_rate is not None and isinstance(ours, float) and np.float32(ours) != learning_rate:
        yield _OTHER_LEARNING_RATE.format(theirs=learning_rate, ours=ours)


def from_weights(opt_state: Any, weights: Sequence[Any]) -> Checkpoint:
    """The checkpoint in the weights of a legacy Nadam, ``[iterations, momentum_cache, *m, *v]``."""
    check_between_steps(opt_state)
    arrays = [as_numpy(x) for x in weights]
    of_each, left_over = divmod(len(arrays) - 2, 2)
    if of_each < 1 or left_over:
        raise ValueError(f"weights must be [iterations, momentum_cache, *m, *v], got {len(arrays)} arrays.")
    count = _steps_taken(arrays[0].item(), False, None)
    return Checkpoint("the weights", count, arrays[1].item(), arrays[2 : 2 + of_each], arrays[2 + of_each :])


def to_weights(opt_state: Any, from_params: Callable[[Any], Sequence[Any]]) -> list[np.ndarray]:
    """The weights of a legacy Nadam, ``[iterations, momentum_cache, *m, *v]``."""
    count, product, m, v = _numbers_in_order(opt_state, from_params)
    return [np.asarray(count, np.int64), product, *m, *v]


def write(
    opt_state: Any, from_params: Callable[[Any], Sequence[Any]], config: NadamConfig | None, dialect: str
) -> list[np.ndarray]:
    """The arrays of a dialect's optimizer, in its order."""
    configs.check_dialect(dialect)
    if config is not None:
        configs.check_config(config, dialect)
    if dialect == "legacy":
        return to_weights(opt_state, from_params)
    count, product, m, v = _numbers_in_order(opt_state, from_params)
    pairs = [x for pair in zip(m, v, strict=True) for x in pair]
    if dialect == "tf_keras":
        return [np.asarray(count, np.int64), *pairs]
    if config is None:
        raise ValueError("config is needed for dialect='keras', to know which arrays it stores.")
    steps = config.accumulate_steps
    learning_rate = [np.asarray(config.learning_rate, np.float32)] if isinstance(config.learning_rate, float) else []
    accumulators = [np.zeros_like(x) for x in m] if steps > 1 else []
    behind = [product] if rule_of(config).keeps_product else []
    return [np.asarray(count * steps, np.int32), *learning_rate, *accumulators, *pairs, *behind]


def _numbers_in_order(
    opt_state: Any, from_params: Callable[[Any], Sequence[Any]]
) -> tuple[int, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Steps taken, product, and moments in the order of their weights."""
    check_between_steps(opt_state)
    state = get_numbers(opt_state)
    m, v = ([as_numpy(x) for x in from_params(tree)] for tree in (state.m, state.v))
    return int(state.count), as_numpy(state.mu_product), m, v


def check_between_steps(opt_state: Any) -> None:
    """Rejects a state that has accumulated gradients."""
    if int(optax.tree.get(opt_state, "mini_step", 0)):
        raise ValueError("opt_state holds accumulated gradients that no step has used yet; take it after a step.")
