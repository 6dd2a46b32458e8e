"""A source in which one thing is wrong is refused, with a text that names the entry, or loaded as if it were right.

A grid: kinds of sources, made of one truth without their frameworks, by kinds of faults, by entries of the source.

============= ========================================================================================================
removed       an entry, a part of the source, the moments of a parameter
added         an entry or a part that is there already, under another name, behind it and at the end
renamed       an entry or a part, an id, a name
exchanged     the values of two entries, the moments of two parameters
impossible    steps, products, moments that no Nadam has; steps or products of one parameter that are not the others'
other class   the entries that other optimizers have
two           another optimizer beside it
order         the entries in another order; names in another order than what they name
arrival       a ``to_params`` that loses, changes or makes up numbers
============= ========================================================================================================

What nothing in a source can tell is not in the grid:

* two arrays of one shape and one role exchanged, or first moments and weights;
* in a list without names other arrays of the same shapes: Keras' Adam with a schedule, tf_keras' and legacy Adam;
* moments without steps, from those of an optimizer that took none; NAdam's state under Adam's groups, which torch
  leaves behind where Adam continues a run of NAdam;
* Adamax and Novograd of Optax, whose state is of Adam's class or fields; a loss-scaled Adam's list of values;
* another valid learning rate or hyperparameter, another valid number of steps or product where it is stored once and
  nothing else in the source depends on it, so also a stored product that is exchanged with a learning rate.
"""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from optax_nadam import NadamConfig
from optax_nadam._config import product_after
from optax_nadam._state import KINDS as KINDS_OF_STATES
from optax_nadam._tree import nodes_of
from optax_nadam.compat import algoperf, keras, timm, torch
from optax_nadam.compat import optax as optax_names
from optax_nadam.compat._match import merged

# The truth.

SHAPES = {"kernel": (4, 3), "bias": (3,), "conv": (2, 2, 3), "scale": (2,), "table": (4, 3)}
NAMES = list(SHAPES)
COUNT = 7


def _normal(seed: int) -> dict[str, np.ndarray]:
    """Arrays with a negative number in each; those of equal shape are small beside the others."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, x in arrays.items():
        x.flat[0] = -1.0 - abs(x.flat[0])
        x *= 1e-3 if SHAPES[name] == (4, 3) else 1.0
    return arrays


W, M = _normal(1), _normal(2)
V = {name: np.square(x) for name, x in _normal(3).items()}
EXTRA = _normal(4)


def tree(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The params: another tree than the model's, and a transpose."""
    rest = [weights["conv"], weights["scale"], weights["table"]]
    return {"block": {"kernel": weights["kernel"].T, "bias": weights["bias"]}, "rest": rest}


PARAMS = tree(W)
FRESH = torch.nadam().init(PARAMS)


def fresh(params: Any) -> Any:
    """The state of an optimizer that has taken no step."""
    return FRESH if params is PARAMS else torch.nadam().init(params)


# Sources as entries, on which the faults work.


class Entry(NamedTuple):
    """A value in a source.

    Attributes:
      value: what is there.
      role: ``m``, ``v``, ``w``, ``step``, ``product``, ``rate``, ``power``, ``id``, ``name`` or ``option``.
      name: the parameter, if it is of one.
    """

    value: Any
    role: str
    name: str | None = None


