"""Which array of a Keras optimizer is what, by names or else by shapes.

The names of all versions are known, and their layouts. Exactly one layout must fit the shapes.
"""

import collections
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from optax_nadam.compat._common import listed
from optax_nadam.compat._keras_read import Stored

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
    "source has more than one optimizer: {role} may be {names}. Pass what belongs to one of them, and load it into the"
    " state of the leaves that it updates: of a MultiOptimizer optimizer.optimizers[0].variables, of a mapping the"
    " names of one optimizer and of its weights."
)
_OTHER_CLASS = (
    "source is not of a Nadam: {reason}. Pass the variables of a Nadam; of a LossScaleOptimizer its own, not"
    " those of its inner optimizer."
)
_NO_ROLE = (
    "source has {names}, which are no part of a Nadam of {dialect}. Pass the variables of the optimizer, all of them"
    " and nothing else."
)
_INCOMPLETE = (
    "source has moments under the names of a Nadam of {dialect}, but lacks {lacking}. Pass the whole checkpoint, or all"
    " of the optimizer's variables."
)
_SHARED_NAMES = (
    "source has other weights under the names of {names}, and the optimizer's order is not that of the model, so that"
    " nothing tells which is which. Pass the list optimizer.variables (legacy: optimizer.get_weights()) instead."
)


class Roles(NamedTuple):
    """Which array of a source is what, by its index; None for what is not stored."""

    dialect: str  # that wrote the source
    iterations: int  # the number of gradients seen
    product: int | None
    learning_rate: int | None
    m: tuple[int, ...]  # in the order of the model's trainable weights
    v: tuple[int, ...]  # likewise
    weights: tuple[int, ...] | None  # of these moments
    accumulates: bool | None  # there are accumulated gradients; None for those or averages of the weights

    @property
    def needs_config(self) -> bool:
        """Whether the checkpoint cannot be read without hyperparameters."""
        return self.product is None or self.accumulates is not False


# By names.


class _Names(NamedTuple):
    """Regular expressions for the names of a dialect; those of m and v contain the name of their weight."""

    dialect: str
    iterations: str
    m: str
    v: str
    product: str = r"(?!)"
    learning_rate: str = r"(?!)"
    accumulator: str = r"(?!)"
    others: str = r"(?!)"  # of a wrapper, and averages of the weights
    has_product: bool = True  # a Nadam stores its product; Keras 3 loses it in a LossScaleOptimizer


_S, _W, _RATE = "(.*/)?", "(?P<weight>.*)", "(.*/)?learning_rate"
_SLOT_M, _SLOT_V = (rf"{_W}/\.OPTIMIZER_SLOT/.*/{x}" for x in "mv")
_M_I, _V_I = (rf"{_S}{x}_(?P<weight>\d+):0" for x in "mv")
_VARIABLE, _ACCUMULATOR = rf"{_S}variable(_\d+)?", r".*_gradient_accumulator"
_WRAPPER = rf"{_S}(step_counter|dynamic_scale)"
_AVERAGE = r".*_average"

_NAMES = (
    _Names("legacy", f"{_S}iter:0", f"{_W}/m:0", f"{_W}/v:0", f"{_S}momentum_cache:0"),
    _Names("legacy", f"{_S}iterations:0", _M_I, _V_I, f"{_S}m_schedule:0"),
    _Names("tf_keras", f"{_S}iteration:0", f"([^/]*/)?m/{_W}:0", f"([^/]*/)?v/{_W}:0", has_product=False),
    _Names(
        "keras",
        f"{_S}iteration",
        f"{_W}_momentum",
        f"{_W}_velocity",
        _VARIABLE,
        _RATE,
        _ACCUMULATOR,
        f"{_WRAPPER}|{_AVERAGE}",
    ),
    # The object graph of TensorFlow 2, in which the moments of tf_keras were renamed.
    _Names("tf_keras", f"{_S}_iterations", _SLOT_M, _SLOT_V, f"{_S}_u_product", f"{_S}_learning_rate"),
    _Names("legacy", f"{_S}iter", _SLOT_M, _SLOT_V, f"{_S}momentum_cache", _RATE),
    # The Savers of TensorFlow 1: tf.keras' Nadam, and tf.contrib's, which counts by a power of beta1.
    _Names("legacy", f"{_S}iter", f"{_W}/m", f"{_W}/v", f"{_S}momentum_cache", _RATE),
    _Names("legacy", f"{_S}beta1_power", f"{_W}/N?[aA]dam", f"{_W}/N?[aA]dam_1", has_product=False),
)
# Names of Keras' other optimizers, which begin the names of their variables.
OTHERS = frozenset(str.split("adadelta adafactor adagrad adam adamax adamw ftrl lamb lion muon rmsprop sgd"))


