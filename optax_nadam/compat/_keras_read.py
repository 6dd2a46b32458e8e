"""Readers of Keras' checkpoints: lists, mappings, files and directories become one record of arrays with names.

The names in a mapping have no order. TensorFlow's checkpoints and the trees of Keras 3 are such mappings: each moment
belongs to the weight that its name contains.
"""

import collections
import importlib
import io
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_nadam import _validation as validation
from optax_nadam.compat._account import parse_number
from optax_nadam.compat._common import as_numpy, listed

DIALECTS = ("keras", "tf_keras", "legacy")

_TRAINABLE = "trainable_variables/"
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NUMBERED = "/_variables/"
_SLOT = "{weight}/.OPTIMIZER_SLOT/optimizer/{slot}"

_NO_SOURCE = (
    "source must be a path, a list of arrays or variables, or a mapping of names to arrays or mappings, got {source!r}."
    " Of a model, pass model.optimizer.variables."
)
_NO_CHECKPOINT = (
    "{path} is a directory without a known checkpoint: it must contain latest.weights.h5, saved_model.pb or checkpoint,"
    " or be written by Orbax."
)
_NO_STATE = (
    "{path} holds no optimizer state: a .keras or .weights.h5 file never has that of a legacy optimizer; save the"
    " model as .h5, or its optimizer.get_weights()."
)
_NO_GRAPH = (
    f"source numbers its moments ({{name}}) and lacks {_GRAPH!r}, which names their weights. Pass the path of the"
    " checkpoint, or the mapping with all names that tf.train.load_checkpoint has."
)
_NOT_ONE_WEIGHT = (
    "source has {count} weights that the moment {name!r} may belong to. Pass the list optimizer.variables instead,"
    " which is in the order of the weights."
)
_EQUAL_NAMES = (
    "source has two weights, {first!r} and {second!r}, whose moments have one name. Pass the list optimizer.variables"
    " instead, which is in the order of the weights."
)


class Stored(NamedTuple):
    """What a source stores of an optimizer and its model."""

    arrays: Sequence[np.ndarray]  # in the order of the source
    names: Sequence[str | None]  # of the arrays; None for an array without a name
    weights: Sequence[str] = ()  # names of the model's weights, as those of their moments contain them, where known
    values: Sequence[np.ndarray] = ()  # of these weights
    keys: Sequence[str] | None = None  # of these weights, for ``to_params``; None where it gets a list
    config: Mapping[str, Any] | None = None  # the optimizer's, where stored
    dialects: Sequence[str] = DIALECTS  # that may have written the source


def read_source(source: Any, dialect: str | None = None) -> Stored:
    """What a source of any kind stores; its dialect, if one is given."""
    if dialect is not None:
        validation.check_choice("dialect", dialect, DIALECTS)
        return read_source(source)._replace(dialects=[dialect])
    if isinstance(source, str | os.PathLike):
        return _read_path(os.fspath(source))
    if isinstance(source, Mapping):
        return _read_mapping(source)
    if not isinstance(source, Iterable):
        raise ValueError(_NO_SOURCE.format(source=source))
    items = list(source)
    names = [getattr(x, "path", None) or getattr(x, "name", None) for x in items]
    return Stored([as_numpy(x) for x in items], names)


# Paths.


def _read_path(path: str) -> Stored:
    """A file, a directory, or the prefix of the files of a TensorFlow checkpoint."""
    if os.path.isdir(path):
        return _read_directory(path)
    return _read_tensorflow(path) if os.path.exists(f"{path}.index") else _read_file(path)


def _read_directory(path: str) -> Stored:
    """The latest checkpoint in a directory."""
    inside = os.listdir(path)
    for mark, place, read in _DIRECTORIES:
        if mark in inside:
            return read(os.path.join(path, place))
    steps = sorted((name for name in inside if name.isdigit()), key=int)  # the steps of OrbaxCheckpoint
    if not steps and "chief" not in inside:  # BackupAndRestore of tf_keras has "chief"
        raise ValueError(_NO_CHECKPOINT.format(path=path))
    return _read_directory(os.path.join(path, steps[-1] if steps else "chief"))


def _read_tensorflow(path: str) -> Stored:
    """A TensorFlow checkpoint: its prefix, or the directory of the latest."""
    reader = _import("tensorflow").train.load_checkpoint(path)
    return _read_mapping({name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})


def _read_orbax(path: str) -> Stored:
    """The directory of a tree that Orbax wrote."""
    with _import("orbax.checkpoint", "orbax-checkpoint").StandardCheckpointer() as checkpointer:
        return _read_mapping(checkpointer.restore(os.path.abspath(path)))


