"""Which array of a Keras optimizer is what, by names or else by shapes, and the checkpoint that they make.

The names of all versions are known, and their layouts. Exactly one layout must fit the shapes.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, product_after
from optax_nadam.compat._common import Checkpoint, rule_of
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
    "source has more than one optimizer: {role} may be {names}. Pass a mapping with the names of one optimizer and of"
    " its weights."
)
_ACCUMULATED = (
    "config is needed: the checkpoint holds accumulated gradients or averages. Pass"
    " config=config_from(optimizer.get_config())."
)
_IN_THE_MIDDLE = (
    "the checkpoint was saved after {gradients} gradients, in the middle of accumulating {steps} for a step; save it"
    " after a multiple of {steps}."
)
_NO_BETA = (
    "config is needed: tf.contrib's Nadam stores its steps as a power of beta1, and no hyperparameters. Pass config=,"
    " a NadamConfig with rule='eps_hat'."
)
_NO_POWER = "the checkpoint's beta1_power={power!r} is not a power of config.b1={b1!r}."
_NO_STEP = "the checkpoint's beta1_power has vanished and it has no global_step, so that its steps are not known."
_COMPUTED = (
    "the checkpoint stores no product of the momenta; it was computed from {count} steps, b1={config.b1} and"
    " momentum_decay={config.momentum_decay}, which must be those of the whole run.{aside}"
)
_IN_FIT = (
    " tf_keras inside fit() multiplies it about once per variable and step: a run is continued exactly only after some"
    " tens of steps, when the product has vanished there and here."
)
_LOSS_SCALED = (
    "the checkpoint is that of a LossScaleOptimizer. Under JAX, Keras 3 loses the product of the momenta at every step"
    " there, which is rule='loss_scaled'; with config.rule={rule!r} the steps are shorter from now on."
)
_OTHER_LEARNING_RATE = (
    "the checkpoint's learning rate is {theirs!r}, the config's {ours!r}; the optimizer continues with its own."
)
_VANISHED = 1e-30
_SMALL = 1e-6  # a smaller product P changes no step by as much: the step depends on 1 - P


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


_S, _W, _RATE = "(.*/)?", "(?P<weight>.*)", "(.*/)?learning_rate"
_SLOT_M, _SLOT_V = (rf"{_W}/\.OPTIMIZER_SLOT/.*/{x}" for x in "mv")
_M_I, _V_I = (rf"{_S}{x}_(?P<weight>\d+):0" for x in "mv")
_VARIABLE, _ACCUMULATOR = rf"{_S}variable(_\d+)?", r".*_gradient_accumulator"

_NAMES = (
    _Names("legacy", f"{_S}iter:0", f"{_W}/m:0", f"{_W}/v:0", f"{_S}momentum_cache:0"),
    _Names("legacy", f"{_S}iterations:0", _M_I, _V_I, f"{_S}m_schedule:0"),
    _Names("tf_keras", f"{_S}iteration:0", f"([^/]*/)?m/{_W}:0", f"([^/]*/)?v/{_W}:0"),
    _Names("keras", f"{_S}iteration", f"{_W}_momentum", f"{_W}_velocity", _VARIABLE, _RATE, _ACCUMULATOR),
    # The object graph of TensorFlow 2, in which the moments of tf_keras were renamed.
    _Names("tf_keras", f"{_S}_iterations", _SLOT_M, _SLOT_V, f"{_S}_u_product", f"{_S}_learning_rate"),
    _Names("legacy", f"{_S}iter", _SLOT_M, _SLOT_V, f"{_S}momentum_cache", _RATE),
    # The Savers of TensorFlow 1: tf.keras' Nadam, and tf.contrib's, which counts by a power of beta1.
    _Names("legacy", f"{_S}iter", f"{_W}/m", f"{_W}/v", f"{_S}momentum_cache", _RATE),
    _Names("legacy", f"{_S}beta1_power", f"{_W}/N?[aA]dam", f"{_W}/N?[aA]dam_1"),
)


def by_names(stored: Stored) -> Roles | None:
    """Which array is what, if the names tell; those of a mapping must."""
    if None in stored.names:
        return None
    found = (_named(names, stored) for names in _NAMES if names.dialect in stored.dialects)
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
    places = _in_order(list(m), stored)
    m_indices, v_indices = (tuple(moment[weight] for weight in places) for moment in (m, v))
    weights = tuple(place for place in places.values() if place is not None)
    known = weights if len(weights) == len(places) else None
    return Roles(
        names.dialect, iterations, product, learning_rate, m_indices, v_indices, known, bool(found["accumulator"])
    )


def _scope(name: str | None) -> str:
    """The part of a name before its last slash."""
    return str(name).rpartition("/")[0]


def _scalar(role: str, fitting: Sequence[int], scope: str, stored: Stored) -> int | None:
    """The optimizer's own among arrays whose names fit a role: the one in the scope of the moments, or the last.

    The others are those of a wrapper around the optimizer, which come first in a list.
    """
    fitting = [i for i in fitting if _scope(stored.names[i]) == scope] or fitting
    if stored.keys is not None and len(fitting) > 1:
        raise ValueError(_TWO_OPTIMIZERS.format(role=role, names=", ".join(repr(stored.names[i]) for i in fitting)))
    return fitting[-1] if fitting else None


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


def _in_order(found: Sequence[_Weight], stored: Stored) -> dict[_Weight, int | None]:
    """Weights with their places among the model's: in the model's order where it is known, else as found."""
    known: dict[str, list[int]] = {}
    for index, name in enumerate(stored.weights):
        known.setdefault(name, []).append(index)
    places = {weight: _place(*weight, known) for weight in found}
    unknown = [name for (name, _), place in places.items() if place is None]
    if stored.keys is not None and unknown:
        raise ValueError(_NO_WEIGHT.format(name=unknown[0]))
    return places if unknown else dict(sorted(places.items(), key=lambda item: item[1] or 0))


def _place(name: str, occurrence: int, known: Mapping[str, Sequence[int]]) -> int | None:
    """The place of a weight: of the model's names that end the optimizer's name for it, the longest counts."""
    parts = name.split("/")
    endings = ("/".join(parts[i:]) for i in range(len(parts)))
    places = next((known[ending] for ending in endings if ending in known), ())
    return places[occurrence] if occurrence < len(places) else None


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


# The checkpoint.


def checkpoint_of(stored: Stored, roles: Roles, config: NadamConfig | None) -> Checkpoint:
    """The checkpoint that the arrays make. Warns of what it lacks, and of what differs from the config."""
    count = _steps(_iterations(stored, roles, config), roles.accumulates, config)
    product, learning_rate = (
        None if i is None else stored.arrays[i].item() for i in (roles.product, roles.learning_rate)
    )
    m, v = (as_weights(stored, roles, [stored.arrays[i] for i in moment]) for moment in (roles.m, roles.v))
    if config is not None and product is None:
        _warn_of_product(roles.dialect, count, config)
    if config is not None and learning_rate is not None:
        _warn_of_learning_rate(learning_rate, config.learning_rate)
    return Checkpoint("this Keras checkpoint", count, product, m, v, config)


def as_weights(stored: Stored, roles: Roles, arrays: list[np.ndarray]) -> Any:
    """Arrays, one for each weight, in the form that ``to_params`` gets: by name, or in order."""
    if stored.keys is None or roles.weights is None:
        return arrays
    return {stored.keys[i]: array for i, array in zip(roles.weights, arrays, strict=True)}


def _iterations(stored: Stored, roles: Roles, config: NadamConfig | None) -> int:
    """The number of gradients seen. tf.contrib's is a power of beta1, or global_step once the power has vanished."""
    value = stored.arrays[roles.iterations].item()
    if not str(stored.names[roles.iterations]).endswith("beta1_power"):
        return as_count(value)
    if config is None:
        raise ValueError(_NO_BETA)
    if value < _VANISHED:
        if "global_step" not in stored.names:
            raise ValueError(_NO_STEP)
        return as_count(stored.arrays[stored.names.index("global_step")].item())
    count = math.log(value) / math.log(config.b1) - 1 if config.b1 else 0.5
    if abs(count - round(count)) > 0.1:
        raise ValueError(_NO_POWER.format(power=value, b1=config.b1))
    return as_count(round(count))