Path = tuple[Any, ...]
Entries = dict[Path, Entry]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
      entries: what it holds.
      build: the source of entries.
      load: loads a source with a ``to_params`` into a fresh state.
      by_name: makes of what ``to_params`` gets a dict by our names.
      config: the hyperparameters of the truth.
      label: what the library calls a parameter.
      others: sources of other classes.
      two: sources of two optimizers.
      options: arguments of ``load``.
      read_weights: reads the weights where the source has them.
      is_list: whether the order of entries matters, and names may be equal.
    """

    entries: Entries
    build: Callable[[Entries], Any]
    load: Callable[..., Any]
    by_name: Callable[[Any], Mapping[str, Any]]
    config: NadamConfig
    label: Callable[[str], Any]
    others: dict[str, Any]
    two: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    read_weights: Callable[[Any], Any] | None = None
    is_list: bool = False

    @property
    def is_unnamed(self) -> bool:
        """Whether shapes alone tell what the entries are."""
        return self.is_list and isinstance(next(iter(self.entries))[0], int)

    @property
    def in_lists(self) -> list[Any]:
        """The ids and the names in lists."""
        return [entry.value for entry in self.entries.values() if entry.role in ("id", "name")]


def under(entries: Entries, node: Path) -> Entries:
    return {path: entry for path, entry in entries.items() if path[: len(node)] == node}


def without(entries: Entries, gone: Any) -> Entries:
    return {path: entry for path, entry in entries.items() if path not in gone}


def replaced(entries: Entries, values: Mapping[Path, Any]) -> Entries:
    return {path: e._replace(value=values[path]) if path in values else e for path, e in entries.items()}


def nodes(entries: Entries) -> list[Path]:
    """The entries and the parts that hold them."""
    return list(dict.fromkeys(path[:i] for path in entries for i in range(1, len(path) + 1)))


def rekeyed(entries: Entries, keys: Mapping[Any, Any]) -> Entries:
    """Other names for the parts of paths; entries with a name that becomes None are left out."""
    new = {tuple(keys.get(part, part) for part in path): entry for path, entry in entries.items()}
    return {path: entry for path, entry in new.items() if None not in path}


def substituted(entries: Entries, *changes: tuple[str, str | None]) -> Entries:
    """Other text in names; entries whose text becomes None are left out."""
    for old, new in changes:
        if new is None:
            entries = {path: e for path, e in entries.items() if not any(re.search(old, str(part)) for part in path)}
        else:
            entries = {
                tuple(re.sub(old, new, part) if isinstance(part, str) else part for part in path): entry
                for path, entry in entries.items()
            }
    return entries


# torch and timm.

NADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "momentum_decay": 0.004}
NADAM |= {"decoupled_weight_decay": True, "maximize": False, "foreach": None, "capturable": False}
NADAM |= {"differentiable": False}
ADAMW = {key: x for key, x in NADAM.items() if key != "momentum_decay"} | {"amsgrad": False, "fused": None}
SHARED = {key: NADAM[key] for key in ("lr", "betas", "eps", "weight_decay")}
RADAM = {key: x for key, x in NADAM.items() if key != "momentum_decay"}
NADAMW = SHARED | {"caution": False, "corrected_weight_decay": False, "max_lr_snapshot": 0.01, "foreach": None}
NADAMW |= {"maximize": False, "capturable": False, "clipping_threshold": None}
LEGACY = SHARED | {"schedule_decay": 0.004}
LISTS = ("param_groups", "params", "param_names", "rest")


def torch_entries(
    options: Mapping[str, Any],
    product: str | None,
    config: NadamConfig,
    groups: Sequence[Sequence[str]] = (NAMES,),
    *,
    named: bool,
) -> Entries:
    entries: Entries = {}
    for i, name in enumerate(name for group in groups for name in group):
        scalars = {"step": Entry(np.float32(COUNT), "step", name)}
        if product:
            scalars[product] = Entry(np.float32(product_after(COUNT, config)), "product", name)
        arrays = {"exp_avg": Entry(M[name], "m", name), "exp_avg_sq": Entry(V[name], "v", name)}
        entries |= {("state", i, key): entry for key, entry in (scalars | arrays).items()}
    ids = itertools.count()
    for g, group in enumerate(groups):
        own = dict(options) | ({"weight_decay": 0.1} if g else {})
        entries |= {("param_groups", g, key): Entry(x, "option") for key, x in own.items()}
        entries |= {("param_groups", g, "params", j): Entry(next(ids), "id", name) for j, name in enumerate(group)}
        if named:
            entries |= {
                ("param_groups", g, "param_names", j): Entry(name, "name", name) for j, name in enumerate(group)
            }
    return entries


def nested(entries: Entries, lists: Sequence[str] = LISTS) -> Any:
    """Dicts in dicts, and lists under some names."""
    root: dict[Any, Any] = {}
    for path, entry in entries.items():
        place = root
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = entry.value

    def listed(name: Any, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        below = {key: listed(key, x) for key, x in node.items()}
        return list(below.values()) if name in lists else below

    return listed(None, root)


def flat(entries: Entries) -> Any:
    return {".".join(path): entry.value for path, entry in entries.items()}


def flat_entries(with_groups: bool) -> Entries:
    entries = torch_entries(NADAM, "mu_product", TORCH, named=False)
    state = {(p[0], e.name, p[2]): e for p, e in entries.items() if p[0] == "state"}
    groups = {("param_groups", name, key): Entry(x, "option", name) for name in NAMES for key, x in NADAM.items()}
    return state | (groups if with_groups else {})


TORCH = NadamConfig(learning_rate=0.01, eps=1e-8)
ADAM = dataclasses.replace(TORCH, rule="adam")
SIMPLIFIED = dataclasses.replace(TORCH, rule="simplified")


def with_options(entries: Entries, options: Mapping[str, Any]) -> Entries:
    """The entries with the hyperparameters of another optimizer in each group."""
    groups = [path for path in nodes(entries) if path[0] == "param_groups" and len(path) == 2]
    kept = {path: entry for path, entry in entries.items() if entry.role != "option"}
    return kept | {(*group, key): Entry(x, "option") for group in groups for key, x in options.items()}


def torch_others(entries: Entries, product: str | None) -> dict[str, Any]:
    gone = {product: None} if product else {}
    buffers = gone | {"step": None, "exp_avg_sq": None, "exp_avg": "momentum_buffer"}
    keys: dict[str, dict[Any, Any]] = {
        "SGD's state": buffers,
        "Adagrad's state": gone | {"exp_avg": None, "exp_avg_sq": "sum"},
        "RMSprop's state": gone | {"exp_avg": "momentum_buffer", "exp_avg_sq": "square_avg"},
        "Adamax' state": gone | {"exp_avg_sq": "exp_inf"},
        "Adadelta's state": gone | {"exp_avg": "square_avg", "exp_avg_sq": "acc_delta"},
        "Lamb's state": gone | {"step": None},
        "a product of another name": {product: "product"} if product else {"step": "steps"},
    }
    found = {name: rekeyed(entries, changes) for name, changes in keys.items()}
    largest = {(*p[:2], "max_exp_avg_sq"): e for p, e in entries.items() if p[-1] == "exp_avg_sq"}
    found["AMSGrad's state"] = entries | largest
    if product:
        found["Adam's state"] = rekeyed(entries, gone)
        found["RAdam"] = with_options(rekeyed(entries, gone), RADAM)
    else:
        found["NAdam"] = entries | {(*p[:2], "mu_product"): Entry(0.5, "product") for p in largest}
    return found


def torch_kind(
    entries: Entries,
    config: NadamConfig = TORCH,
    *,
    product: str | None = "mu_product",
    module: Any = torch,
    by_name: Any = dict,
    build: Any = nested,
    label: Any = str,
    others: Mapping[str, Entries] = {},
    load: Any = None,
    options: Mapping[str, Any] = {},
) -> Kind:
    def load_state(source: Any, take: Any, params: Any, **options: Any) -> Any:
        return module.load_state(fresh(params), source, take, **options)

    source = build(entries)
    return Kind(
        entries,
        build,
        load or load_state,
        by_name,
        config,
        label,
        {name: build(x) for name, x in (torch_others(entries, product) | dict(others)).items()},
        {
            "parts": {"optimizer": source, "optimizer_2": source},
            "a list": [source, source],
            "Lightning's": {"optimizer_states": [source, source]},
        },
        dict(options),
    )


def by_position(weights: Any) -> dict[str, Any]:
    return {name: weights[i] for i, name in enumerate(NAMES)}


def load_groups(source: Any, take: Any, params: Any, **options: Any) -> Any:
    tx = torch.from_groups(source, take, **options)
    return torch.load_state(tx.init(params), source, take, **options)


GROUPED = ["kernel", "table", "bias", "conv", "scale"]
UNNAMED = torch_entries(NADAM, "mu_product", TORCH, named=False)
ADAMW_ENTRIES = torch_entries(ADAMW, None, ADAM, named=True)
NADAMW_ENTRIES = torch_entries(NADAMW, None, SIMPLIFIED, named=True)
ALGOPERF_ENTRIES = torch_entries(SHARED, None, SIMPLIFIED, named=False)
TIMM_OTHERS = {"Adam": with_options(NADAMW_ENTRIES, ADAMW), "RAdam": with_options(NADAMW_ENTRIES, RADAM)}
TIMM_OTHERS |= {"AdamP": with_options(NADAMW_ENTRIES, SHARED | {"delta": 0.1, "wd_ratio": 0.1, "nesterov": False})}
KINDS: dict[str, Kind] = {
    "torch, named": torch_kind(torch_entries(NADAM, "mu_product", TORCH, named=True)),
    "torch, names given": torch_kind(UNNAMED, options={"names": NAMES}),
    "torch, by position": torch_kind(UNNAMED, by_name=by_position, label=NAMES.index),
    "torch, two groups": torch_kind(
        torch_entries(NADAM, "mu_product", TORCH, (GROUPED[:2], GROUPED[2:]), named=True), load=load_groups
    ),
    "torch, ids as text": torch_kind(
        {(p[0], str(p[1]), p[2]) if p[0] == "state" else p: entry for p, entry in UNNAMED.items()},
        options={"names": NAMES},
    ),
    "torch, flat": torch_kind(flat_entries(True), build=flat),
    "torch, flat without groups": torch_kind(flat_entries(False), build=flat),
    "torch AdamW": torch_kind(ADAMW_ENTRIES, ADAM, product=None),
    "timm NAdamW": torch_kind(NADAMW_ENTRIES, SIMPLIFIED, product=None, module=timm, others=TIMM_OTHERS),
    "timm NAdamW, config": torch_kind(
        NADAMW_ENTRIES, SIMPLIFIED, product=None, module=timm, others=TIMM_OTHERS, options={"config": SIMPLIFIED}
    ),
    "timm NAdamLegacy": torch_kind(
        torch_entries(LEGACY, "m_schedule", TORCH, named=True), product="m_schedule", module=timm
    ),
    "AlgoPerf's for torch": torch_kind(
        ALGOPERF_ENTRIES,
        SIMPLIFIED,
        product=None,
        module=algoperf,
        by_name=by_position,
        label=NAMES.index,
        others={"Adam": with_options(ALGOPERF_ENTRIES, ADAMW)},
        options={"config": SIMPLIFIED},
    ),
}


# Optax and AlgoPerf.


class ScaleByAdamState(NamedTuple):
    """AlgoPerf's own class."""

    count: Any
    mu: Any
    nu: Any


