"""Keras' checkpoints that are read by name: TensorFlow's, and the trees of names that Keras 3 and Orbax write.

Each is a mapping of names to arrays, in no order that means anything. Every moment is matched with the weight that its
name names, and with no other.
"""

import collections
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from optax_nadam.compat._common import as_numpy
from optax_nadam.compat._keras_files import Stored, import_for_reading

_TRAINABLE = "trainable_variables/"
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NUMBERED = "/_variables/"
_SLOT = "{weight}/.OPTIMIZER_SLOT/optimizer/{slot}"

_NO_GRAPH = (
    f"source numbers its moments ({{name}}) and lacks {_GRAPH!r}, which says whose they are. Pass the path of the"
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


def read_tensorflow(path: str) -> Stored:
    """A TensorFlow checkpoint, by its prefix or the directory of the latest."""
    reader = import_for_reading("tensorflow").train.load_checkpoint(path)
    return read_mapping({name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})


def read_orbax(path: str) -> Stored:
    """The directory of a tree that Orbax wrote."""
    orbax = import_for_reading("orbax.checkpoint", "orbax-checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        return read_mapping(checkpointer.restore(os.path.abspath(path)))


def read_mapping(tree: Mapping[str, Any]) -> Stored:
    """A mapping of names to arrays, or of names to such mappings."""
    flat = dict(_flatten(tree, ""))
    weights = {name: x for name, x in flat.items() if name.startswith(_TRAINABLE)}
    return _state_tree(flat, weights) if weights else _tensorflow(flat)


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Names with slashes, and arrays."""
    for name, x in tree.items():
        if isinstance(x, Mapping):
            yield from _flatten(x, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", x


def _state_tree(flat: Mapping[str, Any], weights: Mapping[str, Any]) -> Stored:
    """What ``get_state_tree()`` of a Keras 3 model returns. A moment has its weight's path, with _ for every /."""
    keys = {name.removeprefix(_TRAINABLE): as_numpy(x) for name, x in weights.items()}
    by_name: dict[str, str] = {}
    for key in keys:
        other = by_name.setdefault(key.replace("/", "_"), key)
        if other != key:
            raise ValueError(_EQUAL_NAMES.format(first=other, second=key))
    optimizer = {name: as_numpy(x) for name, x in flat.items() if name.startswith("optimizer_variables/")}
    return Stored(
        list(optimizer.values()),
        list(optimizer),
        weights=list(by_name),
        values=list(keys.values()),
        keys=list(keys),
        dialects=["keras"],
    )


def _tensorflow(flat: Mapping[str, Any]) -> Stored:
    """What TensorFlow wrote: ``tf.train.Checkpoint`` since TensorFlow 2, or a ``Saver``."""
    numbered = next((name for name in flat if _NUMBERED in name), None)
    if numbered and _GRAPH not in flat:
        raise ValueError(_NO_GRAPH.format(name=numbered))
    renamed = _slots(_nodes(flat[_GRAPH])) if numbered else {}
    arrays = {renamed.get(name, name).removesuffix(_VALUE): as_numpy(x) for name, x in flat.items()}
    arrays = {name: x for name, x in arrays.items() if x.dtype.kind not in "OSU"}  # without texts
    names, values = list(arrays), list(arrays.values())
    return Stored(values, names, weights=names, values=values, keys=names, config=_config(arrays))


def _nodes(graph: Any) -> Any:
    """The nodes of an object graph."""
    module = import_for_reading("tensorflow.core.protobuf.trackable_object_graph_pb2", "tensorflow")
    return module.TrackableObjectGraph.FromString(bytes(as_numpy(graph).item())).nodes


def _slots(nodes: Any) -> dict[str, str]:
    """The moments of a Nadam since TensorFlow 2.11, which have numbers, under names as those of the Nadam before it."""
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
    """The weight of a moment of the name ``m/<weight>`` or ``<optimizer>/m/<weight>``."""
    names = {name.removeprefix(f"{slot}/"), name.partition(f"/{slot}/")[2]} & (keys.keys() - {name})
    found = [key for weight in names for key in keys[weight]]
    if len(found) != 1:
        raise ValueError(_NOT_ONE_WEIGHT.format(count=len(found), name=name))
    return found[0]


def _config(arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The config of a legacy Nadam, whose hyperparameters are variables, but for epsilon."""
    scope = next((name.removesuffix("momentum_cache") for name in arrays if name.endswith("momentum_cache")), None)
    names = ("learning_rate", "beta_1", "beta_2", "decay")
    if scope is None or any(scope + name not in arrays for name in names):
        return None
    # The decimal number that was rounded to float32: 0.9, not 0.8999999761581421.
    return {"name": "Nadam", "epsilon": None} | {name: float(str(np.float32(arrays[scope + name]))) for name in names}
