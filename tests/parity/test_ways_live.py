"""What a source is refused for has a way out: each test does what the error says, and the run continues."""

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
import torch
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScheduleConfig, compat, get_state
from tests.parity import problem

pytestmark = [
    pytest.mark.lenient("the models of the frameworks broadcast ranks"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # in Keras
]
os.environ["KERAS_BACKEND"] = "jax"
LR, BEFORE, AFTER = 1e-2, 5, 8
CLOSE = 1e-4  # of the learning rate; measured at most 3.6e-5
DATA = [np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32) for _ in range(2)]


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 4))


def train(model: Any, optimizer: Any, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(torch.tensor(DATA[0])) - torch.tensor(DATA[1])) ** 2).mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def to_params(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(x) for name, x in weights.items()}


def loss(params: dict[str, Any]) -> jax.Array:
    hidden = jnp.tanh(DATA[0] @ params["0.weight"].T + params["0.bias"])
    return jnp.mean((hidden @ params["2.weight"].T + params["2.bias"] - DATA[1]) ** 2)


def continued(tx: Any, state: Any, params: Any, of: Callable[[Any], jax.Array] = loss) -> Any:
    return problem.continued(tx, state, params, of, AFTER)


def distance(params: Any, model: Any) -> float:
    return max(float(np.abs(np.asarray(params[name]) - x).max()) for name, x in arrays(model).items()) / LR


def test_group_that_was_added_later():
    model = net()
    optimizer = torch.optim.NAdam([(name, p) for name, p in model.named_parameters() if name[0] == "2"], lr=LR)
    model[0].requires_grad_(False)
    train(model, optimizer, BEFORE)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [(f"0.{name}", p) for name, p in model[0].named_parameters()]})
    train(model, optimizer, BEFORE)
    source, params = copy.deepcopy(optimizer.state_dict()), to_params(arrays(model))
    with pytest.raises(
        ValueError, match=r"differ in the steps .*Build the optimizer with from_groups\(source, to_params"
    ):
        compat.torch.load_state(compat.torch.nadam(LR).init(params), source, to_params)
    tx = compat.torch.from_groups(source, to_params)
    state = compat.torch.load_state(tx.init(params), source, to_params)
    train(model, optimizer, AFTER)
    assert distance(continued(tx, state, params), model) < CLOSE


def cosine_run(steps: int, until: int) -> Iterator[Any]:
    """A run with two groups under a cosine: model, checkpoint of optimizer and scheduler, and what goes on."""
    model = net()
    kernels, biases = ([(n, p) for n, p in model.named_parameters() if p.ndim == rank] for rank in (2, 1))
    groups = [{"params": kernels, "weight_decay": 0.1, "lr": 2 * LR}, {"params": biases}]
    optimizer = torch.optim.NAdam(groups, lr=LR, decoupled_weight_decay=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, until)
    train(model, optimizer, steps, scheduler)
    yield to_params(arrays(model)), copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    train(model, optimizer, AFTER, scheduler)
    yield model


def test_schedule_that_is_not_in_the_checkpoint():
    run = cosine_run(BEFORE, 20)
    params, source, scheduler = next(run)
    with pytest.warns(
        UserWarning, match=r"taken for all steps to come: .*Pass scheduler=scheduler.state_dict\(\) to read"
    ):
        constant = compat.torch.from_groups(source, to_params)
    with pytest.warns(UserWarning, match=r"had a schedule.*Pass learning_rate=.*to from_groups"):
        compat.torch.load_state(constant.init(params), source, to_params)
    found = compat.torch.read(source, scheduler=scheduler)
    by_function = functools.partial(compat.torch.from_groups, learning_rate=optax.cosine_decay_schedule(2 * LR, 20))
    ways = [(compat.torch.from_groups, found), (by_function, source)]
    ends = []
    for build, way in ways:
        tx = build(way, to_params)
        ends.append(continued(tx, compat.torch.load_state(tx.init(params), way, to_params), params))
    model = next(run)
    assert max(distance(end, model) for end in ends) < CLOSE