OPTAX: dict[str, tuple[str, Any]] = {"kernel": ("net", "kernel"), "bias": ("net", "bias"), "conv": ("net", "conv")}
OPTAX |= {"scale": ("rest", 0), "table": ("rest", 1)}
OPTAX_ENTRIES: Entries = {("count",): Entry(np.int32(COUNT), "step")}
OPTAX_ENTRIES |= {("mu", *OPTAX[name]): Entry(M[name], "m", name) for name in NAMES}
OPTAX_ENTRIES |= {("nu", *OPTAX[name]): Entry(V[name], "v", name) for name in NAMES}


def optax_by_name(found: Any) -> dict[str, Any]:
    return {name: found[part][key] for name, (part, key) in OPTAX.items()}


def optax_label(name: str) -> str:
    part, key = OPTAX[name]
    return f"['{part}'][{key!r}]"


def in_chain(make: Any) -> Callable[[Entries], Any]:
    """The state of a chain in which one optimizer has these fields."""

    def build(entries: Entries) -> Any:
        fields = dict.fromkeys(make._fields) | nested(entries)
        adam = make(*(fields[name] for name in make._fields))
        by_schedule = optax.ScaleByScheduleState(np.int32(COUNT))
        return (optax.EmptyState(), (adam, optax.EmptyState(), by_schedule))

    return build


def as_dicts(entries: Entries) -> Any:
    return {"0": {}, "1": {"0": nested(entries), "1": {}, "2": {"count": np.int32(COUNT)}}}


def optax_kind(build: Any, module: Any = optax_names, rule: Any = "constant") -> Kind:
    config = NadamConfig(learning_rate=0.01, rule=rule)
    fields = nested(OPTAX_ENTRIES)
    count, mu, nu = fields.values()
    others: dict[str, Any] = {
        "Amsgrad": optax.ScaleByAmsgradState(count, mu, nu, nu),
        "Belief": optax.ScaleByBeliefState(count, mu, nu),
        "Novograd": optax.ScaleByNovogradState(count, mu, nu),
        "RMSprop": optax.ScaleByRmsState(nu),
        "momentum": optax.EmaState(count, mu),
        "Lion": optax.ScaleByLionState(count, mu),
        "our own": FRESH,
        "Amsgrad as a dict": fields | {"nu_max": nu},
        "RMSprop as a dict": {"nu": nu},
        "Lion as a dict": {"count": count, "mu": mu},
    }

    def load(source: Any, take: Any, params: Any) -> Any:
        return module.load_state(fresh(params), source, take, config=config)

    source = build(OPTAX_ENTRIES)
    two = {"a tuple": (source, source), "a dict": {"a": source, "b": source}}
    return Kind(OPTAX_ENTRIES, build, load, optax_by_name, config, optax_label, others, two)


KINDS |= {
    "Optax": optax_kind(in_chain(optax.ScaleByAdamState)),
    "Optax as dicts": optax_kind(as_dicts),
    "AlgoPerf's": optax_kind(in_chain(ScaleByAdamState), algoperf, "simplified"),
}

# Keras and TensorFlow.


