"""Each kind of torch's and timm's checkpoints, read and matched with the params.

====================  ==================================================================================================
kinds                 every recorded kind is continued as it was there
names                 by position, argument, name or tensor; a wrong order, prefixes and tied weights are named
products              of two dtypes are one; they differ by no more than rounding explains
several groups        one Nadam for weight decays, a partition for others; shapes are known or asked for
counts                each Nadam has its own; schedules anywhere have the run's
frozen parameters     stand still and are not dumped
leaves                may be padded or made of parameters that are alike; the user's function only rearranges
====================  ==================================================================================================
"""

import contextlib
import functools
import re
import warnings

import chex
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, ScaleByNadamState, compat, get_state
from optax_nadam._state import INJECTED
from optax_nadam._tree import nodes_of
from optax_nadam.compat._common import without
from tests.compat.sources import BEFORE, LR, continuation, distance, from_params, gradients, recorded, to_params
from tests.parity.problem import program

KINDS = recorded("torch_sources")
# After 8 further steps at lr = 0.01, in units of lr: measured at most 7e-5.
BOUND = 2e-4
WARNS = {
    "layer-wise groups": r"keys that are ignored: group_name, layer_id",
    "timm NAdamW, layers": r"keys that are ignored: group_name, layer_id",
    "OneCycleLR": r"base_momentum and max_momentum: OneCycleLR has cycled|is taken for all steps to come",
}


