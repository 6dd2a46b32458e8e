"""Optimizers of every framework behind one interface: start on a problem, take a step, wait, read the params."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from benchmarks.tracing import whole_step
from tests.reference import Nadam

Arrays = list[np.ndarray[Any, Any]]

ENVIRONMENT = {  # to be set before a framework is imported
    "KERAS_BACKEND": "jax",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # or torch finds the GPU full
}
LEARNING_RATE, EPS = 1e-3, 1e-7
# The least bytes a parameter that a step moves: read param, gradient and two moments, write all but the gradient.
STEP_BYTES = 28


class Problem:
    """Params and gradients that optimizers start from."""

    def __init__(self, params: Arrays, grads: Arrays) -> None:
        """Takes both as they are."""
        self.params, self.grads = params, grads
        self.size = sum(p.size for p in params)
        self._converted: dict[Callable[..., Any], list[Any]] = {}

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]]) -> "Problem":
        """Random float32 arrays of these shapes, from a fixed seed."""
        rng = np.random.default_rng(20261122)
        params, grads = ([x * rng.standard_normal(shape, np.float32) for shape in shapes] for x in (0.02, 0.1))
        return cls(params, grads)

    def grads_as(self, convert: Callable[..., Any]) -> list[Any]:
        """The gradients as arrays of a framework, whose optimizers share them."""
        if convert not in self._converted:
            self._converted[convert] = [convert(g) for g in self.grads]
        return self._converted[convert]


@dataclass(frozen=True)
class Run:
    """An optimizer that trains params of its own.

    Attributes:
      step: starts ``steps`` steps, and may return before they are done.
      wait: returns when all steps that were started are done.
      params: the current params, as NumPy arrays.
      steps: how many steps one call takes.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any]
    params: Callable[[], Arrays]
    steps: int = 1


@dataclass(frozen=True)
class Rival:
    """One row of the table.

    Attributes:
      name: as shown.
      start: starts it on a problem.
      updates: the updates it must make, before the learning rate: a function of a leaf's gradients, with a leading
        axis of steps. None for what is not an optimizer.
      packages: what must be installed.
      has_gpu: whether its framework sees a GPU; None where that framework is jax.
      bytes: the least bytes a parameter that it moves.
    """

    name: str
    start: Callable[[Problem], Run]
    updates: Callable[[Any], Any] | None
    packages: tuple[str, ...] = ()
    has_gpu: Callable[[], bool] | None = None
    bytes: int = STEP_BYTES

    def left_out(self) -> str | None:
        """Why it is left out, or None: its framework must be installed, on the kind of device that jax is on."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if self.has_gpu is not None and self.has_gpu() != _jax_has_gpu():
            return f"{self.packages[0]} and jax would not be on the same device"
        return None


def error(rival: Rival, calls: int = 3) -> float:
    """Relative error of the change of the params over a few steps on small leaves, the worst over the leaves."""
    problem = Problem.of([(5, 3), (4,), (2, 3, 3, 2)])
    run = rival.start(problem)
    before = run.params()
    for _ in range(calls):
        run.step()
    run.wait()
    assert rival.updates is not None
    errors = []
    for old, new, g in zip(before, run.params(), problem.grads, strict=True):
        same_each_step = np.broadcast_to(g.astype(np.float64), (calls * run.steps, *g.shape))
        expected = -LEARNING_RATE * np.sum(rival.updates(same_each_step), axis=0)
        errors.append(np.linalg.norm(new - old - expected) / np.linalg.norm(expected))
    return float(max(errors))


def nadam(rule: str = "scheduled", momentum_decay: float = 4e-3) -> Callable[[Any], Any]:
    """The updates of a variant of Nadam, in double precision."""
    return lambda grads: Nadam(rule, eps=EPS, momentum_decay=momentum_decay).updates(grads)[0]


def adam(grads: Any, b1: float = 0.9, b2: float = 0.999) -> Any:
    """The updates of Adam, in double precision."""
    m, v, updates = 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        updates.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + EPS))
    return np.stack(updates)


def jax_rival(name: str, tx: Any, updates: Callable[[Any], Any] | None, looped: int = 0) -> Rival:
    """An Optax transformation and ``apply_updates`` under jit, params and state donated.

    Looped, that many steps are one program, so that the dispatch of hundreds of arrays is paid once.
    """
    one = whole_step(tx, apply=True)
    step = jax.jit(in_a_loop(one) if looped else one, donate_argnums=(0, 1))

    def start(problem: Problem) -> Run:
        params = [jnp.array(p) for p in problem.params]
        carry, grads = [params, tx.init(params)], problem.grads_as(jnp.array)
        scales = [jnp.ones(looped)] if looped else []

        def call() -> None:
            carry[:] = step(*carry, grads, *scales)

        return Run(call, lambda: jax.block_until_ready(carry), lambda: _numpy(carry[0]), max(1, looped))

    return Rival(name, start, updates)


def in_a_loop(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step for each of ``scales``, by which the gradients are multiplied.

    They are ones, but the compiler does not know that. Without them it could move the work on the gradients alone out
    of the loop, and the steps would not be those of a training run.
    """

    def steps(params: Any, state: Any, grads: Any, scales: Any) -> Any:
        def body(carry: Any, scale: Any) -> Any:
            return step(*carry, jax.tree.map(lambda g: scale * g, grads)), None

        return jax.lax.scan(body, (params, state), scales)[0]

    return steps