def as_count(iterations: Any) -> int:
    """A number of iterations as an integer."""
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"the number of iterations must be whole and not negative, got {iterations!r}.")
    return int(iterations)


def _steps(gradients: int, accumulates: bool | None, config: NadamConfig | None) -> int:
    """The number of steps for so many gradients: several make one step where they are accumulated."""
    if accumulates is False:
        return gradients
    if config is None:
        raise ValueError(_ACCUMULATED)
    if accumulates and config.accumulate_steps == 1:
        raise ValueError("the checkpoint holds accumulated gradients, but config has accumulate_steps=1.")
    steps, left_over = divmod(gradients, config.accumulate_steps)
    if left_over:
        raise ValueError(_IN_THE_MIDDLE.format(gradients=gradients, steps=config.accumulate_steps))
    return steps


def _warn_of_learning_rate(theirs: float, ours: Any) -> None:
    """Warns where the config has another number than the checkpoint."""
    if isinstance(ours, float) and np.float32(ours) != np.float32(theirs):
        validation.warn(_OTHER_LEARNING_RATE.format(theirs=theirs, ours=ours))


def _warn_of_product(dialect: str, count: int, config: NadamConfig) -> None:
    """Warns that the product is not in the checkpoint, where steps depend on it."""
    rule = rule_of(config)
    if not (rule.momentum_schedule and rule.running_product):
        return
    if dialect == "keras":
        validation.warn(_LOSS_SCALED.format(rule=config.rule))
    elif product_after(count, config) > _SMALL:
        aside = _IN_FIT if dialect == "tf_keras" else ""
        validation.warn(_COMPUTED.format(count=count, config=config, aside=aside))