@functools.cache
def every_end():
    """The parameters at the end of each, from one program, which compiles faster than several; what each warned of."""
    starts, warned = [], []
    for kind in KINDS.values():
        options = {"names": kind["names"], "weights": kind["at"] if kind["frozen"] else None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grads = gradients(kind["frozen"])[BEFORE:]
            starts.append(continuation(kind["module"], kind["checkpoint"], kind["at"], grads, **options))
        warned.append([str(warning.message) for warning in caught])
    every = [(program(tx), params, state, jax.tree.map(lambda *g: np.stack(g), *g)) for tx, params, g, state in starts]

    @jax.jit
    def together(arrays):
        return [
            jax.tree.map(lambda x: x[-1], steps(*of_one)[1]) for (steps, *_), of_one in zip(every, arrays, strict=True)
        ]

    ends = jax.device_get(together([arrays for _, *arrays in every]))
    return dict(zip(KINDS, zip(map(from_params, ends), warned, strict=True), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_continues_recording(name):
    end, warned = every_end()[name]
    assert bool(warned) == (name in WARNS)
    assert all(re.search(WARNS[name], text) for text in warned)
    assert distance(end, KINDS[name]["then"]) < BOUND


NAMES = ["kernel", "bias", "conv", "scale"]
FLAT, NAMED, UNNAMED = (KINDS[name]["checkpoint"] for name in ("flattened", "named", "unnamed"))
WEIGHTS = KINDS["named"]["at"]
LAYERS = KINDS["layer-wise groups"]["checkpoint"]
GROUPS = [without(group, ["layer_id", "group_name"]) for group in LAYERS["param_groups"]]
TWO_GROUPS = KINDS["two unnamed groups"]["checkpoint"]["param_groups"]


def load(checkpoint, take=to_params, **options):
    params = jax.tree.map(jnp.zeros_like, to_params(WEIGHTS))
    return compat.torch.load_state(compat.torch.nadam().init(params), checkpoint, take, **options)


def renamed(names):
    """The named checkpoint under other names."""
    return {**NAMED, "param_groups": [{**group, "param_names": names} for group in NAMED["param_groups"]]}


@pytest.mark.parametrize("take", [to_params, lambda w: to_params(dict(w.items())), lambda w: to_params(dict(w))])
def test_names_are_wanted(take):
    text = r"got a list of 4 arrays .*does not name.*pass names=\[n for n, _ in model.named_parameters\(\)\]"
    with pytest.raises(ValueError, match=text):
        load(UNNAMED, take)
    with pytest.raises(ValueError, match=r"weights are by name, but the checkpoint does not name .*pass names="):
        load(UNNAMED, weights=WEIGHTS)


def test_shapes_by_name():
    in_alphabetical_order = {name: WEIGHTS[name] for name in sorted(WEIGHTS)}
    expected = load(NAMED)
    loaded = load(UNNAMED, names=NAMES, weights=in_alphabetical_order)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    text = r"moments of 'bias' have shape \(4, 3\), but its weights \(3,\): names are not in the order"
    with pytest.raises(ValueError, match=text):
        load(UNNAMED, names=list(in_alphabetical_order), weights=in_alphabetical_order)
    transposed = WEIGHTS | {"kernel": WEIGHTS["kernel"].T}
    with pytest.raises(ValueError, match=r"moments of 'kernel' have shape \(4, 3\), but its weights \(3, 4\)"):
        load(UNNAMED, names=NAMES, weights=transposed)


@pytest.mark.parametrize("names", [["a.bias", "a.weight", "b.bias", "b.weight"], ["0.w", "1.w", "10.w", "2.w"]])
def test_alphabetical_order(names):
    with pytest.raises(ValueError, match=r"names are in alphabetical order \('.*' before '.*'\).*leave names out"):
        load(UNNAMED, names=names)


@pytest.mark.parametrize(
    "names", [["a.weight", "c.weight", "pos", "c.bias"], ["x.y.z.w", "x.y.w", "b", "x.w"], ["x.y.w", "a", "x.w", "z.w"]]
)
def test_a_module_after_one_inside(names):
    own = next(name for name in names if name in ("pos", "x.y.w", "a") and name != names[0])
    with pytest.raises(ValueError, match=rf"have '{names[0]}' before '{own}'.*sorted\(.*leave names out"):
        load(UNNAMED, names=names)


def test_order_is_by_group():
    two = {**UNNAMED, "param_groups": [{**UNNAMED["param_groups"][0], "params": ids} for ids in ([0, 1], [2, 3])]}
    names = ["pos", "a.weight", "b", "a.bias"]
    assert compat.torch.read(two, names=names).names == names
    with pytest.raises(ValueError, match=r"have 'a\.weight' before 'b'"):
        compat.torch.read(UNNAMED, names=names)


def test_names_in_both_orders():
    names = ["0.w", "1.w", "2.w", "x.w"]
    state = load(UNNAMED, lambda w: to_params(dict(zip(NAMES, w.values(), strict=True))), names=names)
    jax.tree.map(np.testing.assert_array_equal, state, load(NAMED))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_prefixes_of_wrappers(prefix):
    with pytest.raises(ValueError, match=rf"has it as '{prefix}kernel'.*names=\[n.replace\('{prefix}', ''\)"):
        load(renamed([prefix + name for name in NAMES]))


def test_tied_weights():
    tied = {**WEIGHTS, "head": WEIGHTS["kernel"]}
    with pytest.raises(ValueError, match=r"equal arrays under 'head' and 'kernel'.*they are tied"):
        load(NAMED, weights=tied)
    under_another_name = {name: x for name, x in tied.items() if name != "kernel"}
    with pytest.raises(ValueError, match=r"weights lack 'kernel'.* have 'head' besides.*tied parameters"):
        load(NAMED, weights=under_another_name)
    with pytest.raises(ValueError, match=r"asked for 'head'.*If it is tied to another parameter.*under the first name"):
        load(NAMED, lambda w: to_params({**w, "kernel": w["head"]}))


def test_equal_constants():
    ones = {**WEIGHTS, "bias": np.ones(3, np.float32), "norm": np.ones(3, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, load(NAMED, weights=ones), load(NAMED))


def test_flattened_in_any_order():
    shuffled = {key: FLAT[key] for key in sorted(FLAT)}
    jax.tree.map(np.testing.assert_array_equal, load(shuffled), load(KINDS["get_optimizer_state_dict"]["checkpoint"]))


def mixed(bits):
    """A checkpoint whose kernel is of a narrow dtype, as torch resumes it: the product is rounded to that."""
    state = {i: dict(entry) for i, entry in NAMED["state"].items()}
    state[0] |= {key: state[0][key].astype(bits) for key in ("mu_product", "exp_avg", "exp_avg_sq")}
    return {**NAMED, "state": state}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_two_dtypes(dtype):
    checkpoint = mixed(dtype)
    exact = NAMED["state"][1]["mu_product"]
    assert float(checkpoint["state"][0]["mu_product"]) != float(exact)
    assert get_state(load(checkpoint)).mu_product == exact


@pytest.mark.parametrize(
    ("dtype", "product", "text"),
    [
        ("bfloat16", 0.018555, None),
        ("bfloat16", 0.0187, None),
        ("float32", 0.018498 * (1 + 1e-6), None),
        ("bfloat16", 0.0200, r"'kernel' took 3 \(product 0.02.*; 3 others took 3"),
        ("float32", 0.018555, r"took 3 \(product 0.018498\); 1 others took 3 \(product 0.018555\)"),
    ],
)
def test_products_that_differ(dtype, product, text):
    numbers = {"step": np.float32(3), "mu_product": np.float32(0.018498)}
    state = {i: {**entry, **numbers} for i, entry in NAMED["state"].items()}
    state[0]["mu_product"] = np.asarray(product, dtype)
    with pytest.raises(ValueError, match=text) if text else contextlib.nullcontext():
        load({**NAMED, "state": state})


def test_groups_by_weight_decay():
    names = KINDS["two unnamed groups"]["names"]
    tx = compat.torch.from_groups(TWO_GROUPS, to_params, names=names, weights=WEIGHTS)
    params = jax.tree.map(jnp.ones_like, to_params(WEIGHTS))
    state = tx.init(params)
    assert get_state(state).m.keys() == params.keys()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    means = {name: float(jnp.mean(x)) for name, x in from_params(updates).items()}
    np.testing.assert_allclose(list(means.values()), [-0.001, 0, -0.001, 0], atol=1e-9)


def test_one_kind_of_groups():
    group = NAMED["param_groups"][0]
    tx, plain = compat.torch.from_groups([group], to_params), compat.torch.config_from(group).build()
    chex.assert_trees_all_equal_structs(tx.init(WEIGHTS), plain.init(WEIGHTS))


def test_groups_by_learning_rate():
    tx = compat.torch.from_groups(GROUPS, to_params, weights=WEIGHTS)
    params = jax.tree.map(jnp.ones_like, to_params(WEIGHTS))
    state = tx.init(params)
    assert sorted(state.inner_states) == ["0", "1", "frozen"]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    got = {name: float(jnp.mean(x)) for name, x in from_params(updates).items()}
    step, _ = compat.torch.nadam(LR).update(jnp.ones(()), compat.torch.nadam(LR).init(jnp.ones(())))
    expected = {"kernel": step - 0.1 * LR, "bias": step, "conv": 0.5 * step - 0.05 * 0.5 * LR, "scale": step}
    np.testing.assert_allclose([got[k] for k in expected], list(expected.values()), rtol=1e-5)


def test_shapes_are_asked_for():
    text = r"do not hold the shapes of 'kernel', 'bias', 'conv', 'scale', .*Pass the whole checkpoint .*, or weights"
    with pytest.raises(ValueError, match=text):
        compat.torch.from_groups(GROUPS, to_params)
    frozen = KINDS["frozen"]["checkpoint"]
    tx = compat.torch.from_groups(frozen, to_params, weights=WEIGHTS)
    for needs_shapes in (
        lambda: compat.torch.from_groups(frozen, to_params),
        lambda: compat.torch.load_state(tx.init(to_params(WEIGHTS)), frozen, to_params),
    ):
        with pytest.raises(ValueError, match=r"'bias' never stepped, .*Pass weights"):
            needs_shapes()


def test_fresh_partition():
    checkpoint = {"state": {}, "param_groups": GROUPS}
    tx = compat.torch.from_groups(checkpoint, to_params, weights=WEIGHTS)
    fresh = tx.init(to_params(WEIGHTS))
    chex.assert_trees_all_equal(compat.torch.load_state(fresh, checkpoint, to_params), fresh)


def test_frozen_parameters():
    checkpoint, groups = KINDS["frozen"]["checkpoint"], KINDS["frozen"]["checkpoint"]["param_groups"]
    tx = compat.torch.from_groups(checkpoint, to_params, weights=WEIGHTS)
    params = to_params(jax.tree.map(jnp.asarray, WEIGHTS))
    state = compat.torch.load_state(tx.init(params), checkpoint, to_params, weights=WEIGHTS)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not updates["block"]["bias"].any()
    dumped = compat.torch.dump_state(state, from_params, param_groups=groups, params=params)
    assert dumped["state"].keys() == {0, 2, 3}
    with pytest.raises(ValueError, match=r"no Nadam in opt_state has params\['block'\]\['bias'\].* Pass params"):
        compat.torch.dump_state(state, from_params, param_groups=groups)


@pytest.mark.lenient("optax.contrib.split_real_and_imaginary multiplies float32 by 1j")
def test_dump_of_frozen_and_complex():
    params = {"frozen": jnp.ones((2, 3, 4)), "w": jnp.ones((2, 3)), "z": jnp.ones(2, jnp.complex64)}
    labels = {"frozen": "none", "w": "one", "z": "other"}
    nadam = compat.torch.nadam()
    tx = optax.partition({"one": nadam, "other": nadam, "none": optax.set_to_zero()}, labels)
    _, state = tx.update(params, tx.init(params), params)
    dumped = compat.torch.dump_state(
        state,
        lambda p: {"frozen": p["frozen"].transpose(2, 0, 1), "w": p["w"].T, "z": p["z"]},
        config=NadamConfig(),
        params=params,
    )
    assert {i: entry["exp_avg"].shape for i, entry in dumped["state"].items()} == {1: (3, 2), 2: (2,)}
    assert dumped["state"][2]["exp_avg"].dtype == np.complex64


def stepped_apart():
    """A checkpoint of two learning rates, the parameter of the second with fewer steps."""
    state = {i: dict(entry) for i, entry in LAYERS["state"].items()}
    state[2] |= {"step": np.float32(5), "mu_product": np.float32(0.25)}
    return {"state": state, "param_groups": GROUPS}


def test_counts_of_nadams():
    checkpoint = stepped_apart()
    init = compat.torch.from_groups(checkpoint, to_params).init(to_params(WEIGHTS))
    loaded = compat.torch.load_state(init, checkpoint, to_params)
    assert {key: loaded.inner_states[key].inner_state.inner_state[0].count for key in "01"} == {"0": 12, "1": 5}
    dumped = compat.torch.dump_state(loaded, from_params, param_groups=GROUPS)
    assert {i: float(entry["step"]) for i, entry in dumped["state"].items()} == {0: 12, 1: 12, 2: 5, 3: 12}
    assert float(dumped["state"][2]["mu_product"]) == 0.25
    checkpoint["state"][0]["step"] = np.float32(4)
    with pytest.raises(ValueError, match=r"'kernel' took 4 .*; 2 others took 12"):
        compat.torch.load_state(init, checkpoint, to_params)


def test_counts_of_schedules():
    tx = optax.partition(
        {"0": compat.torch.nadam(optax.constant_schedule(LR)), "1": compat.torch.nadam(optax.constant_schedule(LR))},
        {"block": {"kernel": "0", "bias": "0"}, "rest": ["1", "0"]},
    )
    scheduled = optax.scale_by_schedule(optax.constant_schedule(1.0))
    init = optax.chain(scheduled, tx, optax.inject_hyperparams(optax.scale)(1.0)).init(to_params(WEIGHTS))
    loaded = compat.torch.load_state(init, stepped_apart(), to_params)
    assert sorted(int(state.count) for state in nodes_of(loaded, ScaleByNadamState)) == [5, 12]
    kinds = (optax.ScaleByScheduleState, *INJECTED)
    assert [int(state.count) for state in nodes_of(loaded, kinds)] == [12] * 4


def test_leaf_of_two_groups():
    def stacked(weights):
        return {"w": np.stack([weights["kernel"], weights["bias"]])}

    weights = {name: np.ones(2, np.float32) for name in WEIGHTS}
    with pytest.raises(ValueError, match=r"params\['w'\] is made of parameters of several parameter groups"):
        compat.torch.from_groups(TWO_GROUPS, stacked, names=KINDS["two unnamed groups"]["names"], weights=weights)


def test_dump_guesses_no_order():
    state = compat.torch.nadam().init(to_params(WEIGHTS))
    with pytest.raises(ValueError, match=r"param_groups are several without param_names. Return a list"):
        compat.torch.dump_state(state, from_params, param_groups=TWO_GROUPS)


@pytest.mark.parametrize("both", [{}, {"config": NadamConfig(), "param_groups": []}], ids=["neither", "both"])
def test_dump_of_config_or_groups(both):
    for ours in (compat.torch, compat.timm):
        with pytest.raises(ValueError, match=r"needs either config, .*, or param_groups, .*got (neither|both)"):
            ours.dump_state(compat.torch.nadam().init(jnp.ones(2)), lambda p: [p], **both)


def test_computed_product():
    checkpoint, names = KINDS["timm NAdamW"]["checkpoint"], KINDS["timm NAdamW"]["names"]
    init = compat.timm.nadamw().init(to_params(WEIGHTS))
    state = compat.timm.load_state(init, checkpoint, to_params, names=names)
    np.testing.assert_allclose(get_state(state).mu_product, 0.9**12, rtol=1e-6)
    config = NadamConfig(rule="simplified", b1=0.5)
    state = compat.timm.load_state(init, checkpoint, to_params, names=names, config=config)
    np.testing.assert_allclose(get_state(state).mu_product, 0.5**12, rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"optimizer_states": [NAMED] * 2}, r"holds 2 optimizers. Pass .*checkpoint\['optimizer_states'\]\[0\]"),
        ({"model": {}, "optimizer": {}}, r"what optimizer.state_dict\(\) returns.*'model', 'optimizer'"),
        ([1, 2], r"source must be what .*got list"),
    ],
)
def test_no_checkpoint(source, text):
    with pytest.raises(ValueError, match=text):
        load(source)


def test_padded_and_stacked_leaves():
    checkpoint = {**LAYERS, "param_groups": GROUPS}

    def padded(weights):
        both = jnp.stack([jnp.asarray(weights["bias"], jnp.bfloat16)] * 2)
        return {
            "w": np.pad(weights["conv"], ((0, 0), (0, 0), (0, 1))),
            "b": both,
            "s": weights["scale"],
            "k": weights["kernel"],
        }

    tx = compat.torch.from_groups(checkpoint, padded)
    state = compat.torch.load_state(tx.init(padded(WEIGHTS)), checkpoint, padded)
    assert state.inner_states["1"].inner_state.inner_state[0].m["w"].real.shape == (2, 2, 4)


def test_only_rearranging():
    checkpoint = {**NAMED, "param_groups": GROUPS}
    with pytest.raises(ValueError, match=r"must rearrange numbers only .*but it made \[0.5\] of \[-1, 1, 2, 3\]"):
        compat.torch.from_groups(checkpoint, lambda w: to_params({**w, "kernel": np.asarray(w["kernel"]) / 2}))


def test_read_once():
    """What ``read`` returns is taken in place of the source, and says what it holds."""
    names = KINDS["two unnamed groups"]["names"]
    found = compat.torch.read(KINDS["two unnamed groups"]["checkpoint"], names=names)
    assert (found.count, found.names, found.schedule) == (BEFORE, names, None)
    assert compat.torch.read(found) is found
    tx, params = compat.torch.from_groups(found, to_params), to_params(WEIGHTS)
    state = compat.torch.load_state(tx.init(params), found, to_params)
    whole = KINDS["two unnamed groups"]["checkpoint"]
    chex.assert_trees_all_equal(state, compat.torch.load_state(tx.init(params), whole, to_params, names=names))
    for line in ("steps         12", "group 1       2 parameters, 4 numbers; lr=0.01, weight_decay=0.0", "stored"):
        assert line in str(found)


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda found: found.config, r"2 parameter groups with different hyperparameters.*from_groups"),
        (lambda found: found.weights, r"does not tell which of its weights are trainable"),
        (lambda found: found.select(["kernel", "head"]), r"has no parameters 'head'; it has 'kernel'"),
        (lambda found: found.select(["kernel", "kernel"]), r"each parameter once, got 'kernel', 'kernel'"),
        (lambda found: load(found, names=NAMES), r"names, weights and .* belong to the first read"),
        (lambda found: compat.torch.read(found, steps_per_epoch=3), r"the scheduler belong to the first read"),
        (lambda found: compat.torch.read(NAMED, nmaes=NAMES), r"read got nmaes, but there is no scheduler"),
        (lambda found: compat.torch.from_groups(found, lambda w: w, learning_rate=0.1).init({"w": jnp.ones(2)}),
         r"params differ in structure"),
    ],
)  # fmt: skip
def test_what_is_not_there(ask, text):
    checkpoint, names = KINDS["two unnamed groups"]["checkpoint"], KINDS["two unnamed groups"]["names"]
    with pytest.raises(ValueError, match=text):
        ask(compat.torch.read(checkpoint, names=names))


