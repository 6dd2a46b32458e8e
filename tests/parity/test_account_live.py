"""Files of the real frameworks in which one thing is wrong: refused, or loaded as if they were right.

The faults and the account of them are those of tests/compat/test_account.py, on what Keras 3, tf_keras, TensorFlow and
torch write.

============ =========================================================================================================
files        each array of ``.h5``, ``.keras`` and ``.weights.h5`` removed, added, renamed, exchanged, spoiled
other class  what other optimizers of Keras save, alone, wrapped, and two of them
shards       are read; one that is missing is named
names        layers of equal names, frozen, and trained later than the others, are right or refused
directories  of the Trainer and accelerate, with a part missing, broken, or too many; what torch.distributed writes
============ =========================================================================================================
"""

import itertools
import json
import pathlib
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tests.parity.keras_sources  # noqa: F401  # which sets the backend of Keras

# isort: split
import h5py
import keras
import numpy as np
import tensorflow as tf
import tf_keras
import torch
from jax import numpy as jnp
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from optax_nadam import NadamConfig, compat, get_state
from optax_nadam.compat import keras as ours
from tests.compat.test_account import listed
from tests.parity.problem import long_unless

pytestmark = [
    pytest.mark.lenient("Keras mixes dtypes under JAX"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tf_keras.*"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:the checkpoint stores no product:UserWarning"),
]
LR = 0.01
CONFIGS = {"keras": NadamConfig(learning_rate=LR, momentum_decay=1.0), "legacy": NadamConfig(learning_rate=LR)}
CONFIGS["tf_keras"] = CONFIGS["keras"]
PACKAGES = {"keras": keras, "tf_keras": tf_keras, "legacy": tf_keras}
NADAMS: dict[str, Any] = {
    "keras": keras.optimizers.Nadam,
    "tf_keras": tf_keras.optimizers.Nadam,
    "legacy": tf_keras.optimizers.legacy.Nadam,
}


def numbers(variable: Any) -> np.ndarray:
    return np.array(variable.numpy() if hasattr(variable, "numpy") else variable)


def a_model(package: Any) -> Any:
    """Layers of different shapes, but for two biases; their names sort in another order."""
    dense = [package.layers.Dense(units, name=name) for units, name in ((4, "z"), (2, "m"), (2, "a"))]
    return package.Sequential([package.Input((3,)), *dense])


def step(model: Any) -> None:
    """A step of the model's optimizer with random gradients."""
    rng, variables = np.random.default_rng(int(numbers(model.optimizer.iterations))), model.trainable_variables
    grads = [rng.normal(size=x.shape).astype(np.float32) for x in variables]
    as_tensor = jnp.asarray if isinstance(model, keras.Model) else tf.constant
    model.optimizer.apply_gradients(zip(map(as_tensor, grads), variables, strict=True))


def trained(dialect: str, optimizer: Any = None) -> Any:
    """A model that took some steps."""
    model = a_model(PACKAGES[dialect])
    model.compile(optimizer or NADAMS[dialect](LR), "mse")
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        model.optimizer.build(model.trainable_variables)  # which steps inside fit() only
        return model
    for _ in range(3):
        step(model)
    return model


