"""torch.optim.NAdam itself beside compat.torch: trajectories, groups and checkpoints."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScheduleConfig
from optax_nadam.compat import torch as ours
from tests import reference
from tests.parity.problem import FEW, SHAPES, STEPS, gap, long_unless, problem, run
from tests.parity.record_torch import GROUPS, TORCH_CASES, Theirs, in_groups, plain_groups

# In units of lr. In float32, each step rounds parameters of magnitude 1 to 4 by up to 1.2e-7, on either side, and
# torch's factor 1 - lr * weight_decay is off by 3e-8. That makes about 1e-6 in 60 steps, 5e-4 at lr = 2e-3: measured
# 5.4e-4 at most. In float64 nothing of this is left: measured 3e-12 after 200 steps.
BOUND, BOUND64 = 1e-3, 1e-11
# Ten steps after a checkpoint, from equal parameters, at lr = 0.01: measured 7e-5 at most.
RESUMED = 2e-4
BEFORE, AFTER = 25, 10

CASES: dict[str, dict[str, Any]] = TORCH_CASES | {
    "momentum": {"lr": 0.01, "betas": (0.7, 0.95), "momentum_decay": 1.0, "eps": 1e-4},
    "no momentum decay": {"lr": 0.01, "momentum_decay": 0},
    "maximize, decoupled": {"lr": 0.01, "maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
}
strict_optax = pytest.mark.lenient("optax.contrib.split_real_and_imaginary multiplies float32 by 1j")


def complex_problem(seed, **options):
    """Half of the parameters complex."""
    (params, grads), (others, other_grads) = problem(seed, **options), problem(seed + 100, **options)

    def mixed(tree, other):
        pairs = {name: np.stack([x, other[name]], axis=-1) for name, x in tree.items()}
        whole = {name: np.ascontiguousarray(x) for name, x in pairs.items() if name in ("kernel", "scale")}
        return tree | {name: torch.view_as_complex(torch.from_numpy(x)).numpy() for name, x in whole.items()}

    return mixed(params, others), [mixed(*g) for g in zip(grads, other_grads, strict=True)]


def nadam(**kwargs):
    return lambda named: torch.optim.NAdam(named, **kwargs)


def gaps(params, grads, **kwargs):
    """Ours beside torch's loop over the parameters and its kernels of many, in units of lr."""
    trajectory, _ = run(ours.nadam(foreach=True, **kwargs), params, grads)  # without effect here
    both = (Theirs(params, nadam(foreach=foreach, **kwargs)).run(grads) for foreach in (False, True))
    return [gap(trajectory, theirs, kwargs.get("lr", 2e-3)) for theirs in both]


@pytest.mark.parametrize("case", long_unless({"defaults", "decoupled"}.__contains__, CASES))  # the others in double
def test_trajectories(case):
    assert max(gaps(*problem(shapes=FEW), **CASES[case])) < BOUND


@pytest.mark.x64
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES)
def test_trajectories_in_double_precision(case):
    assert max(gaps(*problem(4, steps=200, shapes=FEW, dtype=np.float64), **CASES[case])) < BOUND64


@strict_optax
@pytest.mark.parametrize("case", long_unless({"l2", "decoupled"}.__contains__, CASES))
def test_complex_parameters(case):
    params, grads = complex_problem(3, shapes={"kernel": (4, 3), "bias": (3,)})
    assert (params["kernel"].dtype, params["bias"].dtype) == (np.complex64, np.float32)
    assert max(gaps(params, grads, **CASES[case])) < BOUND


def torch1(p, grads, lr, b1, b2, eps, weight_decay, psi):
    """The step of torch 1.10 to 1.13 as its source has it, in double precision."""
    m, v, product, trajectory = np.zeros_like(p), np.zeros_like(p), 1.0, []
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        product *= mu
        product_next = product * mu * mu_next
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        denominator = np.sqrt(v / (1 - b2**t)) + eps
        p = p - lr * (1 - mu) / (1 - product) * g / denominator - lr * mu_next / (1 - product_next) * m / denominator
        trajectory.append(p)
    return np.stack(trajectory)