class Variable:
    """Stands for a variable of theirs: a value with a name."""

    def __init__(self, value: Any, path: str) -> None:
        """Stores both."""
        self.value, self.path = value, path

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The value."""
        return np.asarray(self.value)


KERAS_CONFIG = NadamConfig(learning_rate=0.01, momentum_decay=1.0)
LEGACY_CONFIG = NadamConfig(learning_rate=0.01)
ACCUMULATING = dataclasses.replace(KERAS_CONFIG, accumulate_steps=4)
LOSS_SCALED = dataclasses.replace(KERAS_CONFIG, rule="loss_scaled")
CONTRIB = dataclasses.replace(LEGACY_CONFIG, rule="eps_hat")
WEIGHTS = {"kernel": "dense/kernel", "bias": "dense/bias", "conv": "conv/kernel", "scale": "norm/scale"}
WEIGHTS |= {"table": "embed/table"}
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
RATE = Entry(np.float32(0.01), "rate")
STEP = Entry(np.asarray(COUNT), "step")


def product_of(config: NadamConfig) -> Entry:
    return Entry(np.float32(product_after(COUNT, config)), "product")


def pairs(m: str, v: str, weights: Mapping[str, str] = WEIGHTS) -> Entries:
    """The moments of one parameter after another."""
    entries: Entries = {}
    for name, weight in weights.items():
        entries[(m.format(weight),)] = Entry(M[name], "m", name)
        entries[(v.format(weight),)] = Entry(V[name], "v", name)
    return entries


def separate(m: str, v: str, weights: Mapping[str, str] = WEIGHTS) -> Entries:
    """All first moments, then all second ones."""
    moments = pairs(m, v, weights)
    first = {path: entry for path, entry in moments.items() if entry.role == "m"}
    return first | moments


def unnamed(entries: Entries) -> Entries:
    return {(i,): entry for i, entry in enumerate(entries.values())}


def values(entries: Entries) -> list[Any]:
    return [entry.value for entry in entries.values()]


def variables(entries: Entries) -> list[Variable]:
    return [Variable(entry.value, path[0]) for path, entry in entries.items()]


def by_full_name(entries: Entries) -> dict[str, Any]:
    return {path[0]: entry.value for path, entry in entries.items()}


FLAT_3 = {name: weight.replace("/", "_") for name, weight in WEIGHTS.items()}
LEGACY_ENTRIES: Entries = {("Nadam/iter:0",): STEP, ("Nadam/momentum_cache:0",): product_of(LEGACY_CONFIG)}
LEGACY_ENTRIES |= separate("Nadam/{}/m:0", "Nadam/{}/v:0")
TF_KERAS_ENTRIES: Entries = {("iteration:0",): STEP} | pairs("Nadam/m/{}:0", "Nadam/v/{}:0")
MOMENTS_3 = pairs("nadam/{}_momentum", "nadam/{}_velocity", FLAT_3)
HEAD_3: Entries = {("nadam/iteration",): STEP, ("nadam/learning_rate",): RATE}
KERAS_ENTRIES = HEAD_3 | MOMENTS_3 | {("nadam/variable",): product_of(KERAS_CONFIG)}
ACCUMULATORS: Entries = {
    (f"nadam/{weight}_gradient_accumulator",): Entry(EXTRA[name], "w", name) for name, weight in FLAT_3.items()
}
ACCUMULATING_ENTRIES = {
    ("nadam/iteration",): Entry(np.asarray(4 * COUNT), "step"),
    ("nadam/learning_rate",): RATE,
    **ACCUMULATORS,
    **MOMENTS_3,
    ("nadam/variable",): product_of(KERAS_CONFIG),
}
WRAPPER: Entries = {
    ("loss_scale_optimizer/iteration",): Entry(np.asarray(0), "other"),
    ("loss_scale_optimizer/learning_rate",): Entry(np.float32(0), "other"),
    ("loss_scale_optimizer/step_counter",): Entry(np.asarray(3), "other"),
    ("loss_scale_optimizer/dynamic_scale",): Entry(np.float32(32768), "other"),
}
SLOT = ".OPTIMIZER_SLOT/optimizer/"
HYPER = {"beta_1": 0.9, "beta_2": 0.999, "decay": 0.004}
GRAPH_ENTRIES: Entries = {(f"model/{w}{VALUE}",): Entry(W[name], "w", name) for name, w in WEIGHTS.items()}
GRAPH_ENTRIES |= pairs(f"model/{{}}/{SLOT}m{VALUE}", f"model/{{}}/{SLOT}v{VALUE}")
GRAPH_ENTRIES |= {(f"optimizer/iter{VALUE}",): STEP, (f"optimizer/learning_rate{VALUE}",): RATE}
GRAPH_ENTRIES |= {(f"optimizer/momentum_cache{VALUE}",): product_of(LEGACY_CONFIG)}
GRAPH_ENTRIES |= {(f"optimizer/{name}{VALUE}",): Entry(np.float32(x), "option") for name, x in HYPER.items()}
GRAPH_ENTRIES |= {(f"save_counter{VALUE}",): Entry(np.asarray(1), "other")}
SAVER_ENTRIES: Entries = {(w,): Entry(W[name], "w", name) for name, w in WEIGHTS.items()}
CONTRIB_ENTRIES = SAVER_ENTRIES | pairs("{}/Nadam", "{}/Nadam_1")
CONTRIB_ENTRIES |= {("beta1_power",): Entry(np.float32(0.9 ** (COUNT + 1)), "power")}
CONTRIB_ENTRIES |= {("beta2_power",): Entry(np.float32(0.999 ** (COUNT + 1)), "other")}
SAVER_ENTRIES |= pairs("training/Nadam/{}/m", "training/Nadam/{}/v")
SAVER_ENTRIES |= {("training/Nadam/iter",): STEP, ("training/Nadam/momentum_cache",): product_of(LEGACY_CONFIG)}
SAVER_ENTRIES |= {("training/Nadam/learning_rate",): RATE}
TREE_ENTRIES: Entries = {
    ("trainable_variables", *w.split("/")): Entry(W[name], "w", name) for name, w in WEIGHTS.items()
}
TREE_ENTRIES |= {("non_trainable_variables", "norm", "mean"): Entry(EXTRA["scale"], "other")}
TREE_ENTRIES |= {("optimizer_variables", *path[0].split("/")): entry for path, entry in (HEAD_3 | MOMENTS_3).items()}
TREE_ENTRIES |= {("optimizer_variables", "variable"): product_of(KERAS_CONFIG)}


def by_key(key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda weights: {name: weights[key.format(weight)] for name, weight in WEIGHTS.items()}


def keras_kind(
    entries: Entries,
    build: Callable[[Entries], Any],
    config: NadamConfig,
    others: Mapping[str, Entries],
    second: tuple[str, str] | None = None,
    *,
    key: str | None = None,
    needs_config: bool = False,
    dialect: str | None = None,
) -> Kind:
    """A kind of Keras' sources.

    Args:
      entries: what it holds.
      build: the source of entries.
      config: the hyperparameters of the truth.
      others: the entries of other classes.
      second: a part of the names of the optimizer's entries, and that of a second optimizer.
      key: the names under which ``to_params`` gets weights; None for a list.
      needs_config: whether the config is passed.
      dialect: what is passed.
    """
    options: dict[str, Any] = {"config": config} if needs_config else {}

    def load(source: Any, take: Any, params: Any) -> Any:
        return keras.load_state(fresh(params), source, take, dialect=dialect, **options)

    def together(one: Entries, other: Entries) -> Any:
        renamed = substituted(other, second) if second else other
        return build(one) + build(renamed) if key is None else build(one | renamed)

    half = {path: e for path, e in entries.items() if e.name in (None, *NAMES[:2])}
    rest = {path: e for path, e in entries.items() if e.name in (None, *NAMES[2:])}
    return Kind(
        entries,
        build,
        load,
        by_position if key is None else by_key(key),
        config,
        NAMES.index if key is None else lambda name: key.format(WEIGHTS[name]),
        {name: build(x) for name, x in others.items()},
        {"of the same weights": together(entries, entries), "of a part of the weights each": together(half, rest)},
        read_weights=(lambda source: keras.read_weights(source, **options)) if key else None,
        is_list=key is None,
    )


def numbered_others(scalars: int, product: int | None) -> Any:
    """Lists of values of other classes, whose scalars are the first ones."""

    def of(entries: Entries) -> dict[str, Entries]:
        rest = {path: e for i, (path, e) in enumerate(entries.items()) if i != product}
        head, moments = dict(list(rest.items())[:scalars]), dict(list(rest.items())[scalars:])
        m, v = ({p: e for p, e in moments.items() if e.role == role} for role in "mv")
        again = {(*p, "again"): e for p, e in v.items()}
        found = {"SGD": head | m, "RMSprop": head | v, "AMSGrad": head | moments | again, "Adam": rest}
        return {name: unnamed(x) for name, x in found.items()}

    return of


LEGACY_OTHERS = {
    "Adam": substituted(LEGACY_ENTRIES, ("momentum_cache", None), ("Nadam", "Adam")),
    "Adam under our name": substituted(LEGACY_ENTRIES, ("momentum_cache", None)),
    "Adamax": substituted(LEGACY_ENTRIES, ("momentum_cache", None), ("Nadam", "Adamax")),
    "AMSGrad": substituted(LEGACY_ENTRIES, ("momentum_cache", None))
    | substituted({p: e for p, e in LEGACY_ENTRIES.items() if e.role == "v"}, ("/v:0", "/vhat:0")),
    "RMSprop": substituted(LEGACY_ENTRIES, ("momentum_cache", None), ("/m:0", None), ("/v:0", "/rms:0")),
    "SGD": substituted(LEGACY_ENTRIES, ("momentum_cache", None), ("/v:0", None), ("/m:0", "/momentum:0")),
}
TF_KERAS_OTHERS = {
    "Adam": substituted(TF_KERAS_ENTRIES, ("Nadam", "Adam")),
    "AdamW, the second": substituted(TF_KERAS_ENTRIES, ("Nadam", "AdamW_1")),
    "Adamax": substituted(TF_KERAS_ENTRIES, ("Nadam", "Adamax"), ("/v/", "/u/")),
    "AMSGrad": TF_KERAS_ENTRIES
    | substituted({p: e for p, e in TF_KERAS_ENTRIES.items() if e.role == "v"}, ("/v/", "/vhat/")),
    "RMSprop": substituted(TF_KERAS_ENTRIES, ("/m/", None), ("/v/", "/velocity/")),
    "SGD": substituted(TF_KERAS_ENTRIES, ("/v/", None), ("Nadam/m/", "SGD/m/")),
}


def keras_others(entries: Entries) -> dict[str, Entries]:
    """Entries of Keras 3's other optimizers."""
    own = substituted(entries, ("variable$", None))
    hats = substituted({p: e for p, e in entries.items() if e.role == "v"}, ("velocity", "velocity_hat"))
    return {
        "Adam": substituted(own, ("^nadam", "adam")),
        "Adam under our name": own,
        "AdamW": substituted(own, ("^nadam", "adamw")),
        "Lamb": substituted(own, ("^nadam", "lamb")),
        "Lamb with a scalar": substituted(entries, ("^nadam", "lamb")),
        "Adamax": substituted(own, ("^nadam", "adamax"), ("velocity", "norm")),
        "Adadelta": substituted(own, ("^nadam", "adadelta"), ("momentum", "grad"), ("velocity", "delta")),
        "AMSGrad": own | hats,
        "AMSGrad with a scalar": entries | hats,
        "RMSprop": substituted(own, ("_momentum", None), ("^nadam", "rmsprop")),
        "SGD": substituted(own, ("_velocity", None), ("^nadam", "sgd")),
    }