def test_selected_parameters():
    found = compat.torch.read(NAMED).select(["bias", "conv"])
    assert (found.names, found.count) == (["bias", "conv"], BEFORE)
    state = compat.torch.load_state(
        compat.torch.nadam().init({"b": jnp.ones(3)}), found.select(["bias"]), lambda w: {"b": w["bias"]}
    )
    np.testing.assert_array_equal(get_state(state).m["b"], NAMED["state"][1]["exp_avg"])
    in_order = compat.torch.read(UNNAMED).select([1, 2])
    assert list(in_order.parameters) == [0, 1]


def test_proportions_of_learning_rates():
    """A learning rate is the first group's; others have it in the proportion of their initial ones.

    A schedule that does not give the stored one is another run's, or deliberate: a warning.
    """
    halved = optax.linear_schedule(0.5, 0.0, BEFORE * 2)
    with pytest.warns(
        UserWarning, match=f"learning_rate gives 0.25 after the {BEFORE} steps of the run, the .* lr={LR}"
    ):
        tx = compat.torch.from_groups({**LAYERS, "param_groups": GROUPS}, to_params, learning_rate=halved)
    at_the_end = [{**group, "lr": 1e-9, "initial_lr": LR} for group in GROUPS]
    for groups, rate in ((GROUPS, LR * (1 + 1e-5)), (at_the_end, 2e-9)):  # no warning
        compat.torch.from_groups({**LAYERS, "param_groups": groups}, to_params, learning_rate=lambda _, x=rate: x)
    params = jax.tree.map(jnp.ones_like, to_params(WEIGHTS))
    state = compat.torch.load_state(tx.init(params), {**LAYERS, "param_groups": GROUPS}, to_params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    still, _ = compat.torch.from_groups({**LAYERS, "param_groups": GROUPS}, to_params).update(
        jax.tree.map(jnp.zeros_like, params), state, params
    )
    ratios = jax.tree.map(lambda x, y: float(jnp.mean(x) / jnp.mean(y)), updates, still)
    np.testing.assert_allclose(jax.tree.leaves(ratios), 0.25 / LR, rtol=1e-4)
    zero = [{**group, "lr": 0.0 if i == 0 else group["lr"]} for i, group in enumerate(GROUPS)]
    with pytest.raises(ValueError, match=r"in proportion to their initial ones, but these are \[0.0, "):
        compat.torch.from_groups({**LAYERS, "param_groups": zero}, to_params, learning_rate=0.5)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the path .*nothing.ckpt, where there is no file"):
        compat.torch.read(tmp_path / "nothing.ckpt")