def moments(dialect: str, model: Any, *layers: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the optimizer has, in the order of the model's trainable weights, or of those of some layers."""
    optimizer = model.optimizer
    variables = [x for layer in layers or [model] for x in layer.trainable_variables]
    if dialect == "legacy":
        m, v = ([optimizer.get_slot(x, slot) for x in variables] for slot in "mv")
    else:
        places = [
            optimizer._get_variable_index(x) if dialect == "keras" else optimizer._index_dict[optimizer._var_key(x)]
            for x in variables
        ]
        m, v = ([slots[i] for i in places] for slots in (optimizer._momentums, optimizer._velocities))
    return [numbers(x) for x in m], [numbers(x) for x in v]


def refusal(load: Callable[[], Any], is_right: Callable[[Any], bool]) -> str:
    """What is wrong with how a source is taken: nothing if it is refused, or loaded right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loaded = load()
    except (ValueError, TypeError, FileNotFoundError) as error:
        return "" if len(str(error)) > 60 else f"a short text: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if is_right(loaded) else "silently wrong"


class Truth:
    """A model's optimizer, and what is made of its files.

    Attributes:
      config: passed where there is no product in the source.
    """

    def __init__(self, dialect: str, model: Any) -> None:
        """Takes moments, weights and steps."""
        self.dialect, self.config = dialect, CONFIGS[dialect]
        self.m, self.v = moments(dialect, model)
        self.weights = [numbers(x) for x in model.trainable_variables]
        self.steps = int(numbers(model.optimizer.iterations))
        self.fresh = self.config.build().init(self.m)  # nothing changes it

    def load(self, source: Any) -> Any:
        """The state, and the weights where the source has them."""
        config = self.config if self.dialect == "tf_keras" else None
        state = get_state(ours.load_state(self.fresh, source, list, config=config))
        weights = ours.read(source, config=config).stored_weights
        return state, None if weights is None else list(weights.values())

    def is_right(self, loaded: Any) -> bool:
        """Whether these are the moments and the weights."""
        state, weights = loaded
        pairs = [*zip(state.m, self.m, strict=True), *zip(state.v, self.v, strict=True)]
        pairs += [] if weights is None else list(zip(weights, self.weights, strict=True))
        return int(state.count) == self.steps and all(np.array_equal(x, y) for x, y in pairs)

    def verdict(self, source: Any) -> str:
        """What is wrong with how a source is taken."""
        return refusal(lambda: self.load(source), self.is_right)


# Files with one fault.


def saved(model: Any, kind: str, path: pathlib.Path) -> pathlib.Path:
    place = path / f"model{kind}"
    (model.save_weights if kind == ".weights.h5" else model.save)(str(place))
    return place


def changed(path: pathlib.Path, change: Callable[[Any], None]) -> pathlib.Path:
    """A copy of a file with something changed in its HDF5."""
    copy = path.with_name(f"changed{path.name.removeprefix('model')}")
    if path.suffix != ".keras":
        shutil.copy(path, copy)
        with h5py.File(copy, "r+") as file:
            change(file)
        return copy
    inner = path.with_name("inner.h5")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            if name != "model.weights.h5":
                new.writestr(name, old.read(name))
        inner.write_bytes(old.read("model.weights.h5"))
        with h5py.File(inner, "r+") as file:
            change(file)
        new.write(inner, "model.weights.h5")
    return copy


def replace(file: Any, name: str, value: np.ndarray) -> None:
    """Puts an array of any shape in the place of another."""
    del file[name]
    file[name] = value


def exchange(file: Any, a: str, b: str) -> None:
    """Exchanges two arrays."""
    file.move(a, "kept")
    file.move(b, a)
    file.move("kept", b)


def arrays_of(file: Any, group: str) -> list[str]:
    """The names of the arrays under a group."""
    names: list[str] = []
    file[group].visititems(lambda name, x: names.append(f"{group}/{name}") if isinstance(x, h5py.Dataset) else None)
    return names


def without_name(file: Any, group: str, i: int) -> None:
    """Takes a name out of a list of names."""
    names = list(file[group].attrs["weight_names"])
    file[group].attrs["weight_names"] = names[:i] + names[i + 1 :]


def other_name(file: Any, group: str, i: int, old: str, new: str) -> None:
    """Renames an array and its name in the list."""
    names = list(file[group].attrs["weight_names"])
    name = names[i].decode() if isinstance(names[i], bytes) else names[i]
    renamed = name.replace(old, new)
    if renamed != name and renamed not in file[group]:
        file[group].move(name, renamed)
        file[group].attrs["weight_names"] = [*names[:i], renamed, *names[i + 1 :]]


def faults(file: Any, group: str) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """The faults of each array of the optimizer."""
    names = arrays_of(file, group)
    values = {name: np.asarray(file[name]) for name in names}
    for name in names:
        yield f"{name} removed", lambda f, name=name: f.__delitem__(name)
        yield f"{name} as text", lambda f, name=name: replace(f, name, np.asarray(b"text"))
        yield f"{name} under another name", lambda f, name=name: f.move(name, f"{name}_1")
        yield f"{name} twice", lambda f, name=name: f.copy(name, f"{name}_1")
        yield f"{name} shorter", lambda f, name=name: replace(f, name, np.ravel(values[name])[:-1])
        yield (
            f"{name} not finite",
            lambda f, name=name: replace(f, name, np.full(values[name].shape, np.nan, np.float32)),
        )
        if values[name].shape and np.min(values[name]) >= 0:
            yield f"{name} below 0", lambda f, name=name: replace(f, name, -1 - values[name])
    for a, b in itertools.combinations(names, 2):
        if values[a].shape != values[b].shape:
            yield f"{a} and {b} exchanged", lambda f, a=a, b=b: exchange(f, a, b)
    listed_names = file[group].attrs.get("weight_names", [])
    for i in range(len(listed_names)):
        yield f"name {i} not listed", lambda f, i=i: without_name(f, group, i)
        for old, new in (("z", "y"), ("kernel", "bias"), ("momentum", "velocity"), ("/m", "/v"), ("iter", "other")):
            yield f"name {i}: {old} is {new}", lambda f, i=i, old=old, new=new: other_name(f, group, i, old, new)
    turned = list(reversed(listed_names))
    yield "names backward", lambda f: f[group].attrs.__setitem__("weight_names", turned) if turned else None
    yield "all removed", lambda f: f.__delitem__(group)


# How many faults of each there are, so that they do not become fewer unseen.
FILES = {
    ("keras", ".keras"): 190,
    ("keras", ".weights.h5"): 190,
    ("keras", ".h5"): 280,
    ("tf_keras", ".keras"): 154,
    ("tf_keras", ".weights.h5"): 154,
    ("tf_keras", ".h5"): 232,
    ("legacy", ".h5"): 256,
}


# A .keras holds the same HDF5 as a .weights.h5.
@pytest.mark.parametrize(("dialect", "kind"), long_unless(lambda _, kind: kind != ".keras", FILES))
def test_files(dialect, kind, tmp_path):
    model = trained(dialect)
    truth, path = Truth(dialect, model), saved(model, kind, tmp_path)
    assert truth.is_right(truth.load(path))
    with h5py.File(_weights_in(path)) as file:
        found = dict(faults(file, "optimizer_weights" if kind == ".h5" else "optimizer/vars"))
    assert len(found) == FILES[dialect, kind]
    wrong = {name: truth.verdict(changed(path, change)) for name, change in found.items()}
    assert not listed(wrong), listed(wrong)


def _weights_in(path: pathlib.Path) -> pathlib.Path:
    """The HDF5 file in a file."""
    if path.suffix != ".keras":
        return path
    with zipfile.ZipFile(path) as archive:
        return pathlib.Path(archive.extract("model.weights.h5", path.parent))


@pytest.mark.parametrize(("dialect", "kind"), [(d, k) for d, k in FILES if k == ".h5"])
def test_weights_beside(dialect, kind, tmp_path):
    """The model's own arrays, by which the moments are put in order."""
    model = trained(dialect)
    truth, path = Truth(dialect, model), saved(model, kind, tmp_path)
    with h5py.File(path) as file:
        names = arrays_of(file, "model_weights")
        values = {name: np.asarray(file[name]) for name in names}
    found: dict[str, Callable[[Any], Any]] = {}
    for name in names:
        found[f"{name} removed"] = lambda f, name=name: f.__delitem__(name)
        found[f"{name} shorter"] = lambda f, name=name: replace(f, name, np.ravel(values[name])[:-1])
    for a, b in itertools.combinations(names, 2):
        if values[a].shape != values[b].shape:
            found[f"{a} and {b}"] = lambda f, a=a, b=b: exchange(f, a, b)
    found["layers backward"] = lambda f: f["model_weights"].attrs.__setitem__(
        "layer_names", list(reversed(f["model_weights"].attrs["layer_names"]))
    )
    found["layer not listed"] = lambda f: f["model_weights"].attrs.__setitem__(
        "layer_names", list(f["model_weights"].attrs["layer_names"])[:-1]
    )
    wrong = {name: truth.verdict(changed(path, change)) for name, change in found.items()}
    assert not listed(wrong), listed(wrong)


# Other classes.

PLAIN = ["Adam", "AdamW", "Adamax", "Lamb", "RMSprop", "SGD", "Lion", "Ftrl", "Adagrad", "Adadelta", "Adafactor"]
OTHERS: dict[str, Callable[[], Any]] = {
    name: lambda name=name: getattr(keras.optimizers, name)(LR) for name in [*PLAIN, "Muon"]
}
OTHERS |= {
    "Adam, amsgrad": lambda: keras.optimizers.Adam(LR, amsgrad=True),
    "Adam, schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LR, 10)),
    "SGD with momentum": lambda: keras.optimizers.SGD(LR, momentum=0.9),
    "RMSprop with momentum": lambda: keras.optimizers.RMSprop(LR, momentum=0.9),
    "RMSprop, centered": lambda: keras.optimizers.RMSprop(LR, momentum=0.9, centered=True),
    "Adam, averages": lambda: keras.optimizers.Adam(LR, use_ema=True),
    "Adam, accumulating": lambda: keras.optimizers.Adam(LR, gradient_accumulation_steps=3),
    "loss-scaled Lamb": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Lamb(LR)),
    "Adam under our name": lambda: keras.optimizers.Adam(LR, name="nadam"),
}