def by_names(stored: Stored) -> Roles | None:
    """Which array is what, if the names tell; those of a mapping must."""
    if None in stored.names:
        return None
    if stored.keys is None:
        _check_class(map(str, stored.names))
    known = [names for names in _NAMES if names.dialect in stored.dialects]
    roles = next((roles for roles in (_named(names, stored) for names in known) if roles is not None), None)
    if roles is None:
        _check_complete(known, stored)
    if roles is None and stored.keys is not None:
        raise ValueError(_NO_NAMES.format(names=", ".join(map(repr, stored.names[:8])) or "no optimizer's arrays"))
    return roles


def _named(names: _Names, stored: Stored) -> Roles | None:
    """Which array is what, if the names are those of this dialect."""
    patterns = _Names._fields[1:-1]
    found = {role: _matching(getattr(names, role), stored.names) for role in patterns}
    m, v = found["m"], found["v"]
    if not (m and m.keys() == v.keys()):
        return None
    scope = _scope(stored.names[next(iter(m.values()))])
    is_wrapped = any(re.fullmatch(_WRAPPER, str(name)) for name in stored.names)
    scalars = {
        role: _scalar(role, list(found[role].values()), scope, stored, is_wrapped)
        for role in ("iterations", "product", "learning_rate")
    }
    if scalars["iterations"] is None:
        return None
    if names.has_product and scalars["product"] is None and not is_wrapped:
        raise ValueError(_OTHER_CLASS.format(reason="it has no product of the momenta"))
    if stored.keys is None:
        _check_roles(names, stored, [i for role in patterns for i in found[role].values()])
    m_indices, v_indices, weights = _in_order(m, v, stored)
    return Roles(
        names.dialect,
        scalars["iterations"],
        scalars["product"],
        scalars["learning_rate"],
        m_indices,
        v_indices,
        weights,
        bool(found["accumulator"]),
    )


def _check_complete(known: Sequence[_Names], stored: Stored) -> None:
    """Rejects names of which some are those of a Nadam's moments, and tells what the others lack."""
    found = [(names, _matching(names.m, stored.names), _matching(names.v, stored.names)) for names in known]
    names, m, v = max(found, key=lambda parts: len(parts[1].keys() & parts[2].keys()), default=(None, {}, {}))
    if names is None or not m.keys() & v.keys():
        return
    lacking = [f"the {which} moment of {name!r}" for which, x, y in (("second", m, v), ("first", v, m))
               for name, _ in x.keys() - y.keys()]  # fmt: skip
    texts = ", ".join(lacking) or "the optimizer's own number of iterations"
    raise ValueError(_INCOMPLETE.format(dialect=names.dialect, lacking=texts))


def _check_class(names: Iterable[str]) -> None:
    """Rejects the variables of another optimizer, whose names begin with its own."""
    for name in names:
        if re.sub(r"_\d+$", "", name.partition("/")[0]).lower() in OTHERS:
            raise ValueError(_OTHER_CLASS.format(reason=f"it has {name!r}"))


def _check_roles(names: _Names, stored: Stored, known: Collection[int]) -> None:
    """Rejects a list with arrays that have no role."""
    rest = [name for i, name in enumerate(stored.names) if i not in known]
    if rest:
        raise ValueError(_NO_ROLE.format(names=listed(rest), dialect=names.dialect))


