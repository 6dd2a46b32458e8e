"""Keras' checkpoints of every version and kind, read into one record.

A checkpoint is a list of arrays, with names or without, or a file that holds one. Names tell what an array is; where
there are none, the layouts of all versions are tried on the shapes, and exactly one must fit.
"""

import importlib
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_nadam.compat._common import as_numpy

DIALECTS = ("keras", "tf_keras", "legacy")

_NO_STATE = "{path} holds no optimizer state{hint}."
_LEGACY_KERAS = (
    ": a .keras or .weights.h5 file never has that of a legacy optimizer; save the model as .h5, or its"
    " optimizer.get_weights()"
)
_NO_FIT = (
    "the optimizer arrays, of shapes {shapes}, fit no known layout. Expected one of: {layouts}; every m and v has the"
    " shape of its weight."
)
_AMBIGUOUS = (
    "the optimizer arrays, of shapes {shapes}, fit more than one layout: {layouts}. Pass dialect={dialects} to choose,"
    " or the optimizer's variables themselves, which have names."
)


class Checkpoint(NamedTuple):
    """What a Keras optimizer keeps.

    Attributes:
      dialect: one of ``DIALECTS``.
      iterations: gradients seen.
      product: the product of the momenta, or None where it is not kept.
      rate: the learning rate, or None where it is not kept.
      m: first moments, in the order of the model's trainable weights.
      v: second moments, likewise.
      accumulates: whether there are accumulated gradients; None where the layout cannot tell them from averages of
        the weights.
      config: the optimizer's config, or None where it is not kept.
    """

    dialect: str
    iterations: int
    product: float | None
    rate: float | None
    m: list[np.ndarray]
    v: list[np.ndarray]
    accumulates: bool | None
    config: Mapping[str, Any] | None


class _Stored(NamedTuple):
    """Arrays as they were stored.

    Attributes:
      arrays: the optimizer's arrays, in order.
      names: their names.
      weights: the names of the model's weights, in order, as far as known.
      config: the optimizer's config.
      dialects: which may have written this.
    """

    arrays: list[np.ndarray]
    names: Sequence[str | None]
    weights: Sequence[str] = ()
    config: Mapping[str, Any] | None = None
    dialects: Sequence[str] = DIALECTS


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


class _Names(NamedTuple):
    """What the names of a dialect look like; m and v name their weight."""

    dialect: str
    iterations: str
    m: str
    v: str
    product: str = r"(?!)"
    rate: str = r"(?!)"
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


