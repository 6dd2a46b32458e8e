"""Which array of a Keras optimizer is what: its names tell, or the shapes do where there are no names.

The names of all versions are known, and their layouts; exactly one of these must fit.
"""

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat._keras_files import Stored

_NO_FIT = (
    "the optimizer arrays, of shapes {shapes}, fit no known layout. Expected one of: {layouts}; every m and v has the"
    " shape of its weight."
)
_AMBIGUOUS = (
    "the optimizer arrays, of shapes {shapes}, fit more than one layout: {layouts}. Pass dialect={dialects} to choose,"
    " or the optimizer's variables themselves, which have names."
)
_NO_NAMES = (
    "source holds no optimizer state under names that are known; its names begin with {names}. Pass the whole"
    " checkpoint, or the arrays as a list in the optimizer's order."
)
_NO_WEIGHT = (
    "source has moments of {name!r}, but no weight of that name, by which to_params could tell them. Pass the whole"
    " checkpoint: for Keras 3, model.get_state_tree()."
)
_TWO_OPTIMIZERS = (
    "source has more than one optimizer: {role} may be {names}. Pass a mapping with the names of one optimizer and of"
    " its weights."
)


class Roles(NamedTuple):
    """Which array of a source is what, by its index.

    Attributes:
      dialect: the dialect that wrote the source.
      iterations: the number of gradients seen.
      product: the product of the momenta, or None where it is not stored.
      learning_rate: likewise.
      m: first moments, in the order of the model's trainable weights.
      v: second moments, likewise.
      weights: the weights that these belong to, by their index; None where the source does not have them.
      accumulates: whether there are accumulated gradients; None where a layout cannot tell them from averages of the
        weights.
    """

    dialect: str
    iterations: int
    product: int | None
    learning_rate: int | None
    m: tuple[int, ...]
    v: tuple[int, ...]
    weights: tuple[int, ...] | None
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
    # TensorFlow 2's object graph; the moments of tf_keras have been given such names.
    _Names(
        "tf_keras",
        r"(.*/)?_iterations",
        r"(?P<weight>.*)/\.OPTIMIZER_SLOT/.*/m",
        r"(?P<weight>.*)/\.OPTIMIZER_SLOT/.*/v",
        r"(.*/)?_u_product",
        r"(.*/)?_learning_rate",
    ),
    _Names(
        "legacy",
        r"(.*/)?iter",
        r"(?P<weight>.*)/\.OPTIMIZER_SLOT/.*/m",
        r"(?P<weight>.*)/\.OPTIMIZER_SLOT/.*/v",
        r"(.*/)?momentum_cache",
        r"(.*/)?learning_rate",
    ),
    # The Savers of TensorFlow 1: tf.keras' Nadam, and tf.contrib's, which counts by a power of beta1.
    _Names(
        "legacy",
        r"(.*/)?iter",
        r"(?P<weight>.*)/m",
        r"(?P<weight>.*)/v",
        r"(.*/)?momentum_cache",
        r"(.*/)?learning_rate",
    ),
    _Names("legacy", r"(.*/)?beta1_power", r"(?P<weight>.*)/N?[aA]dam", r"(?P<weight>.*)/N?[aA]dam_1"),
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


def by_names(stored: Stored) -> Roles | None:
    """Which array is what, if the names tell it of every one; those of a mapping must."""
    if None in stored.names:
        return None
    found = (_named(names, stored) for names in _NAMES if names.dialect in (stored.dialects or configs.SIDES))
    roles = next((roles for roles in found if roles is not None), None)
    if roles is None and stored.keys is not None:
        raise ValueError(_NO_NAMES.format(names=", ".join(map(repr, stored.names[:8])) or "no optimizer's arrays"))
    return roles


def _named(names: _Names, stored: Stored) -> Roles | None:
    """Which array is what, if the names are those of this dialect."""
    found = {role: _matching(getattr(names, role), stored.names) for role in _Names._fields[1:]}
    m, v = found["m"], found["v"]
    if not (found["iterations"] and m and m.keys() == v.keys()):
        return None
    scope = _scope(stored.names[next(iter(m.values()))])
    iterations, product, learning_rate = (
        _scalar(role, list(found[role].values()), scope, stored) for role in ("iterations", "product", "learning_rate")
    )
    assert iterations is not None  # checked above
    weights = _in_order(list(m), stored)
    return Roles(
        names.dialect,
        iterations,
        product,
        learning_rate,
        tuple(m[weight] for weight in weights),
        tuple(v[weight] for weight in weights),
        None if None in weights.values() else tuple(place for place in weights.values() if place is not None),
        bool(found["accumulator"]),
    )