def _scope(name: str | None) -> str:
    """The part of a name before its last slash."""
    return str(name).rpartition("/")[0]


def _scalar(role: str, fitting: Sequence[int], scope: str, stored: Stored, is_wrapped: bool) -> int | None:
    """The optimizer's own among arrays whose names fit a role; a wrapper's own come first, in another scope."""
    if is_wrapped and role != "product" and len(fitting) <= 2:
        fitting = [i for i in fitting if _scope(stored.names[i]) == scope]
    if len(fitting) > 1:
        raise ValueError(_TWO_OPTIMIZERS.format(role=role, names=", ".join(repr(stored.names[i]) for i in fitting)))
    return fitting[0] if fitting else None


_Weight = tuple[str, int]  # a weight's name, and the number of weights of that name before it


def _matching(pattern: str, names: Sequence[Any]) -> dict[_Weight, int]:
    """Indices of the names that fit, by the weight that each contains; two weights may have one name."""
    found: dict[_Weight, int] = {}
    seen: collections.Counter[str] = collections.Counter()
    for index, name in enumerate(names):
        if match := re.fullmatch(pattern, name):
            weight = match.groupdict().get("weight", "")
            found[weight, seen[weight]] = index
            seen[weight] += 1
    return found


def _in_order(
    m: Mapping[_Weight, int], v: Mapping[_Weight, int], stored: Stored
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """The moments in the model's order where that is known, else as found, and the indices of their weights."""
    known: dict[str, list[int]] = {}
    for index, name in enumerate(stored.weights):
        known.setdefault(name, []).append(index)
    places = {weight: _places(weight[0], known) for weight in m}
    unknown = [name for (name, _), found in places.items() if not found]
    if stored.keys is not None and unknown:
        raise ValueError(_NO_WEIGHT.format(name=unknown[0]))
    if unknown:
        return tuple(m.values()), tuple(v[weight] for weight in m), None
    if all(len(found) == 1 for found in places.values()):
        order = sorted(m, key=lambda weight: places[weight][0])
        weights: tuple[int, ...] | None = tuple(places[weight][0] for weight in order)
    else:
        order, weights = list(m), _increasing(places)
    return tuple(m[weight] for weight in order), tuple(v[weight] for weight in order), weights


def _places(name: str, known: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """Where a weight may be: of the model's names that end the optimizer's name for it, the longest counts."""
    parts = name.split("/")
    endings = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((known[ending] for ending in endings if ending in known), ())


def _increasing(places: Mapping[_Weight, Sequence[int]]) -> tuple[int, ...] | None:
    """The places of weights whose names others share, in the stored order; None where there is more than one way.

    Raises:
      ValueError: there is none, so that the stored order is not the model's.
    """
    options = list(places.values())
    first, last = _chosen(options), _chosen([-i for i in x] for x in reversed(options))
    if first is None or last is None:
        raise ValueError(_SHARED_NAMES.format(names=listed(list(dict.fromkeys(name for name, _ in places)))))
    return first if first == tuple(-i for i in reversed(last)) else None


def _chosen(places: Iterable[Sequence[int]]) -> tuple[int, ...] | None:
    """The smallest of each that is above the one before, if there is one."""
    chosen: list[int] = []
    for options in places:
        above = [i for i in options if not chosen or i > chosen[-1]]
        if not above:
            return None
        chosen.append(min(above))
    return tuple(chosen)


# By shapes.


class _Layout(NamedTuple):
    """An order of arrays, one letter each.

    ``i`` iterations, ``l`` learning rate, ``p`` product, ``-`` another scalar, ``m`` and ``v`` moments, ``x`` an
    accumulated gradient or an average of a weight. Letters before a star are repeated for each weight.
    """

    text: str
    dialect: str
    order: str


_LAYOUTS = (
    _Layout("tf.keras and Keras 2.3 [iterations, product, *m, *v]", "legacy", "i p m* v*"),
    _Layout("Keras 2.2 [iterations, *m, *v]", "legacy", "i m* v*"),
    _Layout("tf_keras [iteration, m, v, m, v, ...]", "tf_keras", "i x* mv*"),
    _Layout("Keras 3.10 [iteration, learning_rate, m, v, ..., product]", "keras", "i l x* mv* p"),
    _Layout("Keras 3.10 with a schedule [iteration, m, v, ..., product]", "keras", "i x* mv* p"),
    _Layout("Keras 3.0 [iteration, learning_rate, product, m, v, ...]", "keras", "i l x* p mv*"),
    _Layout("Keras 3.0 with a schedule [iteration, product, m, v, ...]", "keras", "i x* p mv*"),
    _Layout("LossScaleOptimizer [4 scalars, iteration, learning_rate, m, v, ...]", "keras", "- - - - i l x* mv*"),
    _Layout("LossScaleOptimizer with a schedule [4 scalars, iteration, m, v, ...]", "keras", "- - - - i x* mv*"),
)
_EXTRAS = {"legacy": (0,), "tf_keras": (0, 1), "keras": (0, 1, 2)}  # how many x a weight may have


def by_shapes(stored: Stored, size: int | None = None) -> Roles:
    """Which array is what, if exactly one layout fits the shapes.

    Of several that fit, since a scalar may be a weight, the one with ``size`` numbers in the weights is taken.
    """
    layouts = [layout for layout in _LAYOUTS if layout.dialect in stored.dialects]
    shapes = [x.shape for x in stored.arrays]
    fits = _fits(layouts, shapes)
    if len(fits) > 1:
        fits = [fit for fit in fits if sum(math.prod(shapes[i]) for i in fit[1].m) == size] or fits
    if len(fits) == 1:
        return fits[0][1]
    fitting = [layout for layout, _ in fits]
    texts = "; ".join(layout.text for layout in fitting or layouts)
    dialects = " or ".join(sorted({repr(layout.dialect) for layout in fitting}))
    error = _AMBIGUOUS if fitting else _NO_FIT
    raise ValueError(error.format(shapes=", ".join(map(str, shapes)), layouts=texts, dialects=dialects))


def _fits(layouts: Sequence[_Layout], shapes: Sequence[tuple[int, ...]]) -> list[tuple[_Layout, Roles]]:
    """The layouts that fit the shapes. Two may be one and the same: with a single weight, pairs are groups."""
    fits: dict[Roles, tuple[_Layout, Roles]] = {}
    for layout in layouts:
        for extras in _EXTRAS[layout.dialect]:
            if roles := _fit(layout, extras, shapes):
                fits.setdefault(roles._replace(dialect=""), (layout, roles))
    return list(fits.values())


def _fit(layout: _Layout, extras: int, shapes: Sequence[tuple[int, ...]]) -> Roles | None:
    """Which array is what under a layout with so many x for each weight, if the shapes allow it."""
    letters = _letters(layout.order, extras, len(shapes))
    at = {letter: tuple(i for i, x in enumerate(letters) if x == letter) for letter in "ilp-mvx"}
    m, v, extra = ([shapes[i] for i in at[letter]] for letter in "mvx")
    if not m or v != m or extra != extras * m or any(shapes[i] for letter in "ilp-" for i in at[letter]):
        return None
    product, learning_rate = (at[letter][0] if at[letter] else None for letter in "pl")
    accumulates = None if extras else False
    return Roles(layout.dialect, at["i"][0], product, learning_rate, at["m"], at["v"], None, accumulates)


def _letters(order: str, extras: int, count: int) -> str:
    """The letters of so many arrays in an order; none if the number does not fit."""
    scalars = re.sub(r"\w+\*| ", "", order)
    weights, left_over = divmod(count - len(scalars), extras + 2)
    if weights < 1 or left_over:
        return ""
    order = order.replace("x*", "x" * extras * weights)
    return re.sub(r"(\w+)\*", lambda repeated: repeated[1] * weights, order).replace(" ", "")