def read(source: Any, dialect: str | None, elements: int) -> Checkpoint:
    """The checkpoint in a file, or in a list of arrays or variables.

    Args:
      source: the path of a ``.h5``, ``.weights.h5`` or ``.keras`` file, or a list.
      dialect: which of ``DIALECTS`` wrote it; None to find out.
      elements: how many numbers the weights have, to choose between layouts that fit.

    Raises:
      ValueError: there is no optimizer state, or what is there fits no layout, or more than one.
      ImportError: a file needs h5py.
    """
    if isinstance(source, str | os.PathLike):
        stored = _read_file(os.fspath(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        items = list(source)
        stored = _Stored([as_numpy(x) for x in items], [_name_of(x) for x in items])
    else:
        raise ValueError(f"source must be a path or a list of arrays or variables, got {source!r}.")
    if dialect is not None:
        stored = stored._replace(dialects=[dialect])
    return _by_names(stored) or _by_shapes(stored, elements)


def _name_of(variable: Any) -> str | None:
    """A variable's name, with its path where it has one; None for a plain array."""
    return getattr(variable, "path", None) or getattr(variable, "name", None)


def _by_names(stored: _Stored) -> Checkpoint | None:
    """The checkpoint, if the names tell what every array is for."""
    if None in stored.names:
        return None
    for names in _NAMES:
        if names.dialect not in stored.dialects:
            continue
        found = {role: _matching(getattr(names, role), stored) for role in _Names._fields[1:]}
        m, v = found["m"], found["v"]
        if found["iterations"] and m and m.keys() == v.keys():
            order = _in_order(list(m), stored.weights)
            return _checkpoint(
                names.dialect,
                stored,
                # Of two iteration counters, the first is that of a wrapper, which does not count.
                {role: list(found[role].values())[-1:] for role in ("iterations", "product", "rate")},
                [m[weight] for weight in order],
                [v[weight] for weight in order],
                bool(found["accumulator"]),
            )
    return None


def _matching(pattern: str, stored: _Stored) -> dict[str, int]:
    """Places of the arrays whose name fits, by the weight that the name speaks of, or else by the name."""
    matches = [(re.fullmatch(pattern, str(name)), i) for i, name in enumerate(stored.names)]
    return {match.groupdict().get("weight", match.string): i for match, i in matches if match}


def _in_order(found: list[str], weights: Sequence[str]) -> list[str]:
    """Names of weights in the model's order, as far as that is known; a weight seen later comes last otherwise."""
    bare = [weight.removesuffix(":0") for weight in weights]
    places = {x: [i for i, weight in enumerate(bare) if x == weight or x.endswith("/" + weight)] for x in found}
    if not all(places.values()):
        return found
    return sorted(found, key=lambda x: places[x][0])


def _by_shapes(stored: _Stored, elements: int) -> Checkpoint:
    """The checkpoint, if exactly one layout fits the shapes, or one of those has the right number of elements."""
    layouts = [layout for layout in _LAYOUTS if layout.dialect in stored.dialects]
    # Two layouts may be one and the same: with a single weight, pairs are groups.
    fits: dict[Any, tuple[_Layout, _Parsed]] = {}
    for layout, extras in [(x, extras) for x in layouts for extras in x.extras]:
        parsed = _parse(layout, extras, stored.arrays)
        if parsed is not None:
            fits.setdefault((parsed.key(), extras > 0), (layout, parsed))
    shapes = ", ".join(str(x.shape) for x in stored.arrays)
    if not fits:
        raise ValueError(_NO_FIT.format(shapes=shapes, layouts="; ".join(layout.text for layout in layouts)))
    if len(fits) > 1:  # a scalar may be a weight
        right = {key: fit for key, fit in fits.items() if sum(stored.arrays[i].size for i in fit[1].m) == elements}
        fits = right or fits
    if len(fits) > 1:
        texts = "; ".join(layout.text for layout, _ in fits.values())
        dialects = " or ".join(sorted({repr(layout.dialect) for layout, _ in fits.values()}))
        raise ValueError(_AMBIGUOUS.format(shapes=shapes, layouts=texts, dialects=dialects))
    ((layout, parsed),) = fits.values()
    return _checkpoint(layout.dialect, stored, parsed.scalars, parsed.m, parsed.v, None if parsed.extras else False)


class _Parsed(NamedTuple):
    """Places of the arrays under a layout."""

    scalars: dict[str, list[int]]
    m: list[int]
    v: list[int]
    extras: int

    def key(self) -> tuple[Any, ...]:
        """Equal for equal readings."""
        return (*map(tuple, self.scalars.values()), tuple(self.m), tuple(self.v))


def _parse(layout: _Layout, extras: int, arrays: list[np.ndarray]) -> _Parsed | None:
    """The places of the arrays, if the layout fits."""
    scalars = len(layout.before + layout.between + layout.behind)
    weights, left_over = divmod(len(arrays) - scalars, extras + 2)
    if weights < 1 or left_over:
        return None
    places = iter(range(len(arrays)))
    before, extra, between, moments, behind = (
        list(itertools.islice(places, count))
        for count in (len(layout.before), extras * weights, len(layout.between), 2 * weights, len(layout.behind))
    )
    m, v = (moments[0::2], moments[1::2]) if layout.paired else (moments[:weights], moments[weights:])
    like = [arrays[i].shape for i in m]
    if [arrays[i].shape for i in v] != like or [arrays[i].shape for i in extra] != extras * like:
        return None
    letters = list(zip(layout.before + layout.between + layout.behind, before + between + behind, strict=True))
    if any(arrays[i].shape for _, i in letters):
        return None
    roles = {"iterations": "i", "product": "p", "rate": "l"}
    return _Parsed({role: [i for x, i in letters if x == letter] for role, letter in roles.items()}, m, v, extras)


def _checkpoint(
    dialect: str,
    stored: _Stored,
    scalars: Mapping[str, list[int]],
    m: list[int],
    v: list[int],
    accumulates: bool | None,
) -> Checkpoint:
    """The record of the arrays in these places."""
    values = {role: [stored.arrays[i].item() for i in places] for role, places in scalars.items()}
    (iterations,) = values["iterations"]
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"the number of iterations must be whole and not negative, got {iterations!r}.")
    return Checkpoint(
        dialect=dialect,
        iterations=int(iterations),
        product=next(iter(values["product"]), None),
        rate=next(iter(values["rate"]), None),
        m=[stored.arrays[i] for i in m],
        v=[stored.arrays[i] for i in v],
        accumulates=accumulates,
        config=stored.config,
    )


def _read_file(path: str) -> _Stored:
    """The optimizer's arrays in a file of any kind."""
    if zipfile.is_zipfile(path):
        return _read_keras(path)
    with _h5py().File(path, "r") as file:
        if "optimizer_weights" in file:
            return _read_names(file)
        return _read_numbers(file, path)


def _h5py() -> Any:
    """The package that reads HDF5."""
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError("reading a Keras file needs the package h5py: pip install h5py.") from error


def _read_keras(path: str) -> _Stored:
    """A ``.keras`` file: a zip archive of the config and a file of weights."""
    with zipfile.ZipFile(path) as archive:
        members = ("metadata.json", "config.json", "model.weights.h5")
        missing = [name for name in members if name not in archive.namelist()]
        if missing:
            raise ValueError(f"{path} is no .keras file: it lacks {', '.join(missing)}.")
        metadata, model, weights = (archive.read(name) for name in members)
    config = (json.loads(model).get("compile_config") or {}).get("optimizer")
    version = json.loads(metadata)["keras_version"]
    with _h5py().File(io.BytesIO(weights), "r") as file:
        stored = _read_numbers(file, path)
    return stored._replace(config=config, dialects=["tf_keras" if int(version.split(".")[0]) < 3 else "keras"])


def _read_numbers(file: Any, path: str) -> _Stored:
    """A file of weights by number."""
    arrays = file.get("optimizer/vars")
    if not arrays:
        raise ValueError(_NO_STATE.format(path=path, hint=_LEGACY_KERAS))
    numbers = sorted(arrays, key=int)
    return _Stored([np.asarray(arrays[i]) for i in numbers], [None] * len(numbers), dialects=["keras", "tf_keras"])


def _read_names(file: Any) -> _Stored:
    """A file of weights by name."""
    optimizer, model = file["optimizer_weights"], file.get("model_weights", {})
    names = _attribute(optimizer, "weight_names")
    layers = _attribute(model, "layer_names") if model else []
    training = json.loads(file.attrs.get("training_config", "{}"))
    return _Stored(
        [np.asarray(optimizer[name]) for name in names],
        names,
        [name for layer in layers for name in _attribute(model[layer], "weight_names")],
        training.get("optimizer_config"),
    )


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; a long one is split into numbered parts."""
    parts = [name] if name in group.attrs else itertools.takewhile(group.attrs.__contains__, _numbered(name))
    return [x.decode() if isinstance(x, bytes) else str(x) for part in parts for x in group.attrs[part]]


def _numbered(name: str) -> Iterable[str]:
    return (f"{name}{i}" for i in itertools.count())
