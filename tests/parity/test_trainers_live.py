"""Runs of the Trainer of transformers, of Lightning and of accelerate, with their schedules, continued in Flax.

The files are those that the programs write. Each run is saved half-way; what follows here is compared with theirs.
"""

import warnings
from pathlib import Path

import jax
import lightning
import numpy as np
import optax
import pytest
import torch
import transformers
from accelerate import Accelerator
from flax import linen, nnx
from jax import numpy as jnp
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, TensorDataset

from optax_nadam import NadamConfig, clip_by_global_norm, compat
from tests.parity.problem import continued

LR, HALF = 1e-2, 10
# After 10 further steps, in units of the learning rate; measured at most 3.6e-5.
BOUND = 2e-4
RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(16, 4)).astype(np.float32) for _ in range(2))


class Net(torch.nn.Module):
    """A layer, a norm, a layer; the loss for the Trainer."""

    def __init__(self) -> None:
        """The same weights each time."""
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)

    def forward(self, x, labels):
        """The loss, as the Trainer expects it."""
        y = self.last(self.norm(torch.tanh(self.first(x))))
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


class Linen(linen.Module):
    """The same in linen; torch adds 1e-5 in a LayerNorm, linen 1e-6."""

    @linen.compact
    def __call__(self, x):
        """The outputs."""
        x = jnp.tanh(linen.Dense(8, name="first")(x))
        return linen.Dense(4, name="last")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self) -> None:
        """Weights that are loaded later."""
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        """The outputs."""
        return self.last(self.norm(jnp.tanh(self.first(x))))


def to_params(weights):
    """The weights of the torch model as those of the linen model, and of the nnx model."""
    return {
        "first": {"kernel": jnp.array(weights["first.weight"].T), "bias": jnp.array(weights["first.bias"])},
        "norm": {"scale": jnp.array(weights["norm.weight"]), "bias": jnp.array(weights["norm.bias"])},
        "last": {"kernel": jnp.array(weights["last.weight"].T), "bias": jnp.array(weights["last.bias"])},
    }


def loss_in_linen(params):
    return jnp.mean((Linen().apply({"params": params}, X) - Y) ** 2)


def loss_in_nnx(params):
    model = Nnx()
    nnx.update(model, params)
    return jnp.mean((model(X) - Y) ** 2)