def test_schedule_that_has_ended():
    params, source, _ = next(cosine_run(BEFORE, BEFORE))
    with pytest.raises(
        ValueError, match=r"lr=0, with which no parameter moves: its scheduler has ended.*learning_rate="
    ):
        compat.torch.from_groups(source, to_params)
    tx = compat.torch.from_groups(source, to_params, learning_rate=1e-3)
    with pytest.warns(UserWarning, match="had a schedule, and the optimizer that continues has a constant one"):
        state = compat.torch.load_state(tx.init(params), source, to_params)
    end = continued(tx, state, params)
    moved = {name: float(jnp.abs(end[name] - params[name]).max()) for name in params}
    assert moved["0.weight"] > 1.9 * moved["0.bias"] > 0


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam(make, amsgrad):
    model = net()
    optimizer = make(model.named_parameters(), lr=LR, weight_decay=0.1, amsgrad=amsgrad)
    train(model, optimizer, BEFORE)
    source, params = copy.deepcopy(optimizer.state_dict()), to_params(arrays(model))
    if amsgrad:
        with pytest.raises(ValueError, match=r"cannot express amsgrad=True.*continue the run in torch"):
            compat.torch.from_groups(source, to_params)
        return
    tx = compat.torch.from_groups(source, to_params)
    narrow = {"m_dtype": "int8", "v_dtype": "int8"}
    config = compat.torch.config_from(compat.torch.read(source))
    assert (config.rule, config.coupled_weight_decay) == ("adam", make is torch.optim.Adam)
    NadamConfig(**{**config.to_dict(), **narrow}).build().init(params)
    state = compat.torch.load_state(tx.init(params), source, to_params)
    train(model, optimizer, AFTER)
    assert distance(continued(tx, state, params), model) < CLOSE
    old = {**source["param_groups"][0]}
    del old["decoupled_weight_decay"]
    with pytest.raises(ValueError, match=r"no key decoupled_weight_decay.*Add it: True for AdamW"):
        compat.torch.config_from(old)
    assert compat.torch.config_from(old | {"decoupled_weight_decay": True}).coupled_weight_decay is False


class NAdamW(torch.optim.Optimizer):
    """With the keys of AlgoPerf's baseline, whose step is that of timm's NAdamW."""

    def __init__(self, params: Any) -> None:
        """The four keys of its groups."""
        super().__init__(params, {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        """The rule ``simplified``, decoupled weight decay."""
        for group in self.param_groups:
            for p in group["params"]:
                zeros = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state, (b1, b2) = self.state[p], group["betas"]
                state.update({name: state.get(name, zero) for name, zero in zeros.items()})
                state["step"] += 1
                t = state["step"].item()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].lerp_(p.grad**2, 1 - b2)
                step = (b1 * m + (1 - b1) * p.grad) / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * step)


def test_nadamw_of_algoperf_for_torch():
    model = net()
    optimizer = NAdamW(model.parameters())
    train(model, optimizer, BEFORE)
    source, params, names = copy.deepcopy(optimizer.state_dict()), to_params(arrays(model)), list(arrays(model))
    with pytest.raises(ValueError, match=r"lacks mu_product.*compat.timm NAdamW .*and AlgoPerf's for torch"):
        compat.torch.from_groups(source, to_params, names=names)
    found = compat.algoperf.read(source, names=names)
    tx = compat.timm.from_groups(found, to_params)
    state = compat.algoperf.load_state(tx.init(params), found, to_params)
    train(model, optimizer, AFTER)
    assert distance(continued(tx, state, params), model) < CLOSE


# Keras.


@pytest.fixture(scope="module")
def keras() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

    return keras


def keras_net(keras: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, activation="tanh", **options), layers.Dense(4, **options)]
    )


