"""Parameters of a checkpoint and leaves of the params, matched by the function that the user has for the weights.

A checkpoint goes one way: accounted for, matched, put into the optimizer state.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from optax_nadam import _validation as validation
from optax_nadam._config import NadamConfig, product_after
from optax_nadam._load import has_schedule, put_counters, put_state
from optax_nadam._state import KINDS, convert_moments, get_state
from optax_nadam._tree import by_name, is_masked, is_pair, map_parts, nodes_of
from optax_nadam._wrappers import as_pairs
from optax_nadam.compat._checkpoint import Checkpoint, Group, Label, Parameter
from optax_nadam.compat._common import listed

_UNNAMED = (
    "to_params got a list of {count} arrays in the optimizer's order, because the checkpoint does not name its"
    " parameters, and failed: {error}. If it takes arrays by name, pass names=[n for n, _ in model.named_parameters()]"
    " to read or load_state; where the optimizer has several groups, the names of one group after another, as they went"
    " into it."
)
_TREE = "to_params got the moments in a tree like the other run's params, and failed: {error}."
_ABSENT = (
    "to_params asked for {name!r}, but the checkpoint has moments of {labels} only. {advice}If it is not trained, pass"
    " weights, the model's own arrays by name: its moments are then zero. If it is tied to another parameter (one"
    " tensor under two names), its moments are under the first name: let to_params take that one."
)
_PREFIXED = (
    "The checkpoint has it as {found!r}: torch.compile puts '_orig_mod.' into names, DistributedDataParallel 'module.'."
    " Pass names=[n.replace({prefix!r}, '') for n, _ in model.named_parameters()]. "
)
PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel
_MIXED = (
    "{leaf} is made of parameters of several parameter groups, or of trained and untrained ones, and has one optimizer"
    " only. Split the leaf, or build the optimizer with config_from(...).build()."
)
_CHANGED = (
    "the function between weights and params must rearrange numbers only (transpose, reshape, concatenate, pad with"
    " zeros, convert), since moments go through it too, but it made {got} of {known}."
)
_NO_NADAM = (
    "no Nadam in opt_state has {leaf}, so that its shape is not there. Pass params, the tree that"
    " the optimizer updates."
)
_SELECT = (
    " If the params lack some of the checkpoint's parameters, name those that they have: pass"
    " read(source).select([...]) as the source."
)
_LEFT_OUT = (
    "to_params must put each number of the checkpoint's moments into the params, but it leaves out {lost}." + _SELECT
)
_OTHER_NUMBERS = (
    "to_params must rearrange the arrays that it gets, as it does with the model's weights: what it returns for the"
    " moments are other numbers. It gets {form}, and must use that alone."
)
_BEHIND = (
    "the parameters differ in the steps they took: {differences}. One Nadam counts for all of its parameters. Build the"
    " optimizer with from_groups(source, to_params) of the whole checkpoint, which has a Nadam for each number of steps"
    " and leaves alone what never stepped; or pass mismatch='largest' to take the largest step and its product of"
    " momenta for all, with the moments as they are (and zero for what never stepped)."
)
_CONFIG_NEEDED = (
    "config is needed: {source} stores no product of the momenta and no hyperparameters from which it could be"
    " computed. Pass config=, the NadamConfig of the optimizer that continues."
)
_CONSTANT = (
    "the learning rate of the run had a schedule, and the optimizer that continues has a constant one. Pass"
    " learning_rate=, a schedule of the run's steps, to from_groups, to config_from(...).build or to the constructor."
)
_OTHER_TREE = (
    "to_params must make of the checkpoint's moments a tree like the params, as it does of the weights, but"
    " {difference}. If names were passed, they must be in the order of the optimizer's parameters, group after group."
    + _SELECT
)
NO_TAG = -1  # of what no Nadam has
_LARGEST_TAG = 256  # the last whole number that bfloat16 has, and all before it
_BLOCK = 2**22  # numbers that are counted at a time


@dataclasses.dataclass(frozen=True)
class Matched:
    """A checkpoint in trees like the params, each made by ``to_params`` where it is first asked for.

    Attributes:
      found: the checkpoint.
      to_params: the user's function from weights to params.
    """

    found: Checkpoint
    to_params: Callable[[Any], Any]

    @functools.cached_property
    def moments(self) -> tuple[Any, Any]:
        """The first and the second moments; all of their numbers have arrived."""
        self._check_arrival()
        return self._called(self.found.moments("m")), self._called(self.found.moments("v"))

    def tagged(self, tags: Mapping[Label, int]) -> Any:
        """The params with the tags of the parameters that each leaf is made of, in place of their numbers.

        A tag is not 0, so that what pads with zeros is told from it, and small, so that every dtype holds it.
        """
        if max(tags.values(), default=1) > _LARGEST_TAG:
            raise ValueError("the checkpoint has too many different parameter groups; merge those that are alike.")
        return self._called(self._filled(tags))

    def parameters_of(self, moments: Any) -> Mapping[Label, Parameter | None]:
        """The parameters in the moments of a Nadam: all of them where it has all leaves, or where none has stepped."""
        if not any_masked(moments) or not self.found.stepped:
            return self.found.parameters
        tags, tree = self._owners
        leaves = jax.tree.leaves(self.selected(tree, moments))
        own = set().union(*(tags_in(leaf, {NO_TAG, *tags.values()}) for leaf in leaves))
        return {label: parameter for label, parameter in self.found.parameters.items() if tags[label] in own}

    @functools.cached_property
    def _owners(self) -> tuple[Mapping[Label, int], Any]:
        """A tag for each parameter, which tells its group and its steps, and the params with the tags."""
        kinds = {label: (self.found.group_of[label], p and p.step) for label, p in self.found.parameters.items()}
        numbers = {kind: 1 + i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
        tags = {label: numbers[kind] for label, kind in kinds.items()}
        return tags, self.tagged(dict.fromkeys(self.found.given_weights, NO_TAG) | tags)

    def selected(self, tree: Any, like: Any) -> Any:
        """The tree in the containers of the moments ``like``, with a masked node where these have one."""
        found, wanted = by_name(tree), by_name(like, is_leaf=lambda node: is_masked(node) or is_pair(node))
        own = {label: node.real if is_pair(node) else node for label, node in wanted.items() if not is_masked(node)}
        if difference := _difference(found, own, wanted):
            raise ValueError(_OTHER_TREE.format(difference=difference))
        return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_pair), [found[label] for label in own])

    def _filled(self, numbers: Mapping[Label, float]) -> dict[Label, np.ndarray]:
        """Arrays like the parameters, each full of its number."""
        return {label: np.broadcast_to(np.float32(numbers[label]), x) for label, x in self.found.shapes.items()}

    def _called(self, arrays: Mapping[Label, Any]) -> Any:
        """What ``to_params`` makes of arrays, which it gets as it gets the weights."""
        found = self.found
        try:
            return self.to_params(found.arranged(arrays))
        except KeyError as error:
            if found.structure is not None:
                raise ValueError(_TREE.format(error=f"{error} is not there")) from error
            if not found.is_named or not error.args or error.args[0] in arrays:
                raise
            name, labels = error.args[0], list(arrays)
            raise ValueError(_ABSENT.format(name=name, labels=listed(labels), advice=_advice(name, labels))) from error
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            if found.is_named and found.structure is None:
                raise
            text = _UNNAMED if found.structure is None else _TREE
            raise ValueError(text.format(count=len(arrays), error=error)) from error

    def _check_arrival(self) -> None:
        """Rejects a ``to_params`` that leaves numbers out or changes them; to use them twice is allowed.

        In place of the moments it gets marks, which tell whose number is where.
        """
        shapes, stepped = self.found.shapes, self.found.stepped
        lost: set[Label] = set()
        for marks in _marks(len(stepped)):
            sent = {label: _marked(shapes[label], mark) for label, mark in zip(stepped, marks, strict=True)}
            leaves = jax.tree.leaves(self._called(self._filled(dict.fromkeys(shapes, 0)) | sent))
            counts, arrived = _counted(sent.values()), _counted(leaves)
            if arrived.keys() - counts.keys() - {0.0}:
                form = "a dict by name" if self.found.is_named else f"a list of {len(shapes)} arrays"
                raise ValueError(_OTHER_NUMBERS.format(form=form))
            short = {mark for mark, count in counts.items() if arrived.get(mark, 0) < count}
            lost |= {label for label, mark in zip(stepped, marks, strict=True) if short & {mark, -mark / 2}}
        if lost:
            raise ValueError(_LEFT_OUT.format(lost=listed([label for label in stepped if label in lost])))


# A mark is one of 0.5, 1.5, ... 127.5, and in some places of an array its half with the other sign. Every dtype holds
# both, and no sum, sign, factor or rounding makes of one another's.
def _marks(count: int) -> Iterator[np.ndarray]:
    """A mark for each of so many parameters; where there are too many, another one for the next digit."""
    for power in range(1 + int(np.log(max(count, 1)) / np.log(128))):
        yield 0.5 + np.arange(count) // 128**power % 128


def _marked(shape: tuple[int, ...], mark: float) -> np.ndarray:
    """An array of a mark, of which about a quarter is its half with the other sign."""
    is_half = np.random.default_rng(0).integers(0, 4, shape, np.uint8) == 0
    if is_half.size > 1:
        is_half.flat[0], is_half.flat[-1] = True, False
    return np.where(is_half, np.float32(-mark / 2), np.float32(mark))


def _counted(leaves: Iterable[Any]) -> dict[float, int]:
    """How often there is each number in leaves; NaN stands for all that is no quarter, or too large for a mark."""
    counts, others = np.zeros(2**16, np.int64), 0
    for block in _blocks(leaves):
        fourfold = 4 * np.real(block).astype(np.float32)
        with np.errstate(invalid="ignore"):
            codes = fourfold.astype(np.int16)
        others += int(np.count_nonzero(codes != fourfold))
        counts += np.bincount(codes.view(np.uint16), minlength=2**16)
    present = np.flatnonzero(counts)
    quarters = present.astype(np.uint16).view(np.int16) / 4
    return dict(zip(quarters.tolist(), counts[present].tolist(), strict=True)) | ({np.nan: others} if others else {})


def _blocks(leaves: Iterable[Any]) -> Iterator[np.ndarray]:
    """The numbers of leaves, a part of a large one at a time."""
    for flat in (np.asarray(leaf).ravel() for leaf in leaves):
        yield from (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def load(opt_state: Any, matched: Matched, config: NadamConfig | None, mismatch: str = "raise") -> Any:
    """The optimizer state that continues from a checkpoint, each Nadam in it from its own parameters.

    Args:
      opt_state: the state of the optimizer that is to continue.
      matched: the checkpoint.
      config: what a product of the momenta is computed from that is not stored; None for the checkpoint's own.
      mismatch: as in :func:`optax_nadam.compat.torch.load_state`.

    Raises:
      ValueError: the product of the momenta is not stored and there are no hyperparameters; the moments do not fit.
      TypeError: a moment is not an array of numbers.
    """
    validation.check_choice("mismatch", mismatch, ("raise", "largest"))
    if not any(nodes_of(opt_state, KINDS)):
        get_state(opt_state)  # which raises
    loaded = map_parts(lambda part: _load_part(part, matched, config, mismatch), opt_state, KINDS)
    if matched.found.is_scheduled and not has_schedule(opt_state):
        validation.warn(_CONSTANT)
    return put_counters(loaded, matched.found.count)


def _load_part(part: Any, matched: Matched, config: NadamConfig | None, mismatch: str) -> Any:
    """The part of an optimizer state that has one Nadam; its counters of schedules as they are."""
    like, found = get_state(part), matched.found
    parameters = matched.parameters_of(like.m)
    if not any(parameters.values()):
        wide = get_state(convert_moments(part, m_dtype=None, v_dtype=None))
        m, v = jax.tree.map(jnp.zeros_like, (wide.m, wide.v))
        return put_state(part, count=0, mu_product=1.0, m=m, v=v)
    step, product = _progress(parameters, mismatch)
    if product is None:
        group = found.groups[next(found.group_of[label] for label, p in parameters.items() if p is not None)]
        product = product_after(step, config or _config_of(found, group))
    m, v = (as_pairs(matched.selected(tree, like.m)) for tree in matched.moments)
    return put_state(part, count=step, mu_product=product, m=m, v=v)


def _config_of(found: Checkpoint, group: Group) -> NadamConfig:
    """The group's own hyperparameters, of which the learning rate does not matter here."""
    if not group.options:
        raise ValueError(_CONFIG_NEEDED.format(source=found.optimizer))
    return found.parse(group.options, 1.0)