@pytest.mark.x64
@pytest.mark.parametrize(("weight_decay", "psi"), [(0.0, 4e-3), (0.1, 4e-3), (0.1, 1.0)])
def test_the_rule_of_torch_1(weight_decay, psi):
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay, "momentum_decay": psi}
    params, grads = problem(5, shapes=FEW, dtype=np.float64)
    trajectory, _ = run(ours.config_from(group).build(), params, grads)
    theirs = {k: torch1(p, [g[k] for g in grads], 0.01, 0.9, 0.99, 1e-8, weight_decay, psi) for k, p in params.items()}
    assert gap(trajectory, theirs, 0.01) < BOUND64
    others, _ = run(ours.config_from(group, rule="scheduled").build(), params, grads)
    assert gap(others, theirs, 0.01) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_group_round_trip(case):
    (group,) = plain_groups(nadam(**CASES[case])([torch.nn.Parameter(torch.zeros(1))]))
    config = ours.config_from(group)
    assert config.rule == "scheduled"
    args = ours.config_to(config)
    assert args | {"params": [0], "betas": list(args["betas"])} == group
    assert plain_groups(nadam(**args)([torch.nn.Parameter(torch.zeros(1))])) == [group]
    assert ours.config_from(args) == config


def test_groups_of_schedulers():
    optimizer = torch.optim.NAdam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.25))
    assert ours.config_from(optimizer.param_groups[0]).learning_rate == 0.25
    optimizer = torch.optim.NAdam([("w", torch.nn.Parameter(torch.zeros(1)))], lr=0.25)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 100)
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    with pytest.warns(UserWarning, match=r"has base_momentum and max_momentum: OneCycleLR has cycled betas\[0\]"):
        config = ours.config_from(optimizer.param_groups[0], learning_rate=0.1)
    assert config.learning_rate == 0.1
    assert config.b1 == pytest.approx(0.95)


def through_file(checkpoint, path):
    torch.save(checkpoint, path)
    return torch.load(path)


def keep(arrays):
    """``to_params`` and ``from_params`` of parameters that are alike on either side."""
    return dict(arrays)


def started(make, params, grads, tmp_path):
    """Theirs after some steps, its parameters and its checkpoint from a file."""
    theirs = Theirs(params, make)
    theirs.run(grads)
    return theirs, theirs.arrays(), through_file(theirs.optimizer.state_dict(), tmp_path / "optimizer.pt")


KWARGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.99), "momentum_decay": 0.5}


@strict_optax
@pytest.mark.parametrize("kind", [problem, complex_problem], ids=["real", "complex"])
@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_we_continue_where_torch_stopped(kind, foreach, tmp_path):
    params, grads = kind(6, steps=BEFORE + AFTER)
    make = in_groups(torch.optim.NAdam, foreach=foreach, **KWARGS)
    theirs, at, checkpoint = started(make, params, grads[:BEFORE], tmp_path)
    tx = ours.config_from(checkpoint["param_groups"][0]).build()
    new = tx.init(at)
    trajectory, _ = run(tx, at, grads[BEFORE:], ours.load_state(new, checkpoint, keep))
    assert gap(trajectory, theirs.run(grads[BEFORE:]), 0.01) < RESUMED
    fresh, _ = run(tx, at, grads[BEFORE:], new)
    assert gap(fresh, trajectory, 0.01) > 0.1


@strict_optax
@pytest.mark.parametrize("kind", [problem, complex_problem], ids=["real", "complex"])
def test_torch_continues_where_we_stopped(kind, tmp_path):
    params, grads = kind(7, steps=BEFORE + AFTER)
    tx = ours.nadam(**KWARGS)
    trajectory, state = run(tx, params, grads[:BEFORE])
    at = {name: x[-1] for name, x in trajectory.items()}
    theirs = Theirs(at, in_groups(torch.optim.NAdam, **KWARGS))
    dumped = ours.dump_state(
        state, keep, param_groups=theirs.optimizer.state_dict()["param_groups"], as_tensor=torch.from_numpy
    )
    theirs.optimizer.load_state_dict(through_file(dumped, tmp_path / "optimizer.pt"))
    expected, _ = run(tx, at, grads[BEFORE:], state)
    assert gap(theirs.run(grads[BEFORE:]), expected, 0.01) < RESUMED