def fit(model: Any, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(*DATA, batch_size=16, epochs=steps, shuffle=False, verbose=0)


def in_order(weights: list[Any]) -> list[Any]:
    return [jnp.array(x) for x in weights]


def trained(model: Any) -> list[np.ndarray]:
    return [np.asarray(v.value) for v in model.trainable_variables]


def keras_loss(params: list[Any]) -> jax.Array:
    hidden = jnp.tanh(DATA[0] @ params[0] + params[1])
    return jnp.mean((hidden @ params[2] + params[3] - DATA[1]) ** 2)


def keras_distance(params: Any, model: Any) -> float:
    return max(float(np.abs(np.asarray(x) - y).max()) for x, y in zip(params, trained(model), strict=True)) / LR


def continues(keras: Any, model: Any, tx: Any, **options: Any) -> float:
    params = in_order(trained(model))
    state = compat.keras.load_state(tx.init(params), list(model.optimizer.variables), in_order, **options)
    fit(model, AFTER)
    return keras_distance(continued(tx, state, params, keras_loss), model)


def test_averages_of_keras(keras, tmp_path):
    model = keras_net(keras)
    model.compile(keras.optimizers.Nadam(LR, use_ema=True), "mse")
    fit(model, BEFORE)
    model.save_weights(tmp_path / "averages.weights.h5")
    with pytest.raises(ValueError, match=r"config_from\(\{\*\*optimizer.get_config\(\), 'use_ema': False\}\)"):
        compat.keras.read(tmp_path / "averages.weights.h5")
    config = compat.keras.config_from({**model.optimizer.get_config(), "use_ema": False})
    found = compat.keras.read(tmp_path / "averages.weights.h5", config=config)
    state = get_state(compat.keras.load_state(config.build().init(in_order(trained(model))), found, in_order))
    moments = {v.path: np.asarray(v.value) for v in model.optimizer.variables}
    assert int(state.count) == BEFORE
    chex.assert_trees_all_equal(state.m, [x for path, x in moments.items() if path.endswith("_momentum")])
    chex.assert_trees_all_equal(state.v, [x for path, x in moments.items() if path.endswith("_velocity")])


def test_schedules_of_keras(keras):
    class WarmUp(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[name-defined]
        def __call__(self, step):
            return LR / (1.0 + keras.ops.cast(step, "float32"))

        def get_config(self):
            return {}

    model = keras_net(keras)
    model.compile(keras.optimizers.Nadam(WarmUp()), "mse")
    fit(model, BEFORE)
    theirs = model.optimizer.get_config()
    with pytest.raises(
        ValueError, match=r"got 'WarmUp'. Pass learning_rate= to config_from, a number or a ScheduleConfig"
    ):
        compat.keras.config_from(theirs)
    arguments = {"initial_learning_rate": LR, "decay_steps": 1, "decay_rate": 1.0}
    config = compat.keras.config_from(theirs, learning_rate=ScheduleConfig("inverse_time_decay", arguments))
    assert continues(keras, model, config.build()) < CLOSE
    constant = compat.keras.nadam(LR)
    with pytest.warns(UserWarning, match="had a schedule, and the optimizer that continues has a constant one"):
        compat.keras.load_state(constant.init(in_order(trained(model))), list(model.optimizer.variables), in_order)


def test_layer_that_was_frozen_later(keras, tmp_path):
    model = keras_net(keras)
    model.compile(keras.optimizers.Nadam(LR), "mse")
    fit(model, BEFORE)
    model.layers[0].trainable = False
    model.save(tmp_path / "frozen.keras")
    params = in_order(trained(model))
    tx = compat.keras.nadam(LR)
    for wrong in (in_order, lambda w: in_order(w[:2])):
        with pytest.raises(ValueError, match=r"read\(source\).select\(\[...\]\)"):
            compat.keras.load_state(tx.init(params), tmp_path / "frozen.keras", wrong)
    found = compat.keras.read(tmp_path / "frozen.keras")
    state = get_state(compat.keras.load_state(tx.init(params), found.select([2, 3]), in_order))
    moments = {v.path: np.asarray(v.value) for v in model.optimizer.variables}
    (kernel,) = [x for path, x in moments.items() if path.endswith("dense_1_kernel_momentum")]
    np.testing.assert_array_equal(state.m[0], kernel)


def test_several_optimizers_of_keras(keras):
    from keras.src.optimizers.multi_optimizer import OptimizerMap

    nadams = [keras.optimizers.Nadam(LR), keras.optimizers.Nadam(LR / 10)]
    model = keras_net(keras)
    by_path = OptimizerMap(default_optimizer=nadams[0], optimizer_map={".*dense_1.*": nadams[1]})
    model.compile(keras.optimizers.MultiOptimizer(by_path), "mse")
    fit(model, BEFORE)
    params = dict(enumerate(in_order(trained(model))))
    parts = {str(i): compat.keras.nadam(rate) for i, rate in enumerate((LR, LR / 10))}
    tx = optax.partition(parts, {0: "0", 1: "0", 2: "1", 3: "1"})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"more than one optimizer.*optimizer.optimizers\[0\].variables"):
        compat.keras.load_state(state, model.optimizer.variables, in_order)
    for label, nadam, places in (("0", nadams[0], (0, 1)), ("1", nadams[1], (2, 3))):
        inner = compat.keras.load_state(
            state.inner_states[label],
            list(nadam.variables),
            lambda w, places=places: (
                dict.fromkeys(range(4), optax.MaskedNode()) | dict(zip(places, in_order(w), strict=True))
            ),
        )
        state = state._replace(inner_states=state.inner_states | {label: inner})
    fit(model, AFTER)
    end = continued(tx, state, params, lambda p: keras_loss([p[i] for i in range(4)]))
    assert keras_distance([end[i] for i in range(4)], model) < CLOSE
