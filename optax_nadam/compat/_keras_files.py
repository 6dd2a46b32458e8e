"""Keras' own files, read into the optimizer's arrays with all that tells what they are."""

import importlib
import io
import itertools
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_NO_STATE = (
    "{path} holds no optimizer state: a .keras or .weights.h5 file never has that of a legacy optimizer; save the"
    " model as .h5, or its optimizer.get_weights()."
)


class Stored(NamedTuple):
    """The arrays of an optimizer, as a source has them.

    Attributes:
      arrays: the arrays, in the order of the source.
      names: their names, or None each.
      weights: the names of the model's weights, as the optimizer's arrays have them in theirs, in order, where known.
      values: the model's weights, likewise.
      keys: the names under which ``to_params`` gets weights and moments; None where it gets a list.
      config: the optimizer's config, where known.
      dialects: which may have written this; empty for any.
    """

    arrays: Sequence[np.ndarray]
    names: Sequence[str | None]
    weights: Sequence[str] = ()
    values: Sequence[np.ndarray] = ()
    keys: Sequence[str] | None = None
    config: Mapping[str, Any] | None = None
    dialects: Sequence[str] = ()


def read_file(path: str) -> Stored:
    """The optimizer's arrays in a ``.h5``, ``.weights.h5`` or ``.keras`` file."""
    if zipfile.is_zipfile(path):
        return _read_archive(path)
    with import_for_reading("h5py").File(path, "r") as file:
        return _read_names(file) if "optimizer_weights" in file else _read_numbers(file, path)


def import_for_reading(name: str, package: str | None = None) -> Any:
    """A module of a package that only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name
        raise ImportError(f"reading this source needs the package {package}: pip install {package}.") from error


def _read_archive(path: str) -> Stored:
    """A ``.keras`` file: a zip archive of the config and a file of weights."""
    with zipfile.ZipFile(path) as archive:
        members = ("metadata.json", "config.json", "model.weights.h5")
        missing = [name for name in members if name not in archive.namelist()]
        if missing:
            raise ValueError(f"{path} is no .keras file: it lacks {', '.join(missing)}.")
        metadata, model, weights = (archive.read(name) for name in members)
    config = (json.loads(model).get("compile_config") or {}).get("optimizer")
    version = json.loads(metadata)["keras_version"]
    with import_for_reading("h5py").File(io.BytesIO(weights), "r") as file:
        stored = _read_numbers(file, path)
    return stored._replace(config=config, dialects=["tf_keras" if int(version.split(".")[0]) < 3 else "keras"])


def _read_numbers(file: Any, path: str) -> Stored:
    """A file of weights by number."""
    arrays = file.get("optimizer/vars")
    if not arrays:
        raise ValueError(_NO_STATE.format(path=path))
    numbers = sorted(arrays, key=int)
    return Stored([np.asarray(arrays[i]) for i in numbers], [None] * len(numbers), dialects=["keras", "tf_keras"])


def _read_names(file: Any) -> Stored:
    """A file of weights by name."""
    optimizer, model = file["optimizer_weights"], file.get("model_weights", {})
    names = _attribute(optimizer, "weight_names")
    layers = [model[name] for name in (_attribute(model, "layer_names") if model else [])]
    weights = {(layer.name, name): layer[name] for layer in layers for name in _attribute(layer, "weight_names")}
    training = json.loads(file.attrs.get("training_config", "{}"))
    return Stored(
        [np.asarray(optimizer[name]) for name in names],
        names,
        weights=[_in_optimizer(name) for _, name in weights],
        values=[np.asarray(x) for x in weights.values()],
        config=training.get("optimizer_config"),
    )


def _in_optimizer(name: str) -> str:
    """The name of a weight as its moments have it in theirs; that of Keras 3 has _ for every /."""
    return name.removesuffix(":0") if name.endswith(":0") else name.replace("/", "_")


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; a long one is split into numbered parts."""
    parts = [name] if name in group.attrs else itertools.takewhile(group.attrs.__contains__, _numbered(name))
    return [x.decode() if isinstance(x, bytes) else str(x) for part in parts for x in group.attrs[part]]


def _numbered(name: str) -> Iterable[str]:
    """The names of the parts of a long attribute."""
    return (f"{name}{i}" for i in itertools.count())