def multi_optimizer(second: str) -> Any:
    """A Nadam for the weights of the first layer, and another optimizer for the rest."""
    nadam, other = keras.optimizers.Nadam(LR), getattr(keras.optimizers, second)(LR)
    return keras.optimizers.MultiOptimizer(lambda x: nadam if x.shape[0] > 2 else other)


OTHERS |= {f"Nadam and {second}": lambda second=second: multi_optimizer(second) for second in ("Nadam", "Adam")}


@pytest.fixture(scope="module")
def others():
    """A model trained with each of the other optimizers."""
    return {name: trained("keras", make()) for name, make in OTHERS.items()}


# Writing an .h5 alters the model, so it is last.
@pytest.mark.parametrize("kind", ["variables", "values", "tree", ".keras", ".weights.h5", ".h5"])
def test_other_optimizers(kind, others, tmp_path):
    wrong = {}
    for name, model in others.items():
        if (name, kind) == ("Adafactor", ".h5"):  # which Keras fails to write
            continue
        wrong[name] = refusal(lambda model=model: read_as(kind, model, tmp_path), lambda loaded: False)
    assert not listed(wrong), listed(wrong)


LEGACY_OTHERS = ["Adam", "Adamax", "RMSprop", "SGD", "Adagrad", "Adadelta", "Ftrl"]