def test_torch_takes_the_group(tmp_path):
    params, grads = problem(8, steps=BEFORE + AFTER)
    config = NadamConfig(learning_rate=0.01, eps=1e-8, weight_decay=0.1, maximize=True)
    tx = config.build()
    trajectory, state = run(tx, params, grads[:BEFORE])
    at = {name: x[-1] for name, x in trajectory.items()}
    dumped = ours.dump_state(state, keep, config=config, as_tensor=torch.from_numpy)
    theirs = Theirs({name: at[name] for name in dumped["param_groups"][0]["param_names"]}, nadam())
    theirs.optimizer.load_state_dict(through_file(dumped, tmp_path / "optimizer.pt"))
    expected, _ = run(tx, at, grads[BEFORE:], state)
    assert gap(theirs.run(grads[BEFORE:]), expected, 0.01) < RESUMED


def test_loaded_state_is_ours():
    params, grads = problem(9, steps=3)
    theirs = Theirs(params, nadam(lr=0.01))
    theirs.run(grads[:2])
    tx = ours.nadam(lr=0.01)
    state = ours.load_state(tx.init(jax.tree.map(jnp.asarray, params)), theirs.optimizer.state_dict(), keep)
    before = jax.tree.map(lambda x: np.array(x), state)
    theirs.run(grads[2:])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, state))


class Net(torch.nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        """Makes the layers."""
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.linear = torch.nn.Linear(12, 4)

    def forward(self, x):
        """Two layers with a tanh between."""
        return self.linear(torch.tanh(self.conv(x)).flatten(1))


def net_params(weights):
    """From the layout of torch to that of Flax: (O, I, H, W) to (H, W, I, O), (O, I) to (I, O)."""
    return {
        "conv": {"kernel": weights["conv.weight"].transpose(2, 3, 1, 0), "bias": weights["conv.bias"]},
        "linear": {"kernel": weights["linear.weight"].T, "bias": weights["linear.bias"]},
    }


def net_weights(params):
    """The way back, in the order of the module."""
    return {
        "conv.weight": params["conv"]["kernel"].transpose(3, 2, 0, 1),
        "conv.bias": params["conv"]["bias"],
        "linear.weight": params["linear"]["kernel"].T,
        "linear.bias": params["linear"]["bias"],
    }


def net_loss(params, x, y):
    """The same network and mean squared error in JAX."""
    h = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=DIMENSIONS)
    h = jnp.tanh(h + params["conv"]["bias"][:, None, None]).reshape(x.shape[0], -1)
    return jnp.mean((h @ params["linear"]["kernel"] + params["linear"]["bias"] - y) ** 2)


DIMENSIONS = ("NCHW", "HWIO", "NCHW")


