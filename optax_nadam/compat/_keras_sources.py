"""What Keras' optimizers are read from: lists, mappings, files and directories, each put into one form."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from optax_nadam.compat import _keras_config as configs
from optax_nadam.compat._common import as_numpy
from optax_nadam.compat._keras_files import Stored, read_file
from optax_nadam.compat._keras_named import read_mapping, read_orbax, read_tensorflow

# What a directory holds that tells its kind, the place of the checkpoint in it, and its reader.
_DIRECTORIES = (
    ("latest.weights.h5", "latest.weights.h5", read_file),  # BackupAndRestore of Keras 3
    ("saved_model.pb", os.path.join("variables", "variables"), read_tensorflow),
    ("checkpoint", "", read_tensorflow),
    ("pytree", "pytree", read_orbax),  # a step of the callback OrbaxCheckpoint
    ("_METADATA", "", read_orbax),
)
_NO_SOURCE = (
    "source must be a path, a list of arrays or variables, or a mapping of names to arrays or mappings, got {source!r}."
)
_NO_CHECKPOINT = (
    "{path} is a directory without a checkpoint that is known: one with a file latest.weights.h5, saved_model.pb or"
    " checkpoint, or one that Orbax wrote."
)


def read_source(source: Any, dialect: str | None = None) -> Stored:
    """The arrays of an optimizer in a source of any kind, by this dialect if one is given."""
    if dialect is not None:
        configs.check_dialect(dialect)
        return read_source(source)._replace(dialects=[dialect])
    if isinstance(source, str | os.PathLike):
        return _read_path(os.fspath(source))
    if isinstance(source, Mapping):
        return read_mapping(source)
    if not isinstance(source, Iterable):
        raise ValueError(_NO_SOURCE.format(source=source))
    items = list(source)
    return Stored([as_numpy(x) for x in items], [_name_of(x) for x in items])


def _name_of(variable: Any) -> str | None:
    """A variable's name, with its path where it has one; None for a plain array."""
    return getattr(variable, "path", None) or getattr(variable, "name", None)


def _read_path(path: str) -> Stored:
    """A file, a directory, or the prefix of the files of a TensorFlow checkpoint."""
    if os.path.isdir(path):
        return _read_directory(path)
    return read_tensorflow(path) if os.path.exists(f"{path}.index") else read_file(path)


def _read_directory(path: str) -> Stored:
    """The latest checkpoint in a directory."""
    inside = os.listdir(path)
    for mark, place, read in _DIRECTORIES:
        if mark in inside:
            return read(os.path.join(path, place))
    steps = sorted((name for name in inside if name.isdigit()), key=int)  # the steps of OrbaxCheckpoint
    if not steps and "chief" not in inside:  # that is BackupAndRestore of tf_keras
        raise ValueError(_NO_CHECKPOINT.format(path=path))
    return _read_directory(os.path.join(path, steps[-1] if steps else "chief"))