@pytest.mark.parametrize("dialect", ["tf_keras", "legacy"])
def test_other_optimizers_of_tensorflow(dialect, tmp_path):
    package = tf_keras.optimizers.legacy if dialect == "legacy" else tf_keras.optimizers
    wrong = {}
    for name in LEGACY_OTHERS:
        model = trained(dialect, getattr(package, name)(LR))
        weights = [numbers(x) for x in model.trainable_variables]
        (tmp_path / name).mkdir()
        prefix = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / name / "checkpoint"))
        found = {".h5": saved(model, ".h5", tmp_path), "checkpoint": prefix}
        for kind, source in found.items():
            wrong[f"{name} {kind}"] = refusal(
                lambda source=source, weights=weights: ours.load_state(
                    CONFIGS[dialect].build().init(weights),
                    source,
                    lambda w: list(w.values()) if isinstance(w, dict) else w,
                ),
                lambda loaded: False,
            )
    assert not listed(wrong), listed(wrong)


@pytest.mark.parametrize("second", ["Nadam", "Adam", "SGD"])
@pytest.mark.parametrize("dialect", ["tf_keras", "legacy"])
def test_two_optimizers(dialect, second, tmp_path):
    package = tf_keras.optimizers.legacy if dialect == "legacy" else tf_keras.optimizers
    model = trained(dialect)
    other = getattr(package, second)(LR)
    variables = model.trainable_variables
    other.apply_gradients([(tf.ones(x.shape), x) for x in variables])
    prefix = tf.train.Checkpoint(model=model, optimizer=model.optimizer, second=other).save(
        str(tmp_path / "checkpoint")
    )
    weights = [numbers(x) for x in variables]
    with pytest.raises(ValueError, match="more than one optimizer"):
        ours.load_state(CONFIGS[dialect].build().init(weights), prefix, in_order, config=CONFIGS[dialect])