def _progress(parameters: Mapping[Label, Parameter | None], mismatch: str) -> tuple[int, float | None]:
    """The step and the product that stand for all parameters: of the largest step, in the widest dtype."""
    largest = max((p for p in parameters.values() if p), key=lambda p: (p.step, jnp.finfo(p.dtype).bits))
    apart = {label: p for label, p in parameters.items() if p is None or not _same(p, largest)}
    if apart and mismatch == "raise":
        raise ValueError(_BEHIND.format(differences=_described(apart, len(parameters) - len(apart), largest)))
    return largest.step, largest.product


def _same(p: Parameter, largest: Parameter) -> bool:
    """Whether two parameters took the same steps. torch rounds each product to the dtype of its parameter."""
    if p.step != largest.step or p.product is None or largest.product is None:
        return p.step == largest.step
    dtype = jnp.finfo(p.dtype)
    rtol = max(1e-4, p.step * float(dtype.eps) / 2)
    return bool(np.isclose(p.product, largest.product, rtol=rtol, atol=max(1e-9, float(dtype.smallest_normal))))


def _described(apart: Mapping[Label, Parameter | None], others: int, largest: Parameter) -> str:
    def text(p: Parameter | None) -> str:
        return "none" if p is None else f"{p.step}" + ("" if p.product is None else f" (product {p.product:.6g})")

    kinds: dict[str, list[Label]] = {}
    for label, parameter in apart.items():
        kinds.setdefault(text(parameter), []).append(label)
    behind = "; ".join(f"{listed(labels)} took {kind}" for kind, labels in kinds.items())
    return f"{behind}; {others} others took {text(largest)}"