def distance(params, weights):
    """The largest difference in units of the learning rate."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(to_params(weights)), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / LR


def arrays_of(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


NAMES = list(arrays_of(Net()))
DECAYED = [name for name in NAMES if name.endswith("weight") and "norm" not in name]


NADAM = (torch.optim.NAdam, {"lr": LR, "decoupled_weight_decay": True})


def trained(path, **options):
    """A run of the Trainer, saved half-way."""
    arguments = transformers.TrainingArguments(
        str(path), max_steps=2 * HALF, save_steps=HALF, save_strategy="steps", per_device_train_batch_size=16,
        learning_rate=LR, report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    data = [{"x": torch.tensor(x), "labels": torch.tensor(y)} for x, y in zip(X, Y, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(Net(), arguments, train_dataset=data, optimizer_cls_and_kwargs=NADAM).train()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Path:
    """The directory of a run: linear decay after two steps of warm-up, clipped by default."""
    path = tmp_path_factory.mktemp("trainer")
    trained(path, weight_decay=0.1, warmup_steps=2, logging_strategy="no")
    return path


def test_schedule_of_the_log(tmp_path):
    """Half-way a linear decay and a cosine meet; what was logged before tells them apart."""
    trained(tmp_path, lr_scheduler_type="cosine", logging_steps=3)
    path = tmp_path / f"checkpoint-{HALF}"
    compat.torch.read(path, lr_scheduler_type="cosine", num_warmup_steps=0)
    with pytest.raises(ValueError, match=r"gives the learning rate .* at step 3, but trainer_state.json has"):
        compat.torch.read(path, lr_scheduler_type="linear", num_warmup_steps=0)


class Tied(torch.nn.Module):
    """A parameter of its own beside modules, and a head tied to an embedding."""

    def __init__(self) -> None:
        """All decayed weights of one shape."""
        super().__init__()
        self.embed, self.body, self.head = torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.pos = torch.nn.Parameter(torch.zeros(4, 4))
        self.head.weight = self.embed.weight


def test_names_of_the_trainer(tmp_path):
    model = Tied()
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=NADAM)
    groups = trainer.create_optimizer().param_groups
    listed, by_id = trainer.get_decay_parameter_names(model), {id(p): n for n, p in model.named_parameters()}
    # As docs/carry.md has it.
    names = sorted((n for n, _ in model.named_parameters()), key=lambda n: n not in set(listed))
    assert names == [by_id[id(p)] for group in groups for p in group["params"]]

    source = trainer.optimizer.state_dict()
    assert compat.torch.read(source, names=names).names == names
    rest = [name for name in names if name not in listed]
    with pytest.raises(ValueError, match=r"got 6.*tied ones once"):
        compat.torch.read(source, names=[*listed, *rest])
    with pytest.raises(ValueError, match=r"have 'embed\.weight' before 'pos'"):
        compat.torch.read(source, names=[*(n for n in listed if n != "head.weight"), *rest])


def test_trainer_into_linen(trainer):
    path, names = trainer / f"checkpoint-{HALF}", DECAYED + [name for name in NAMES if name not in DECAYED]
    source = compat.torch.read(path, names=names, lr_scheduler_type="linear", num_warmup_steps=2)
    assert "clips by global norm" in str(source)
    assert "the loss (" in str(source)
    params = to_params(source.weights)
    tx = optax.chain(clip_by_global_norm(1.0), compat.torch.from_groups(source, to_params))
    state = compat.torch.load_state(tx.init(params), source, to_params)
    end = continued(tx, state, params, loss_in_linen, HALF)
    assert distance(end, load_file(trainer / f"checkpoint-{2 * HALF}/model.safetensors")) < BOUND


def test_what_a_trainer_checkpoint_says(trainer):
    path = trainer / f"checkpoint-{HALF}"
    text = str(compat.torch.read(path))
    for line in (r"steps         10", "none: a list in order", "LambdaLR", "weight_decay=0.1", "max_grad_norm=1.0"):
        assert line in text
    with pytest.raises(ValueError, match=r"stores the learning rate .* but its schedule gives"):
        compat.torch.read(path, lr_scheduler_type="linear", num_warmup_steps=5)
    with pytest.raises(ValueError, match=r"LambdaLR.*lr_scheduler_type="):
        print(compat.torch.read(path).schedule)
    with pytest.raises(
        ValueError, match=r"'first.bias' have shape \(4, 8\), but its weights \(8,\).*group after group"
    ):
        compat.torch.read(path, names=NAMES)


class Lit(lightning.LightningModule):
    """The model for Lightning, with a cosine by step or by epoch."""

    def __init__(self, interval: str) -> None:
        """The same weights each time."""
        super().__init__()
        self.net, self.interval = Net(), interval

    def training_step(self, batch, index):
        """The loss."""
        return self.net(*batch)["loss"]

    def configure_optimizers(self):
        """Nadam with a cosine of 20 steps, or of 20 epochs."""
        optimizer = torch.optim.NAdam(self.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * HALF)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def lightning_run(interval: str, folder: Path) -> dict[str, np.ndarray]:
    """The weights at the end of a run, whose checkpoint half-way goes into a folder."""
    model, twice = Lit(interval), [torch.tensor(np.tile(x, (2, 1))) for x in (X, Y)]
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_steps=2 * HALF, callbacks=[save], accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(TensorDataset(*twice), batch_size=16))  # fmt: skip
    return arrays_of(model.net)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_lightning_into_nnx(interval, tmp_path):
    end = lightning_run(interval, tmp_path)
    checkpoint = torch.load(tmp_path / f"step={HALF}.ckpt", weights_only=True)
    if interval == "epoch":
        text = str(compat.torch.read(checkpoint))
        assert "counts 5 steps, but the optimizer took 10" in text
    steps_per_epoch = {"step": None, "epoch": 2}[interval]
    source = compat.torch.read(tmp_path / f"step={HALF}.ckpt", names=NAMES, steps_per_epoch=steps_per_epoch)
    weights = {name.removeprefix("net."): x.numpy() for name, x in checkpoint["state_dict"].items()}
    model = Nnx()
    nnx.update(model, to_params(weights))
    params = nnx.state(model, nnx.Param)
    tx = compat.torch.from_groups(source, to_params)
    state = compat.torch.load_state(tx.init(params), source, to_params)
    assert distance(nnx.to_pure_dict(continued(tx, state, params, loss_in_nnx, HALF)), end) < BOUND


def test_accelerate_into_linen(tmp_path):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.NAdam((model := Net()).named_parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        [4],
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def train():
        for _ in range(HALF):
            accelerator.backward(model(torch.tensor(X), torch.tensor(Y))["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    train()
    accelerator.save_state(str(tmp_path))
    params, source = to_params(load_file(tmp_path / "model.safetensors")), compat.torch.read(tmp_path)
    tx = compat.torch.from_groups(source, to_params)
    state = compat.torch.load_state(tx.init(params), source, to_params)
    train()
    assert distance(continued(tx, state, params, loss_in_linen, HALF), arrays_of(model)) < BOUND


def test_back_to_torch():
    """A schedule goes back as a LambdaLR, as the error of ``config_to`` says."""
    optimizer = torch.optim.NAdam((model := Net()).named_parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * HALF)

    def train(model, optimizer, scheduler):
        for _ in range(HALF):
            optimizer.zero_grad()
            model(torch.tensor(X), torch.tensor(Y))["loss"].backward()
            optimizer.step()
            scheduler.step()

    train(model, optimizer, scheduler)
    source = compat.torch.read(optimizer.state_dict(), scheduler=scheduler.state_dict())
    params, config = to_params(arrays_of(model)), compat.torch.config_from(source)
    state = compat.torch.load_state(config.build().init(params), source, to_params)
    with pytest.raises(ValueError, match=r"group\['initial_lr'\] = 1.0 in each group, and add last_epoch=count - 1"):
        compat.torch.config_to(config)

    there = Net()
    there.load_state_dict(model.state_dict())
    constant = NadamConfig(**{**config.to_dict(), "learning_rate": 1.0})
    new = torch.optim.NAdam(there.named_parameters(), **compat.torch.config_to(constant))

    def from_params(p):
        return {"first.weight": p["first"]["kernel"].T, "first.bias": p["first"]["bias"], "norm.weight":
                p["norm"]["scale"], "norm.bias": p["norm"]["bias"], "last.weight": p["last"]["kernel"].T,
                "last.bias": p["last"]["bias"]}  # fmt: skip

    dumped = compat.torch.dump_state(
        state,
        from_params,
        param_groups=new.state_dict()["param_groups"],
        as_tensor=lambda x: torch.from_numpy(np.array(x)),
    )
    new.load_state_dict(dumped)
    for group in new.param_groups:
        group["initial_lr"] = 1.0
    schedule = config.learning_rate.build()
    train(there, new, torch.optim.lr_scheduler.LambdaLR(new, lambda n: float(schedule(n)), last_epoch=HALF - 1))
    train(model, optimizer, scheduler)
    ends = arrays_of(there), arrays_of(model)
    assert max(float(np.abs(ends[0][name] - ends[1][name]).max()) for name in NAMES) / LR < BOUND