def train_net(net, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.mean((net(x) - y) ** 2).backward()
        optimizer.step()
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


@functools.partial(jax.jit, static_argnames=("tx", "steps"))
def train_params(tx, params, state, x, y, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(net_loss)(params, x, y), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=steps)[0]


@pytest.mark.lenient("a network with plain broadcasting")
def test_network_continues(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 2, 3, 3), (8, 4)))
    net = Net()
    optimizer = torch.optim.NAdam(net.named_parameters(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    at = train_net(net, optimizer, torch.from_numpy(x), torch.from_numpy(y), BEFORE)
    path = tmp_path / "checkpoint.pt"
    saved = through_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)

    tx = ours.config_from(saved["optimizer"]["param_groups"][0]).build()
    params = jax.tree.map(jnp.asarray, net_params(at))
    state = ours.load_state(tx.init(params), saved["optimizer"], net_params)
    params, state = train_params(tx, params, state, x, y, AFTER)
    theirs = train_net(net, optimizer, torch.from_numpy(x), torch.from_numpy(y), AFTER)
    # Gradients come from two frameworks here, and differ in the last places.
    assert gap(net_weights(jax.tree.map(np.asarray, params)), theirs, 0.01) < BOUND

    back = Net()
    weights = net_weights(jax.tree.map(np.array, params))
    back.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
    resumed = torch.optim.NAdam(back.named_parameters())
    groups = optimizer.state_dict()["param_groups"]
    resumed.load_state_dict(ours.dump_state(state, net_weights, param_groups=groups, as_tensor=torch.from_numpy))
    params, _ = train_params(tx, params, state, x, y, AFTER)
    theirs = train_net(back, resumed, torch.from_numpy(x), torch.from_numpy(y), AFTER)
    assert gap(net_weights(jax.tree.map(np.asarray, params)), theirs, 0.01) < BOUND


def test_never_trained():
    params, grads = problem(10, steps=BEFORE + AFTER)
    frozen = [{**g, "bias": None} for g in grads[:BEFORE]]
    theirs = Theirs(params, nadam(lr=0.01))
    theirs.run(frozen)
    tx = ours.nadam(lr=0.01)
    init = tx.init(jax.tree.map(jnp.asarray, params))
    with pytest.raises(ValueError, match=r"'bias' took none; 3 others took 25"):
        ours.load_state(init, theirs.optimizer.state_dict(), keep)
    state = ours.load_state(init, theirs.optimizer.state_dict(), keep, mismatch="largest", weights=params)
    trajectory, _ = run(tx, theirs.arrays(), grads[BEFORE:], state)
    expected = theirs.run(grads[BEFORE:])
    others = {name: x for name, x in expected.items() if name != "bias"}
    assert gap(trajectory, others, 0.01) < RESUMED


def test_partitioned_groups():
    params, grads = problem(11, steps=BEFORE + AFTER)
    options = {"lr": 0.01, "weight_decay": 0.1}
    theirs = Theirs(params, in_groups(torch.optim.NAdam, **options))
    theirs.run(grads[:BEFORE])
    source = theirs.optimizer.state_dict()
    parts = {str(k): ours.config_from(group).build() for k, group in enumerate(source["param_groups"])}
    labels = {name: str(k) for k, names in enumerate(GROUPS) for name in names}
    tx = optax.partition(parts, labels)
    state = tx.init(jax.tree.map(jnp.asarray, params))
    loaded = {}
    for label, names in zip(parts, GROUPS, strict=True):
        loaded[label] = ours.load_state(
            state.inner_states[label],
            ours.read(source).select(names),
            lambda arrays: {name: arrays.get(name, optax.MaskedNode()) for name in SHAPES},
        )
    trajectory, _ = run(tx, theirs.arrays(), grads[BEFORE:], state._replace(inner_states=loaded))
    assert gap(trajectory, theirs.run(grads[BEFORE:]), 0.01) < RESUMED


def test_bounds_fit_the_steps():
    assert STEPS == 60


@pytest.mark.x64
@pytest.mark.usefixtures("double")
@pytest.mark.lenient("optax.nadamw")
def test_constant_rule_in_torch():
    config = NadamConfig(rule="constant", learning_rate=0.01, eps=1e-8, weight_decay=0.1)
    params, grads = problem(13, steps=200, shapes=FEW, dtype=np.float64)
    theirs = Theirs(params, nadam(**ours.config_to(config))).run(grads)
    for tx in (config.build(), optax.nadamw(0.01, weight_decay=0.1)):
        trajectory, _ = run(tx, params, grads)
        assert gap(theirs, trajectory, 1.0) < 1e-12


def test_a_schedule_of_ours_in_torch():
    """What the error of config_to says to do about a schedule."""
    halves = ScheduleConfig("inverse_time_decay", {"initial_learning_rate": 0.01, "decay_steps": 5, "decay_rate": 0.5})
    config, (params, grads) = NadamConfig(learning_rate=halves, eps=1e-8), problem(15, steps=20)
    theirs = Theirs(params, nadam(**ours.config_to(dataclasses.replace(config, learning_rate=1.0))))
    schedule = halves.build()
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs.optimizer, lambda step: float(schedule(step)))
    for grad in grads:
        last = theirs.run([grad])
        scheduler.step()
    trajectory, _ = run(config.build(), params, grads)
    assert gap({name: x[-1:] for name, x in trajectory.items()}, last, 0.01) < BOUND