def _advice(name: Any, labels: Sequence[Label]) -> str:
    """What to do about a name that the checkpoint has with a prefix."""
    for prefix in PREFIXES:
        for label in labels:
            if prefix in str(label) and str(label).replace(prefix, "") == name:
                return _PREFIXED.format(found=label, prefix=prefix)
    return ""


def tags_in(leaf: Any, known: Collection[int]) -> set[int]:
    """The tags in a leaf of what the user's function made of tagged arrays."""
    array = np.real(np.asarray(leaf))
    constant = array.size and array.min() == array.max()
    tags = {float(tag) for tag in (array.flat[:1] if constant else np.unique(array))} - {0.0}
    if not tags <= set(known):
        raise ValueError(_CHANGED.format(got=sorted(tags - set(known)), known=sorted(known)))
    return {int(tag) for tag in tags}


def the_tag(place: str, leaf: Any, known: Collection[int]) -> int:
    """The one tag in a leaf."""
    tags = tags_in(leaf, known)
    if len(tags) != 1:
        raise ValueError(_MIXED.format(leaf=place))
    return tags.pop()


def any_masked(tree: Any) -> bool:
    """Whether another optimizer has some of the leaves."""
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def _difference(found: Mapping[Any, Any], own: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> str:
    """How the leaves that ``to_params`` made differ from those of the params, by name."""
    missing, extra = own.keys() - found.keys(), found.keys() - wanted.keys()
    texts = [f"it lacks {listed(sorted(map('/'.join, missing)))}"] if missing else []
    texts += [f"the params have no {listed(sorted(map('/'.join, extra)))}"] if extra else []
    shapes = {label: (np.shape(found[label]), node.shape) for label, node in own.items() if label in found}
    others = [f"{'/'.join(label)!r} has shape {x}, the params {y}" for label, (x, y) in shapes.items() if x != y]
    return "; ".join(texts or others[:3])


def filled(tree: Any, number: float) -> Any:
    """Arrays of the shapes of a tree, all of one number."""
    return jax.tree.map(lambda x: np.full(np.shape(x), number, np.float32), tree)


def merged(trees: Sequence[Any]) -> Any:
    """A tree of NumPy arrays from trees that mask each other's leaves; pairs are complex arrays again."""

    def merge(path: Any, *nodes: Any) -> np.ndarray:
        node = next((node for node in nodes if not is_masked(node)), None)
        if node is None:
            raise ValueError(_NO_NADAM.format(leaf=f"params{jax.tree_util.keystr(path)}"))
        return np.asarray(jax.lax.complex(node.real, node.imaginary) if is_pair(node) else node)

    return jax.tree_util.tree_map_with_path(merge, *trees, is_leaf=lambda node: is_masked(node) or is_pair(node))