def mapping_others(entries: Entries, product: str) -> dict[str, Entries]:
    own = substituted(entries, (product, None))
    v = {p: e for p, e in entries.items() if e.role == "v"}
    return {
        "Adam": own,
        "Adam under its name": substituted(own, ("Nadam", "Adam")),
        "AMSGrad": own | substituted(v, ("/v(/|$)", r"/vhat\1")),
        "RMSprop": substituted({p: e for p, e in own.items() if e.role != "m"}, ("/v(/|$)", r"/rms\1")),
        "SGD": substituted({p: e for p, e in own.items() if e.role != "v"}, ("/m(/|$)", r"/momentum\1")),
    }


KERAS_VALUES, LEGACY_VALUES = unnamed(KERAS_ENTRIES), unnamed(LEGACY_ENTRIES)
KERAS_3_0 = unnamed(HEAD_3 | {("nadam/variable",): product_of(KERAS_CONFIG)} | MOMENTS_3)
BEYOND = "^nadam", "nadam_1"
SCALED = WRAPPER | HEAD_3 | MOMENTS_3
CONTRIB_OTHERS = {
    "RMSprop": substituted({p: e for p, e in CONTRIB_ENTRIES.items() if e.role != "m"}, ("Nadam_1", "RMSProp")),
    "Adagrad": substituted({p: e for p, e in CONTRIB_ENTRIES.items() if e.role != "m"}, ("Nadam_1", "Adagrad")),
}
KINDS |= {
    "Keras legacy, get_weights": keras_kind(LEGACY_VALUES, values, LEGACY_CONFIG, numbered_others(1, 1)(LEGACY_VALUES)),
    "Keras 3, values": keras_kind(KERAS_VALUES, values, KERAS_CONFIG, numbered_others(2, 12)(KERAS_VALUES)),
    "Keras 3.0, values": keras_kind(KERAS_3_0, values, KERAS_CONFIG, numbered_others(2, 2)(KERAS_3_0), dialect="keras"),
    "Keras legacy, variables": keras_kind(
        LEGACY_ENTRIES, variables, LEGACY_CONFIG, LEGACY_OTHERS, ("Nadam", "Nadam_1")
    ),
    "tf_keras, variables": keras_kind(
        TF_KERAS_ENTRIES, variables, KERAS_CONFIG, TF_KERAS_OTHERS, ("Nadam", "Nadam_1"), needs_config=True
    ),
    "Keras 3, variables": keras_kind(KERAS_ENTRIES, variables, KERAS_CONFIG, keras_others(KERAS_ENTRIES), BEYOND),
    "Keras 3, accumulating": keras_kind(
        ACCUMULATING_ENTRIES, variables, ACCUMULATING, keras_others(ACCUMULATING_ENTRIES), BEYOND, needs_config=True
    ),
    "Keras 3, loss scaled": keras_kind(
        SCALED,
        variables,
        LOSS_SCALED,
        {name: x for name, x in keras_others(SCALED).items() if name != "Adam under our name"},
        BEYOND,
        needs_config=True,
    ),
    "TensorFlow's object graph": keras_kind(
        GRAPH_ENTRIES,
        by_full_name,
        LEGACY_CONFIG,
        mapping_others(GRAPH_ENTRIES, "momentum_cache"),
        ("(/|^)optimizer/", r"\1optimizer_2/"),
        key="model/{}",
    ),
    "Saver of TensorFlow 1": keras_kind(
        SAVER_ENTRIES,
        by_full_name,
        LEGACY_CONFIG,
        mapping_others(SAVER_ENTRIES, "momentum_cache"),
        ("training/Nadam", "training/Nadam_2"),
        key="{}",
    ),
    "Saver of tf.contrib": keras_kind(
        CONTRIB_ENTRIES,
        by_full_name,
        CONTRIB,
        CONTRIB_OTHERS,
        ("^(beta._power)$|/(Nadam(?:_1)?)$", r"second/\1\2"),
        key="{}",
        needs_config=True,
    ),
    "Keras 3, get_state_tree": keras_kind(
        TREE_ENTRIES,
        lambda entries: nested(entries, ()),
        KERAS_CONFIG,
        {name: x for name, x in keras_others(TREE_ENTRIES).items() if "scalar" not in name},
        (r"^(nadam|variable)$", r"\1_1"),
        key="{}",
    ),
}