def jax_copy(looped: int = 0) -> Rival:
    """``x + 1`` in place on one array as large as params and moments: the traffic of a step without the gradients."""
    ones = optax.stateless(lambda _, params: jax.tree.map(jnp.ones_like, params))
    name = "copy: x + 1 in place, jax" + (", in a loop" if looped else "")
    rival = jax_rival(name, ones, None, looped)
    return dataclasses.replace(rival, bytes=24, start=lambda problem: rival.start(Problem([_flat(problem)], [])))


def torch_rival(name: str, kind: str, updates: Callable[[Any], Any], **options: Any) -> Rival:
    """An optimizer of ``torch.optim``, on the device that jax is on."""

    def start(problem: Problem) -> Run:
        import torch

        params = [torch.nn.Parameter(_torch(p)) for p in problem.params]
        for p, g in zip(params, problem.grads_as(_torch), strict=True):
            p.grad = g
        optimizer = getattr(torch.optim, kind)(params, lr=LEARNING_RATE, eps=EPS, **options)
        return Run(optimizer.step, _torch_wait, lambda: _numpy(p.detach().cpu().numpy() for p in params))

    return Rival(name, start, updates, ("torch",), _torch_has_gpu)


def torch_copy() -> Rival:
    """``copy_`` from one array as large as params and moments to another."""

    def start(problem: Problem) -> Run:
        source, target = _torch(_flat(problem)), _torch(_flat(problem))
        return Run(lambda: target.copy_(source), _torch_wait, lambda: _numpy([target.cpu().numpy()]))

    return Rival("copy: copy_, torch", start, None, ("torch",), _torch_has_gpu, bytes=24)


def keras_rival() -> Rival:
    """Keras 3 on its JAX backend, called as by its own trainer: stateless, under jit, donated."""

    def start(problem: Problem) -> Run:
        import keras

        optimizer = keras.optimizers.Nadam(LEARNING_RATE, epsilon=EPS)
        variables = [keras.Variable(p) for p in problem.params]
        optimizer.build(variables)
        carry = [[v.value for v in kind] for kind in (variables, optimizer.variables)]
        grads = problem.grads_as(jnp.array)
        step = jax.jit(lambda params, state, g: optimizer.stateless_apply(state, g, params), donate_argnums=(0, 1))

        def call() -> None:
            carry[:] = step(*carry, grads)

        return Run(call, lambda: jax.block_until_ready(carry), lambda: _numpy(carry[0]))

    return Rival("Keras 3 Nadam on jax, stateless_apply", start, nadam(momentum_decay=1.0), ("keras",))


def legacy_keras_rival(name: str, **options: Any) -> Rival:
    """``tf_keras.optimizers.legacy.Nadam`` inside a ``tf.function`` with the given options."""

    def start(problem: Problem) -> Run:
        import tensorflow as tf
        import tf_keras

        variables = [tf.Variable(p) for p in problem.params]
        grads = problem.grads_as(tf.constant)
        optimizer = tf_keras.optimizers.legacy.Nadam(LEARNING_RATE, epsilon=EPS)

        def apply(grads: Any) -> None:
            optimizer.apply_gradients(zip(grads, variables, strict=True))

        step = tf.function(apply, **options)
        return Run(lambda: step(grads), tf.test.experimental.sync_devices, lambda: _numpy(v.numpy() for v in variables))

    return Rival(name, start, nadam(), ("tensorflow", "tf_keras"), _tensorflow_has_gpu)


def _numpy(arrays: Any) -> Arrays:
    return [np.array(x) for x in arrays]


def _flat(problem: Problem) -> np.ndarray[Any, Any]:
    """An array of the size of params and moments."""
    return np.full(3 * problem.size, 0.5, np.float32)


def _jax_has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tensorflow_has_gpu() -> bool:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return bool(gpus)


def _torch_device() -> str:
    return "cuda" if _jax_has_gpu() else "cpu"


def _torch(x: Any) -> Any:
    import torch

    return torch.tensor(x, device=_torch_device())


def _torch_wait() -> None:
    """Waits for all work of the device; a processor has none."""
    import torch

    torch.get_device_module(_torch_device()).synchronize()