def _scope(name: str | None) -> str:
    """What stands before the last slash of a name."""
    return str(name).rpartition("/")[0]


def _scalar(role: str, fitting: Sequence[int], scope: str, stored: Stored) -> int | None:
    """Which of the arrays that fit by name is that of the optimizer: one in the scope of the moments, or the last.

    A wrapper around the optimizer has some of them too, and comes first in a list.
    """
    fitting = [i for i in fitting if _scope(stored.names[i]) == scope] or fitting
    if stored.keys is not None and len(fitting) > 1:
        raise ValueError(_TWO_OPTIMIZERS.format(role=role, names=", ".join(repr(stored.names[i]) for i in fitting)))
    return fitting[-1] if fitting else None


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


def _in_order(found: Sequence[_Weight], stored: Stored) -> dict[_Weight, int | None]:
    """Weights with their places among the model's, in that order where it is known, else as they were found."""
    known: dict[str, list[int]] = {}
    for index, name in enumerate(stored.weights):
        known.setdefault(name, []).append(index)
    places = {weight: _place(weight, known) for weight in found}
    unknown = [name for (name, _), place in places.items() if place is None]
    if stored.keys is not None and unknown:
        raise ValueError(_NO_WEIGHT.format(name=unknown[0]))
    return places if unknown else dict(sorted(places.items(), key=lambda item: item[1] or 0))


def _place(weight: _Weight, known: Mapping[str, Sequence[int]]) -> int | None:
    """The place of a weight among the model's, whose name is the longest that the optimizer's name ends with."""
    name, occurrence = weight
    parts = name.split("/")
    endings = ("/".join(parts[i:]) for i in range(len(parts)))
    places = next((known[ending] for ending in endings if ending in known), ())
    return places[occurrence] if occurrence < len(places) else None


def by_shapes(stored: Stored, size: int) -> Roles:
    """Which array is what, if exactly one layout fits the shapes, or one with ``size`` numbers in the weights."""
    layouts = [layout for layout in _LAYOUTS if layout.dialect in (stored.dialects or configs.SIDES)]
    shapes = [x.shape for x in stored.arrays]
    fits = _fits(layouts, shapes)
    if len(fits) > 1:  # a scalar may be a weight
        right = [fit for fit in fits if sum(math.prod(shapes[i]) for i in fit[1].m) == size]
        fits = right or fits
    if len(fits) != 1:
        raise _not_one(layouts, [layout for layout, _ in fits], ", ".join(map(str, shapes)))
    return fits[0][1]


def _fits(layouts: Sequence[_Layout], shapes: Sequence[tuple[int, ...]]) -> list[tuple[_Layout, Roles]]:
    """The layouts that fit the shapes. Two may be one and the same: with a single weight, pairs are groups."""
    fits: dict[Roles, tuple[_Layout, Roles]] = {}
    for layout in layouts:
        for extras in layout.extras:
            if roles := _fit(layout, extras, shapes):
                fits.setdefault(roles._replace(dialect=""), (layout, roles))
    return list(fits.values())


def _fit(layout: _Layout, extras: int, shapes: Sequence[tuple[int, ...]]) -> Roles | None:
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
    return Roles(layout.dialect, roles["i"], roles.get("p"), roles.get("l"), m, v, None, None if extras else False)


def _not_one(layouts: Sequence[_Layout], fitting: Sequence[_Layout], shapes: str) -> ValueError:
    """The error for shapes that fit no layout, or more than one."""
    texts = "; ".join(layout.text for layout in fitting or layouts)
    dialects = " or ".join(sorted({repr(layout.dialect) for layout in fitting}))
    return ValueError((_AMBIGUOUS if fitting else _NO_FIT).format(shapes=shapes, layouts=texts, dialects=dialects))