# Faults.


class Case(NamedTuple):
    """A source in which something is wrong.

    Attributes:
      name: what.
      source: the source.
      words: of which the text of the error must have one; None where the source does not tell what is wrong.
      options: arguments of ``load`` in place of the kind's.
      is_lost: whether it cannot be loaded right.
    """

    name: str
    source: Any
    words: tuple[str, ...] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    is_lost: bool = False


SCALARS = {"step": ("step", "iteration", "iterations", "count"), "product": ("product", "momenta", "mu_product")}
SCALARS |= {
    "power": ("beta1_power", "iterations"),
    "rate": ("learning_rate", "learning rate"),
    "id": ("names",),
    "name": ("names",),
}


def words(kind: Kind, node: Path) -> tuple[str, ...] | None:
    """What may name an entry, or a part that is of one parameter."""
    below = list(under(kind.entries, node).values())
    names, roles = {entry.name for entry in below}, {entry.role for entry in below}
    if kind.is_unnamed or len(names) > 1 or roles & {"option", "other"}:
        return None
    found = [part.removesuffix(VALUE) for part in node if isinstance(part, str)][-1:]
    for name in names - {None}:
        label = kind.label(str(name))
        found += [str(name), f"moment of {label}" if kind.is_list else str(label)]
        found += [WEIGHTS[str(name)], WEIGHTS[str(name)].replace("/", "_")]
    for entry in below if len(below) == 1 else ():
        found += [*SCALARS.get(entry.role, ()), *([str(entry.value)] if entry.role in ("id", "name") else [])]
    return tuple(found)


def other_names(kind: Kind, node: Path) -> list[Path]:
    """Paths under which a part could be too."""
    last = node[-1]
    if isinstance(last, int):
        return [(*node[:-1], 100 + last)]
    suffixed = re.sub(rf"(:0|{VALUE})?$", r"_1\1", last, count=1)
    scoped = [f"other/{last.partition('/')[2]}"] if "/" in last else []
    return [(*node[:-1], new) for new in (suffixed, *scoped)]


def removed(kind: Kind) -> Iterator[Case]:
    for node in nodes(kind.entries):
        if node != ("state",):  # of one that took no step
            yield Case(str(node), kind.build(without(kind.entries, under(kind.entries, node))), words(kind, node))
    for name in NAMES:
        for roles in ("mv", "mvw"):
            gone = [p for p, e in kind.entries.items() if e.name == name and e.role in roles]
            yield Case(f"{roles} of {name}", kind.build(without(kind.entries, gone)))


def added(kind: Kind) -> Iterator[Case]:
    """Copies, in turn at the end and behind what is copied."""
    at_the_end = itertools.cycle([True, False])
    for node in nodes(kind.entries):
        new_names = other_names(kind, node) + ([(*node, "again")] if kind.is_list and not kind.is_unnamed else [])
        for new in new_names:
            copy = {(*new, *path[len(node) :]): e for path, e in under(kind.entries, node).items()}
            named_by = words(kind, node)
            known = named_by and (*named_by, str(new[-1]), "other/")
            if next(at_the_end):
                yield Case(f"{node} as {new} at the end", kind.build(kind.entries | copy), known)
                continue
            items = list(kind.entries.items())
            last = max(i for i, (path, _) in enumerate(items) if path in under(kind.entries, node))
            behind = dict([*items[: last + 1], *copy.items(), *items[last + 1 :]])
            yield Case(f"{node} as {new} behind it", kind.build(behind), known)


def renamed(kind: Kind) -> Iterator[Case]:
    for node in nodes(kind.entries):
        is_position = isinstance(node[-1], int) and (len(node) == 1 or node[-2] in LISTS)
        for new in [] if is_position else other_names(kind, node):
            inside = under(kind.entries, node)
            moved = {(*new, *p[len(node) :]) if p in inside else p: e for p, e in kind.entries.items()}
            named_by = words(kind, node)
            yield Case(f"{node} to {new}", kind.build(moved), named_by and (*named_by, str(new[-1])))
    for path, entry in kind.entries.items():
        if entry.role in ("id", "name"):
            new_value = 100 + entry.value if entry.role == "id" else f"{entry.value}_1"
            source = kind.build(replaced(kind.entries, {path: new_value}))
            yield Case(f"{path} = {new_value}", source, (str(new_value), *(words(kind, path) or ())))


