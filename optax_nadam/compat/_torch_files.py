"""Where the optimizer and the scheduler are in what torch programs save: directories, files and dicts."""

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optax_nadam.compat._common import without

_SOURCE = (
    "source must be what {optimizer}.state_dict() returns, with the keys 'state' and 'param_groups', or a file or a"
    " directory that holds it, got {got}. {advice}"
)
_PART = "From a checkpoint of several parts, pass the optimizer's: {parts}."
_SEVERAL = "{where} holds {count} optimizers. Pass one of them: {example}."
_NO_CHECKPOINT = (
    "{path} is a directory without a known checkpoint: it must have optimizer.pt (Trainer of transformers) or"
    " optimizer.bin (accelerate). Pass the optimizer's file, or what torch.load makes of it."
)
_NOT_PLAIN = (
    "{path} holds more than tensors and plain data: {error} If you trust it, pass torch.load({path!r},"
    " weights_only=False)."
)


_WRITERS = {".pt": "by the Trainer of transformers", ".bin": "by accelerate"}


class Opened(NamedTuple):
    """The parts of a source.

    Attributes:
      optimizer: ``{"state": ..., "param_groups": ...}``; no groups where the source has names alone.
      scheduler: the state of its learning rate scheduler, where the source has one.
      steps: the number of steps that the run was to take, where the source tells it.
      weights: the model's weights by name, where they are beside.
      version: what wrote it, where that shows.
      logged: steps with the learning rates that were logged at them.
    """

    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None = None
    steps: int | None = None
    weights: Mapping[str, Any] | None = None
    version: str = ""
    logged: Sequence[tuple[int, float]] = ()


def opened(source: Any, optimizer: str) -> Opened:
    """The parts of a path, of a whole checkpoint, or of what an optimizer's ``state_dict()`` returns."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _directory(path, optimizer) if path.is_dir() else opened(_load(path), optimizer)
    if isinstance(source, Mapping) and "optimizer_states" in source:
        return _lightning(source, optimizer)
    return Opened(_nested(source, optimizer))


def _load(path: Path) -> Any:
    """What is in a file of torch's, which must be plain data."""
    if not path.exists():
        raise FileNotFoundError(f"source is the path {path}, where there is no file and no directory.")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package torch: pip install torch.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(_NOT_PLAIN.format(path=str(path), error=str(error).partition("\n")[0])) from error


def _directory(path: Path, optimizer: str) -> Opened:
    """A checkpoint of the Trainer of transformers, or what ``save_state`` of accelerate wrote."""
    files = [file for file in sorted(path.glob("optimizer*")) if file.suffix in _WRITERS]
    if not files:
        raise ValueError(_NO_CHECKPOINT.format(path=path))
    if len(files) > 1:
        raise ValueError(_SEVERAL.format(where=path, count=len(files), example=repr(str(files[1]))))
    scheduler, state = path / f"scheduler{files[0].suffix}", path / "trainer_state.json"
    progress = json.loads(state.read_text()) if state.exists() else {}
    log = progress.get("log_history", ()) if isinstance(progress, Mapping) else ()
    return opened(_load(files[0]), optimizer)._replace(
        scheduler=_load(scheduler) if scheduler.exists() else None,
        steps=progress.get("max_steps") if isinstance(progress, Mapping) else None,
        weights=_safetensors(path / "model.safetensors"),
        version=_WRITERS[files[0].suffix],
        logged=[(entry["step"], entry["learning_rate"]) for entry in log if {"step", "learning_rate"} <= set(entry)],
    )


def _safetensors(path: Path) -> Mapping[str, Any] | None:
    """The weights in a file, where there is one and the package that reads it; they are not needed."""
    try:
        return importlib.import_module("safetensors.torch").load_file(path) if path.exists() else None
    except ImportError:
        return None


def _lightning(source: Mapping[str, Any], optimizer: str) -> Opened:
    """A checkpoint of Lightning's Trainer."""
    states, schedulers = source["optimizer_states"], source.get("lr_schedulers") or [None]
    if len(states) != 1:
        example = "checkpoint['optimizer_states'][0], and checkpoint['lr_schedulers'][0] as scheduler of read"
        raise ValueError(_SEVERAL.format(where="source['optimizer_states']", count=len(states), example=example))
    scheduler = schedulers[0] if len(schedulers) == 1 else None
    # Of averaged weights state_dict is the average.
    weights = None if "current_model_state" in source else source.get("state_dict")
    return Opened(_nested(states[0], optimizer), scheduler, weights=weights, version="by Lightning")


def _nested(source: Any, optimizer: str) -> Mapping[str, Any]:
    """A checkpoint as ``{"state": ..., "param_groups": ...}``, which may be flattened to ``state.<name>.<key>``."""
    if isinstance(source, Mapping):
        if {"state", "param_groups"} <= set(source):
            return source
        if source and all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in source):
            return _unflattened(source)
    got = f"the keys {sorted(map(str, source))[:10]}" if isinstance(source, Mapping) else type(source).__name__
    raise ValueError(_SOURCE.format(optimizer=optimizer, got=got, advice=_PART.format(parts=_parts(source))))


def _parts(source: Any) -> str:
    """The places of the optimizers in a checkpoint of several parts."""
    found = []
    for key, part in source.items() if isinstance(source, Mapping) else ():
        found += [f"source[{key!r}]"] if isinstance(part, Mapping) and {"state", "param_groups"} <= set(part) else []
    return " or ".join(found) or "checkpoint['optimizer']"


def _unflattened(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """What torch.distributed wrote with ``flatten_optimizer_state_dict=True``, in its usual form."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for path, value in source.items():
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        parts[part].setdefault(name, {})[key] = value
    options = parts["param_groups"] or {name: {} for name in parts["state"]}  # names are all that matters
    groups: dict[str, dict[str, Any]] = {}
    for name, values in options.items():
        own = without(values, ("params", "param_names"))
        groups.setdefault(repr(sorted(own.items())), {**own, "params": []})["params"].append(name)
    return {"state": parts["state"], "param_groups": list(groups.values())}