def _read_file(path: str) -> Stored:
    """A ``.h5``, ``.weights.h5``, ``.weights.json`` or ``.keras`` file."""
    if path.endswith(".json"):
        return _read_shards(path)
    if zipfile.is_zipfile(path):
        return _read_archive(path)
    with _import("h5py").File(path, "r") as file:
        return _read_names(file) if "optimizer_weights" in file else _read_numbers(file, path)


# The file that tells the kind of a directory, the place of the checkpoint in it, and the reader.
_DIRECTORIES = (
    ("latest.weights.h5", "latest.weights.h5", _read_file),  # BackupAndRestore of Keras 3
    ("saved_model.pb", os.path.join("variables", "variables"), _read_tensorflow),
    ("checkpoint", "", _read_tensorflow),
    ("pytree", "pytree", _read_orbax),  # a step of the callback OrbaxCheckpoint
    ("_METADATA", "", _read_orbax),
)


def _import(module: str, package: str | None = None) -> Any:
    """A module of a package that only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ImportError(f"reading this source needs the package {package}: pip install {package}.") from error


# Keras' files.


def _read_archive(path: str) -> Stored:
    """A ``.keras`` file: a zip archive of the config and a file of weights."""
    with zipfile.ZipFile(path) as archive:
        members = ("metadata.json", "config.json", "model.weights.h5")
        missing = [name for name in members if name not in archive.namelist()]
        if missing:
            raise ValueError(f"{path} is no .keras file: it lacks {', '.join(missing)}.")
        metadata, model, weights = (archive.read(name) for name in members)
    config = (json.loads(model).get("compile_config") or {}).get("optimizer")
    major = int(json.loads(metadata)["keras_version"].split(".")[0])
    with _import("h5py").File(io.BytesIO(weights), "r") as file:
        stored = _read_numbers(file, path)
    return stored._replace(config=config, dialects=["tf_keras" if major < 3 else "keras"])


def _read_shards(path: str) -> Stored:
    """The files that ``save_weights(..., max_shard_size=)`` wrote, of which a ``.weights.json`` tells."""
    with open(path) as file:
        shards = (json.load(file).get("weight_map") or {}).get("/optimizer/vars", [])
    arrays: dict[str, np.ndarray] = {}
    for shard in [shards] if isinstance(shards, str) else shards:
        with _import("h5py").File(os.path.join(os.path.dirname(path), shard), "r") as file:
            arrays |= {name: np.asarray(x) for name, x in file["optimizer/vars"].items()}
    return _numbered(arrays, path)


def _read_numbers(file: Any, path: str) -> Stored:
    """A file that numbers the optimizer's arrays."""
    return _numbered({name: np.asarray(x) for name, x in (file.get("optimizer/vars") or {}).items()}, path)


def _numbered(arrays: Mapping[str, np.ndarray], path: str) -> Stored:
    """Arrays in the order of the numbers that they have for names."""
    if not arrays:
        raise ValueError(_NO_STATE.format(path=path))
    if missing := set(map(str, range(len(arrays)))) - set(arrays):
        raise ValueError(f"{path} lacks the optimizer's arrays {', '.join(sorted(missing))}: it is not complete.")
    in_order = [arrays[name] for name in sorted(arrays, key=int)]
    return Stored(in_order, [None] * len(in_order), dialects=["keras", "tf_keras"])


def _read_names(file: Any) -> Stored:
    """A file that names the optimizer's arrays."""
    optimizer, model = file["optimizer_weights"], file.get("model_weights", {})
    names = _attribute(optimizer, "weight_names")
    layers = [model[name] for name in (_attribute(model, "layer_names") if model else [])]
    weights = {(layer.name, name): layer.get(name) for layer in layers for name in _attribute(layer, "weight_names")}
    missing = [name for name in names if name not in optimizer] + [
        name for (_, name), x in weights.items() if x is None
    ]
    if missing:
        raise ValueError(f"the file names the arrays {listed(missing)}, but lacks them: it is not complete.")
    return Stored(
        [np.asarray(optimizer[name]) for name in names],
        names,
        weights=[_in_optimizer(name) for _, name in weights],
        values=[np.asarray(x) for x in weights.values()],
        config=json.loads(file.attrs.get("training_config", "{}")).get("optimizer_config"),
    )