def exchanged(kind: Kind) -> Iterator[Case]:
    """Pairs among two parameters and what belongs to none; m and v of all; the moments of two parameters."""
    few = {p: e for p, e in kind.entries.items() if e.name in (None, *NAMES[:2]) and e.role not in ("option", "other")}
    some = list(itertools.combinations(few, 2))
    for name in NAMES[2:]:
        some.append(tuple(p for p, e in kind.entries.items() if e.name == name and e.role in "mv"))
    for a, b in some:
        if _is_seen(kind, kind.entries[a], kind.entries[b]):
            values = {a: kind.entries[b].value, b: kind.entries[a].value}
            named_by = words(kind, a), words(kind, b)
            either = None if None in named_by else tuple(itertools.chain(*map(tuple, named_by)))
            yield Case(f"{a} and {b}", kind.build(replaced(kind.entries, values)), either)
    for first, second in itertools.pairwise(NAMES):
        by_role = {(e.name, e.role): (p, e) for p, e in kind.entries.items()}
        values = {}
        for role, (one, other) in itertools.product("mv", ((first, second), (second, first))):
            values[by_role[one, role][0]] = by_role[other, role][1].value
        yield Case(f"moments of {first} and {second}", kind.build(replaced(kind.entries, values)))


def _is_seen(kind: Kind, a: Entry, b: Entry) -> bool:
    """Whether something in the source tells that two values are exchanged."""
    roles = {a.role, b.role}
    if roles & {"id", "name"}:
        return len(roles) == 1
    if np.shape(a.value) != np.shape(b.value):
        return True
    if roles == {"product", "rate"}:
        return kind.is_unnamed
    if len(roles) == 1 and np.ndim(a.value) == 0:
        return bool(a.value != b.value)
    return "v" in roles and len(roles) == 2 if np.ndim(a.value) else True


IMPOSSIBLE: dict[str, list[Any]] = {
    "step": [-3, 5.5, float("nan"), float("inf"), np.asarray([COUNT, COUNT]), None, "seven"],
    "product": [-0.1, 1.5, float("nan"), float("inf"), np.asarray([0.5, 0.5]), None, "half"],
    "power": [-0.1, 1.5, float("nan"), float("inf"), 0.5, np.asarray([0.4, 0.4]), None, "half"],
    "m": [float("nan"), float("inf"), -float("inf")],
    "v": [-1.0, float("nan"), float("inf")],
}


def impossible(kind: Kind) -> Iterator[Case]:
    for path, entry in kind.entries.items():
        for bad in IMPOSSIBLE.get(entry.role, []):
            value = bad if entry.role in SCALARS else _with_last(entry.value, bad)
            named_by = (*(words(kind, path) or ()), *SCALARS.get(entry.role, ()))
            named_by += (str(kind.label(entry.name)),) if entry.name else ()
            yield Case(f"{path} = {bad}", kind.build(replaced(kind.entries, {path: value})), named_by)
        for what, value in _other_arrays(entry):
            yield Case(f"{path} {what}", kind.build(replaced(kind.entries, {path: value})), words(kind, path))
        if entry.name and entry.role in (("product",) if kind.load is load_groups else ("step", "product")):
            source = kind.build(
                replaced(kind.entries, {path: entry.value + np.float32(2 if entry.role == "step" else 0.1)})
            )
            yield Case(f"{path} of its own", source, words(kind, path))


def _with_last(array: np.ndarray, number: float) -> np.ndarray:
    """An array with another last number."""
    copy = array.copy()
    copy.flat[-1] = number
    return copy


def _other_arrays(entry: Entry) -> list[tuple[str, Any]]:
    if entry.role not in ("m", "v"):
        return []
    x = entry.value
    return [("with an axis more", x[None]), ("shorter", x[:-1]), ("as None", None), ("as text", "moments")]


def other_class(kind: Kind) -> Iterator[Case]:
    known = (
        "Nadam",
        "NAdam",
        "lacks",
        "unknown keys",
        "ScaleByAdamState",
        "fit no",
        "config is needed",
        "holds no optimizer state",
    )
    for name, source in kind.others.items():
        yield Case(name, source, known, is_lost=True)


def two(kind: Kind) -> Iterator[Case]:
    known = ("optimizer", "one ScaleByAdamState", "fit no")
    for name, source in kind.two.items():
        yield Case(name, source, known, is_lost=True)


def order(kind: Kind) -> Iterator[Case]:
    items = list(kind.entries.items())
    turned = [dict(items[::-1]), dict(sorted(items, key=lambda item: tuple(map(str, item[0]))))]
    turned += [dict([*items[i:], *items[:i]]) for i in range(1, len(items))]
    for i, entries in enumerate(turned):
        if i < 2 or dataclasses.replace(kind, entries=entries).in_lists == kind.in_lists:
            yield Case(f"order {i}", kind.build(entries))
    stored = [entry.value for entry in kind.entries.values() if entry.role == "name"]
    exchanged_names = [{"kernel": "table", "table": "kernel"}.get(name, name) for name in stored]
    for wrong in [*_wrong_names(kind.options.get("names") or stored), *([exchanged_names] if stored else [])]:
        source = kind.build(kind.entries)
        yield Case(f"names={wrong}", source, ("names", *map(str, {*wrong, *NAMES})), {"names": wrong})


def _wrong_names(names: Sequence[str]) -> Iterator[list[str]]:
    if names:
        yield from (sorted(names), list(reversed(names)), [*names, "another"])
        for i, name in enumerate(names):
            before, after = list(names[:i]), list(names[i + 1 :])
            yield before + after
            yield [*before, f"{name}_1", *after]
            yield [*before, names[i - 1], *after]


FAULTS = {
    "removed": removed,
    "added": added,
    "renamed": renamed,
    "exchanged": exchanged,
    "impossible": impossible,
    "other class": other_class,
    "two": two,
    "order": order,
}


# The account.