def read_as(kind: str, model: Any, path: pathlib.Path) -> Any:
    """A model of Keras 3, stored in some way, and loaded."""
    makes: dict[str, Callable[[], Any]] = {
        "variables": lambda: list(model.optimizer.variables),
        "values": lambda: [numbers(x) for x in model.optimizer.variables],
        "tree": model.get_state_tree,
    }
    source = makes[kind]() if kind in makes else saved(model, kind, path)
    weights = [numbers(x) for x in model.trainable_variables]
    return ours.load_state(CONFIGS["keras"].build().init(weights), source, in_order)


def in_order(weights: Any) -> list[Any]:
    return list(weights.values() if isinstance(weights, dict) else weights)


# Shards.


def test_shards(tmp_path):
    model = trained("keras")
    truth = Truth("keras", model)
    path = tmp_path / "model.weights.json"
    model.save_weights(str(path), max_shard_size=3e-7)
    shards = sorted(tmp_path.glob("*.h5"))
    assert len(shards) > 1
    assert truth.is_right(truth.load(str(path)))
    wrong = {}
    for shard in shards:
        kept = shard.read_bytes()
        shard.unlink()
        wrong[f"without {shard.name}"] = truth.verdict(str(path))
        shard.write_bytes(kept)
    wrong["no map"] = _with_map(truth, path, {"weight_map": {}})
    wrong["nothing"] = _with_map(truth, path, {})
    assert not listed(wrong), listed(wrong)


def _with_map(truth: Truth, path: pathlib.Path, changes: dict[str, Any]) -> str:
    old = path.read_text()
    new = {**json.loads(old), **changes} if changes else {}
    path.write_text(json.dumps(new))
    found = truth.verdict(str(path))
    path.write_text(old)
    return found


# Layers of equal names.


def with_base(package: Any, inner: str = "dense") -> Any:
    """A model with a frozen base, whose inner layer may have the name of an own one."""
    layers = package.layers
    base = package.Sequential([package.Input((3,)), layers.Dense(3, name=inner)], name="base")
    base.trainable = False
    return package.Sequential([package.Input((3,)), base, layers.Dense(3, name="mid"), layers.Dense(3, name="dense")])


@pytest.mark.parametrize("dialect", PACKAGES)
def test_equal_names(dialect, tmp_path):
    model = with_base(PACKAGES[dialect])
    model.compile(NADAMS[dialect](LR), "mse")
    step(model)
    truth, path = Truth(dialect, model), saved(model, ".h5", tmp_path)
    state, weights = truth.load(path)
    assert truth.is_right((state, None))
    assert weights is None or truth.is_right((state, weights))


LATER = list(itertools.product(PACKAGES, ["inner", "dense"], [".h5", "variables"]))
# TensorFlow writes no .h5 in which two moments have one name.
LATER = [x for x in LATER if x not in (("tf_keras", "dense", ".h5"), ("legacy", "dense", ".h5"))]