def _in_optimizer(name: str) -> str:
    """The name of a weight as those of its moments contain it; Keras 3 replaces each / by _."""
    return name.removesuffix(":0") if name.endswith(":0") else name.replace("/", "_")


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; a long one is stored in numbered parts."""
    numbered = (f"{name}{i}" for i in itertools.count())
    parts = [name] if name in group.attrs else itertools.takewhile(group.attrs.__contains__, numbered)
    return [x.decode() if isinstance(x, bytes) else str(x) for part in parts for x in group.attrs[part]]


# Mappings of names.


def _read_mapping(tree: Mapping[str, Any]) -> Stored:
    """A mapping of names to arrays, or of names to such mappings."""
    flat = dict(_flatten(tree, ""))
    weights = {name.removeprefix(_TRAINABLE): as_numpy(x) for name, x in flat.items() if name.startswith(_TRAINABLE)}
    return _state_tree(flat, weights) if weights else _tensorflow(flat)


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Names with slashes, and arrays."""
    for name, x in tree.items():
        if isinstance(x, Mapping):
            yield from _flatten(x, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", x


def _state_tree(flat: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Stored:
    """The ``get_state_tree()`` of a Keras 3 model. The name of a moment is its weight's, with _ in place of each /."""
    keys: dict[str, str] = {}
    for key in weights:
        other = keys.setdefault(key.replace("/", "_"), key)
        if other != key:
            raise ValueError(_EQUAL_NAMES.format(first=other, second=key))
    optimizer = {name: as_numpy(x) for name, x in flat.items() if name.startswith("optimizer_variables/")}
    values = list(weights.values())
    return Stored(list(optimizer.values()), list(optimizer), list(keys), values, list(weights), dialects=["keras"])


def _tensorflow(flat: Mapping[str, Any]) -> Stored:
    """The names of a ``tf.train.Checkpoint`` of TensorFlow 2, or of a ``Saver``."""
    numbered = next((name for name in flat if _NUMBERED in name), None)
    if numbered and _GRAPH not in flat:
        raise ValueError(_NO_GRAPH.format(name=numbered))
    renamed = _slots(_nodes(flat[_GRAPH])) if numbered else {}
    arrays = {renamed.get(name, name).removesuffix(_VALUE): as_numpy(x) for name, x in flat.items()}
    names, values = list(arrays), list(arrays.values())
    return Stored(values, names, weights=names, values=values, keys=names, config=_config(arrays))


def _nodes(graph: Any) -> Any:
    """The nodes of an object graph."""
    module = _import("tensorflow.core.protobuf.trackable_object_graph_pb2", "tensorflow")
    return module.TrackableObjectGraph.FromString(bytes(as_numpy(graph).item())).nodes


def _slots(nodes: Any) -> dict[str, str]:
    """New names for the numbered moments of TensorFlow from 2.11, like those of TensorFlow up to 2.10."""
    keys = collections.defaultdict[str, list[str]](list)
    for attribute in (attribute for node in nodes for attribute in node.attributes):
        keys[attribute.full_name].append(attribute.checkpoint_key.removesuffix(_VALUE))
    renamed = {}
    for slot, list_name in (("m", "_momentums"), ("v", "_velocities")):
        lists = [nodes[child.node_id] for node in nodes for child in node.children if child.local_name == list_name]
        for moment in (nodes[child.node_id].attributes[0] for numbered in lists for child in numbered.children):
            weight = _one_weight(moment.full_name, slot, keys)
            renamed[moment.checkpoint_key] = _SLOT.format(weight=weight, slot=slot)
    return renamed


def _one_weight(name: str, slot: str, keys: Mapping[str, list[str]]) -> str:
    """The weight of a moment with the name ``m/<weight>`` or ``<optimizer>/m/<weight>``."""
    names = {name.removeprefix(f"{slot}/"), name.partition(f"/{slot}/")[2]} & (keys.keys() - {name})
    found = [key for weight in names for key in keys[weight]]
    if len(found) != 1:
        raise ValueError(_NOT_ONE_WEIGHT.format(count=len(found), name=name))
    return found[0]


def _config(arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The config of a legacy Nadam, which stores its hyperparameters, but for epsilon, as variables."""
    scope = next((name.removesuffix("momentum_cache") for name in arrays if name.endswith("momentum_cache")), None)
    names = ("learning_rate", "beta_1", "beta_2", "decay")
    if scope is None or any(scope + name not in arrays for name in names):
        return None
    # The decimal number that was rounded to float32: 0.9, not 0.8999999761581421.
    return {"name": "Nadam", "epsilon": None} | {
        name: float(str(np.float32(parse_number(f"{scope}{name}", arrays[scope + name])))) for name in names
    }