def difference(kind: Kind, loaded: Any, shape: Callable[[Any], Any]) -> str:
    """In what a loaded state is not the truth."""
    states = [*nodes_of(loaded, KINDS_OF_STATES)]
    expected = {"product": product_after(COUNT, kind.config), "m": shape(M), "v": shape(V)}
    got = {name: merged([getattr(state, name) for state in states]) for name in "mv"}
    wrong = [] if {int(state.count) for state in states} == {COUNT} else ["count"]
    for name, product in [("product", float(state.mu_product)) for state in states]:
        wrong += [] if np.isclose(product, expected[name], rtol=1e-4, atol=0) else [name]
    for name, found in got.items():
        same = jax.tree.map(np.array_equal, found, expected[name])
        wrong += [] if all(jax.tree.leaves(same)) else [name]
    return ", ".join(wrong)


def other_weights(kind: Kind, source: Any) -> bool:
    """Whether the weights in a source are read, and are not the truth."""
    if kind.read_weights is None:
        return False
    try:
        found = kind.by_name(kind.read_weights(source))
    except (ValueError, TypeError, KeyError):
        return False
    return not all(np.array_equal(found[name], x) for name, x in W.items())


def verdict(kind: Kind, case: Case, by_name: Any = dict, shape: Callable[[Any], Any] = tree) -> str:
    """What is wrong with how a source is taken: nothing if it is refused by name, or loaded right.

    Args:
      kind: the kind of source.
      case: the source.
      by_name: changes the arrays by name on their way into the params.
      shape: the params of arrays by name.
    """
    params = PARAMS if shape is tree else shape(W)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", UserWarning)
        try:
            taken = kind.load(
                case.source, lambda x: shape(by_name(kind.by_name(x))), params, **{**kind.options, **case.options}
            )
            wrong = difference(kind, taken, shape) or ("weights" if other_weights(kind, case.source) else "")
        except (ValueError, TypeError) as error:
            named = case.words is None or any(
                re.search(rf"(?<!\w){re.escape(word)}", str(error)) for word in case.words
            )
            return "" if named else f"the text names none of {case.words}: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if case.is_lost:
        return "loaded"
    return wrong and f"{'wrong' if caught else 'silently wrong'} {wrong}"


def listed(found: Mapping[str, str]) -> str:
    """The verdicts that are not empty."""
    return "".join(f"\n{name}: {text}" for name, text in found.items() if text)


@pytest.mark.filterwarnings("ignore:the checkpoint stores no product", "ignore:the checkpoint is that of a LossScale")
@pytest.mark.parametrize("name", KINDS)
def test_truth(name):
    kind = KINDS[name]
    source = kind.build(kind.entries)
    loaded = kind.load(source, lambda x: tree(kind.by_name(x)), PARAMS, **kind.options)
    assert not difference(kind, loaded, tree)
    assert not other_weights(kind, source)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", KINDS)
def test_refused_or_right(name, fault):
    kind = KINDS[name]
    wrong = listed({case.name: verdict(kind, case) for case in FAULTS[fault](kind)})
    assert not wrong, wrong


def test_size():
    """The grid does not shrink unseen."""
    sizes = {fault: sum(len(list(cases(kind))) for kind in KINDS.values()) for fault, cases in FAULTS.items()}
    assert sizes == SIZES


SIZES = {"removed": 1071, "added": 1007, "renamed": 876, "exchanged": 767, "impossible": 2854}
SIZES |= {"other class": 230, "two": 66, "order": 766}


# Arrival.

CHANGES: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
    "ignores its argument": lambda w: W,
    "zeros": lambda w: {name: 0 * x for name, x in w.items()},
    "twice everything": lambda w: {name: 2 * x for name, x in w.items()},
    "half a percent more": lambda w: {name: np.float32(1.005) * x for name, x in w.items()},
    "magnitudes": lambda w: {name: np.abs(x) for name, x in w.items()},
    "whole numbers": lambda w: {name: np.round(x) for name, x in w.items()},
    "in [-1, 1]": lambda w: w | {"conv": np.clip(w["conv"], -1, 1)},
    "means": lambda w: {name: np.full_like(x, np.mean(x)) for name, x in w.items()},
    "means of one": lambda w: w | {"scale": np.full_like(w["scale"], np.mean(w["scale"]))},
    "the other sign": lambda w: {name: -x for name, x in w.items()},
    "kernel in the place of table": lambda w: w | {"table": w["kernel"]},
    "table in the place of kernel": lambda w: w | {"kernel": w["table"]},
    "the mean of kernel and table": lambda w: w | dict.fromkeys(("kernel", "table"), (w["kernel"] + w["table"]) / 2),
    **{f"weights in the place of {name}": lambda w, name=name: w | {name: W[name]} for name in NAMES},
    **{f"twice {name}": lambda w, name=name: w | {name: 2 * w[name]} for name in NAMES},
    **{f"zeros for {name}": lambda w, name=name: w | {name: 0 * w[name]} for name in NAMES},
    **{f"the other sign of {name}": lambda w, name=name: w | {name: -w[name]} for name in NAMES},
    **{f"a part of {name} is zero": lambda w, name=name: w | {name: w[name] * _half(name)} for name in NAMES},
}


def _half(name: str) -> np.ndarray:
    """One for all numbers of a parameter but the last."""
    return _with_last(np.ones(SHAPES[name], np.float32), 0.0)


@pytest.mark.parametrize("name", KINDS)
def test_changed_on_the_way(name):
    kind = KINDS[name]
    case = Case("truth", kind.build(kind.entries))
    wrong = listed({what: verdict(kind, case, lambda w, by=by: by(dict(w))) for what, by in CHANGES.items()})
    assert not wrong, wrong


@pytest.mark.parametrize("name", KINDS)
def test_lost_on_the_way(name):
    """The params lack a parameter that the source has."""
    kind, found = KINDS[name], {}
    for gone in NAMES:
        case = Case(gone, kind.build(kind.entries), (str(kind.label(gone)),), is_lost=True)
        found[gone] = verdict(kind, case, shape=lambda w, gone=gone: {n: w[n] for n in NAMES if n != gone})
    assert not listed(found), listed(found)


@pytest.mark.parametrize("name", KINDS)
def test_used_twice(name):
    kind, source = KINDS[name], KINDS[name].build(KINDS[name].entries)

    def twice(weights: Mapping[str, Any]) -> Any:
        return tree(weights) | {"again": weights["conv"]}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = kind.load(source, lambda x: twice(kind.by_name(x)), twice(W), **kind.options)
    assert not difference(kind, loaded, twice)