@pytest.mark.parametrize(("dialect", "inner", "kind"), LATER)
def test_trained_later(dialect, inner, kind, tmp_path):
    """The optimizer has the weights in another order than the model: those of the base come last."""
    model = with_base(PACKAGES[dialect], inner)
    model.compile(NADAMS[dialect](LR), "mse")
    base, mid, head = model.layers[-3:]
    if dialect == "legacy":
        step(model)
        base.trainable = True
    else:
        base.trainable = True
        model.optimizer.build([x for layer in (mid, head, base) for x in layer.trainable_variables])
    step(model)
    truth = Truth(dialect, model)
    source = saved(model, ".h5", tmp_path) if kind == ".h5" else _variables(dialect, model)
    truth.m, truth.v = moments(dialect, model, mid, head, base) if kind == "variables" else (truth.m, truth.v)
    found = truth.verdict(source)
    assert not found, found


def _variables(dialect: str, model: Any) -> list[Any]:
    return list(model.optimizer.weights if dialect == "legacy" else model.optimizer.variables)


# Directories of torch.


class Torch:
    """A run of ``torch.optim.NAdam`` with a scheduler, and what is read of it."""

    def __init__(self) -> None:
        """Takes some steps."""
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        self.optimizer = torch.optim.NAdam(self.net.parameters(), lr=LR, decoupled_weight_decay=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        for _ in range(3):
            for p in self.net.parameters():
                p.grad = torch.randn_like(p)
            self.optimizer.step()
            self.scheduler.step()
        self.names = [name for name, _ in self.net.named_parameters()]

    def load(self, source: Any) -> Any:
        """The state that continues with the checkpoint's own schedule, and its learning rate."""
        weights = [numbers(p.detach()) for p in self.net.parameters()]
        found = compat.torch.read(source)
        tx = compat.torch.from_groups(found, list)
        return get_state(compat.torch.load_state(tx.init(weights), found, list)), found.schedule

    def is_right(self, loaded: Any) -> bool:
        """Whether these are the moments, and the schedule gives the learning rate that is stored."""
        state, schedule = loaded
        entries = [self.optimizer.state[p] for p in self.net.parameters()]
        same = [np.array_equal(x, e["exp_avg"].numpy()) for x, e in zip(state.m, entries, strict=True)]
        same += [np.array_equal(x, e["exp_avg_sq"].numpy()) for x, e in zip(state.v, entries, strict=True)]
        rate = None if schedule is None else float(schedule.build()(int(state.count)))
        return all(same) and int(state.count) == 3 and rate == pytest.approx(self.optimizer.param_groups[0]["lr"])

    def verdict(self, source: Any) -> str:
        """What is wrong with how a source is taken."""
        return refusal(lambda: self.load(source), self.is_right)


SUFFIXES = {"Trainer": ".pt", "accelerate": ".bin"}


def folder(run: Torch, kind: str, path: pathlib.Path) -> pathlib.Path:
    """What the program saves."""
    path.mkdir(parents=True)
    suffix = SUFFIXES[kind]
    torch.save(run.optimizer.state_dict(), path / f"optimizer{suffix}")
    torch.save(run.scheduler.state_dict(), path / f"scheduler{suffix}")
    torch.save(run.net.state_dict(), path / "pytorch_model.bin")
    if kind == "Trainer":
        (path / "trainer_state.json").write_text(json.dumps({"max_steps": 20, "global_step": 3}))
    return path


def _save(name: str, make: Callable[[Torch], Any]) -> Callable[[Torch, pathlib.Path, str], None]:
    return lambda run, path, suffix: torch.save(make(run), path / name.format(suffix))


def _remove(name: str) -> Callable[[Torch, pathlib.Path, str], None]:
    return lambda run, path, suffix: (path / name.format(suffix)).unlink()


def _write(name: str, text: str) -> Callable[[Torch, pathlib.Path, str], Any]:
    return lambda run, path, suffix: (path / name.format(suffix)).write_text(text)


def _other_step(run: Torch) -> Any:
    return run.scheduler.state_dict() | {"last_epoch": 9}


FOLDERS: dict[str, Callable[[Torch, pathlib.Path, str], Any]] = {
    "no optimizer": _remove("optimizer{}"),
    "an empty optimizer": _write("optimizer{}", ""),
    "an optimizer that is text": _write("optimizer{}", "text"),
    "weights in its place": _save("optimizer{}", lambda run: run.net.state_dict()),
    "the scheduler in its place": _save("optimizer{}", lambda run: run.scheduler.state_dict()),
    "None in its place": _save("optimizer{}", lambda run: None),
    "a list of two": _save("optimizer{}", lambda run: [run.optimizer.state_dict()] * 2),
    "a second optimizer": _save("optimizer_1{}", lambda run: run.optimizer.state_dict()),
    "one of each suffix": lambda run, path, suffix: torch.save(
        {"state": {}, "param_groups": run.optimizer.state_dict()["param_groups"]},
        path / ("optimizer.pt" if suffix == ".bin" else "optimizer.bin"),
    ),
    "a second scheduler": _save("scheduler_1{}", _other_step),
    "an empty scheduler": _write("scheduler{}", ""),
    "the optimizer in the scheduler's place": _save("scheduler{}", lambda run: run.optimizer.state_dict()),
    "None in the scheduler's place": _save("scheduler{}", lambda run: None),
    "an empty dict in the scheduler's place": _save("scheduler{}", lambda run: {}),
    "a scheduler of another step": _save("scheduler{}", _other_step),
    "a scheduler of another length": _save("scheduler{}", lambda run: run.scheduler.state_dict() | {"T_max": 30}),
    "a scheduler of another rate": _save("scheduler{}", lambda run: run.scheduler.state_dict() | {"base_lrs": [0.5]}),
    "a scheduler of two groups": _save("scheduler{}", lambda run: run.scheduler.state_dict() | {"base_lrs": [LR] * 2}),
    "no steps of the run": _write("trainer_state.json", "{}"),
    "a run that is no dict": _write("trainer_state.json", "[]"),
    "a run that is no JSON": _write("trainer_state.json", "{"),
    "steps of the run as text": _write("trainer_state.json", json.dumps({"max_steps": "many"})),
}


@pytest.mark.filterwarnings("ignore:.*initial_lr.*:UserWarning")
@pytest.mark.parametrize("kind", SUFFIXES)
def test_folders(kind, tmp_path):
    run = Torch()
    assert run.is_right(run.load(folder(run, kind, tmp_path / "right")))
    wrong = {}
    for i, (name, change) in enumerate(FOLDERS.items()):
        path = folder(run, kind, tmp_path / str(i))
        change(run, path, SUFFIXES[kind])
        may_load = name not in ("a second optimizer", "one of each suffix")
        wrong[name] = refusal(lambda path=path: run.load(path), run.is_right if may_load else lambda loaded: False)
    assert not listed(wrong), listed(wrong)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")
def test_distributed_checkpoint(tmp_path):
    run = Torch()
    parts = {"optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict()}
    dcp.save(parts, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    dcp_to_torch_save(str(tmp_path / "dcp"), str(tmp_path / "whole.pt"))
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    found = compat.torch.read(whole["optimizer"], scheduler=whole["scheduler"])
    tx = compat.torch.from_groups(found, list)
    weights = [numbers(p.detach()) for p in run.net.parameters()]
    state = get_state(compat.torch.load_state(tx.init(weights), found, list))
    assert run.is_right((state, found.schedule))
    wrong = {"the file": run.verdict(tmp_path / "whole.pt"), "the directory": run.verdict(tmp_path / "dcp")}
    entries = whole["optimizer"]["state"]
    for key in list(entries):
        rest = {k: x for k, x in entries.items() if k != key}
        wrong[f"without {key}"] = run.verdict(whole["optimizer"] | {"state": rest})
        wrong[f"{key} as 100"] = run.verdict(whole["optimizer"] | {"state": rest | {"100": entries[key]}})
        wrong[f"{key} as a name"] = run.verdict(whole["optimizer"] | {"state": rest | {"name": entries[key]}})
    assert not listed(wrong), listed(wrong)