@pytest.mark.lenient("optax.nadamw mixes dtypes")
def test_constant_rule_in_float32():
    """Each step rounds the params once more: torch multiplies them by 1 - lr * weight_decay before it adds."""
    config = NadamConfig(rule="constant", learning_rate=1e-3, eps=1e-8, weight_decay=0.1)
    params, grads = problem(13, steps=200)
    formula = reference.Nadam(rule="constant", eps=1e-8)
    exact = {}
    for name, p in params.items():
        updates, *_ = formula.updates(np.stack([g[name] for g in grads]).astype(np.float64))
        steps, at = [], p.astype(np.float64)
        for u in updates:
            at = at - 1e-3 * (u + 0.1 * at)
            steps.append(at)
        exact[name] = np.stack(steps)
    theirs = Theirs(params, nadam(**ours.config_to(config))).run(grads)
    optaxs, _ = run(optax.nadamw(1e-3, weight_decay=0.1), params, grads)
    trajectory, _ = run(config.build(), params, grads)
    assert gap(trajectory, exact, 1.0) < 2e-6
    assert gap(optaxs, exact, 1.0) < 2e-6
    assert 4e-6 < gap(theirs, exact, 1.0) < 1e-5


def test_two_dtypes():
    params, grads = problem(14, steps=BEFORE)
    params = {name: torch.nn.Parameter(torch.from_numpy(np.array(x))) for name, x in params.items()}
    params["kernel"] = torch.nn.Parameter(params["kernel"].bfloat16())

    def steps(optimizer, grads):
        for grad in grads:
            for name, p in params.items():
                p.grad = torch.from_numpy(np.array(grad[name])).to(p.dtype)
            optimizer.step()
        return optimizer

    first = steps(torch.optim.NAdam(list(params.items()), lr=0.01), grads[:4])
    resumed = torch.optim.NAdam(list(params.items()), lr=0.01)
    resumed.load_state_dict(first.state_dict())
    source = steps(resumed, grads[4:8]).state_dict()
    products = {str(entry["mu_product"].dtype): float(entry["mu_product"]) for entry in source["state"].values()}
    assert products["torch.bfloat16"] != products["torch.float32"]
    state = ours.load_state(ours.nadam().init({k: jnp.zeros(SHAPES[k]) for k in SHAPES}), source, keep)
    assert float(optax.tree.get(state, "mu_product")) == products["torch.float32"]


def test_shard_is_refused(tmp_path):
    import torch.distributed as distributed
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        p = torch.nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
        p.grad = distribute_tensor(torch.ones(2), mesh, [Replicate()])
        optimizer = torch.optim.NAdam([("w", p)])
        optimizer.step()
        with pytest.raises(ValueError, match=r"'w' holds a DTensor.*get_optimizer_state_dict.*full_state_dict=True"):
            ours.load_state(ours.nadam().init({"w": jnp.ones(2)}), optimizer.state_dict(), keep)
    finally:
        distributed.destroy_process_group()


def test_known_hyperparameters():
    defaults = set()
    for make in (getattr(torch.optim, name) for name in torch.optim.__all__):
        if isinstance(make, type) and issubclass(make, torch.optim.Optimizer) and make is not torch.optim.Optimizer:
            defaults |= set(make([torch.nn.Parameter(torch.zeros(1, 1))]).defaults)
    assert len(defaults) > 30
    (group,) = plain_groups(nadam()([torch.nn.Parameter(torch.zeros(1))]))
    foreign = defaults - set(group)
    for name in foreign:
        with pytest.raises(ValueError, match=f"has unknown keys {name}"):
            ours.config_from({**group, name: 0})
