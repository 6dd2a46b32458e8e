"""Each kind of torch's and timm's checkpoints, as recorded, continued here."""

import contextlib

import chex
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from optax_nadam import NadamConfig, compat, get_state
from optax_nadam.compat._common import without
from tests.compat.sources import BEFORE, LR, continued, distance, from_params, gradients, recorded, to_params
from tests.parity.problem import gap, problem, run

KINDS = recorded("torch_sources")
# After 8 further steps at lr = 0.01, in units of lr: measured at most 7e-5.
BOUND = 2e-4
WARNS = {
    "layer-wise groups": r"keys that are ignored: group_name, layer_id",
    "timm NAdamW, layers": r"keys that are ignored: group_name, layer_id",
    "OneCycleLR": r"base_momentum and max_momentum: OneCycleLR has cycled",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_recorded_checkpoint_is_continued(name):
    kind = KINDS[name]
    options = {"names": kind["names"], "weights": kind["at"] if kind["frozen"] else None}
    grads = gradients(kind["frozen"])[BEFORE:]
    with pytest.warns(UserWarning, match=WARNS[name]) if name in WARNS else contextlib.nullcontext():
        end, _ = continued(kind["module"], kind["checkpoint"], kind["at"], grads, **options)
    assert distance(end, kind["then"]) < BOUND


NAMES = ["kernel", "bias", "conv", "scale"]
FLAT, NAMED, UNNAMED = (KINDS[name]["checkpoint"] for name in ("flattened", "named", "unnamed"))
WEIGHTS = KINDS["named"]["at"]
GROUPS = KINDS["layer-wise groups"]["checkpoint"]["param_groups"]


def load(checkpoint, take=to_params, **options):
    params = jax.tree.map(jnp.zeros_like, to_params(WEIGHTS))
    return compat.torch.load_state(compat.torch.nadam().init(params), checkpoint, take, **options)


def renamed(names):
    """The named checkpoint under other names."""
    return {**NAMED, "param_groups": [{**group, "param_names": names} for group in NAMED["param_groups"]]}


@pytest.mark.parametrize(
    "take",
    [
        to_params,
        lambda weights: to_params(dict(weights.items())),
        lambda weights: to_params(dict(weights)),
    ],
    ids=["by name", "items", "dict"],
)
def test_a_function_that_wants_names_is_told_what_to_pass(take):
    text = r"got a list of 4 arrays .*does not name.*pass names=\[n for n, _ in model.named_parameters\(\)\]"
    with pytest.raises(ValueError, match=text):
        load(UNNAMED, take)
    with pytest.raises(ValueError, match=r"weights are by name, but the checkpoint does not name .*pass names="):
        load(UNNAMED, weights=WEIGHTS)


def test_shapes_are_checked_by_name_whatever_the_order_of_weights():
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
def test_an_alphabetical_order_is_rejected(names):
    with pytest.raises(ValueError, match=r"names are in alphabetical order \('.*' before '.*'\).*leave names out"):
        load(UNNAMED, names=names)


def test_names_that_are_in_both_orders_are_taken():
    state = load(
        UNNAMED, lambda w: to_params(dict(zip(NAMES, w.values(), strict=True))), names=["0.w", "1.w", "2.w", "x.w"]
    )
    jax.tree.map(np.testing.assert_array_equal, state, load(NAMED))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_prefixes_of_wrappers_are_named(prefix):
    with pytest.raises(ValueError, match=rf"has it as '{prefix}kernel'.*names=\[n.replace\('{prefix}', ''\)"):
        load(renamed([prefix + name for name in NAMES]))


def test_tied_weights_get_no_zero_moments():
    tied = {**WEIGHTS, "head": WEIGHTS["kernel"]}
    with pytest.raises(ValueError, match=r"equal arrays under 'head' and 'kernel'.*they are tied"):
        load(NAMED, weights=tied)
    under_another_name = {name: x for name, x in tied.items() if name != "kernel"}
    with pytest.raises(ValueError, match=r"weights lack 'kernel'.* have 'head' besides.*tied parameters"):
        load(NAMED, weights=under_another_name)
    with pytest.raises(ValueError, match=r"asked for 'head'.*If it is tied to another parameter.*under the first name"):
        load(NAMED, lambda w: to_params({**w, "kernel": w["head"]}))


def test_untrained_weights_may_have_equal_constants():
    ones = {**WEIGHTS, "bias": np.ones(3, np.float32), "norm": np.ones(3, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, load(NAMED, weights=ones), load(NAMED))


def test_a_flattened_checkpoint_needs_no_order():
    shuffled = {key: FLAT[key] for key in sorted(FLAT)}
    jax.tree.map(np.testing.assert_array_equal, load(shuffled), load(KINDS["get_optimizer_state_dict"]["checkpoint"]))


def mixed(bits):
    """A checkpoint whose kernel is of a narrow dtype, as torch resumes it: the product is rounded to that."""
    state = {i: dict(entry) for i, entry in NAMED["state"].items()}
    state[0] |= {key: state[0][key].astype(bits) for key in ("mu_product", "exp_avg", "exp_avg_sq")}
    return {**NAMED, "state": state}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_two_dtypes_has_one_product(dtype):
    checkpoint = mixed(dtype)
    exact = NAMED["state"][1]["mu_product"]
    assert float(checkpoint["state"][0]["mu_product"]) != float(exact)
    assert get_state(load(checkpoint)).mu_product == exact


def test_products_differ_by_no_more_than_their_dtype_explains():
    for step, other, fits in ((3, 0.018555, True), (3, 0.0187, True), (3, 0.0200, False)):
        state = {
            i: {**x, "step": np.float32(step), "mu_product": np.float32(0.018498)} for i, x in NAMED["state"].items()
        }
        state[0]["mu_product"] = np.asarray(other, ml_dtypes.bfloat16)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"'kernel' took 3 \(product 0.02"):
            load({**NAMED, "state": state})
    state[0]["mu_product"] = np.float32(0.018555)
    with pytest.raises(ValueError, match=r"took 3 \(product 0.018498\); 1 others took 3 \(product 0.018555\)"):
        load({**NAMED, "state": state})


def test_groups_that_differ_in_weight_decay_have_one_nadam():
    groups = KINDS["two unnamed groups"]["checkpoint"]["param_groups"]
    tx = compat.torch.from_groups(groups, to_params, names=KINDS["two unnamed groups"]["names"])
    params = jax.tree.map(jnp.ones_like, to_params(WEIGHTS))
    state = tx.init(params)
    assert get_state(state).m.keys() == params.keys()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    means = {name: float(jnp.mean(x)) for name, x in from_params(updates).items()}
    np.testing.assert_allclose(list(means.values()), [-0.001, 0, -0.001, 0], atol=1e-9)


def test_one_set_of_hyperparameters_makes_the_optimizer_of_its_config():
    group = NAMED["param_groups"][0]
    tx, plain = compat.torch.from_groups([group], to_params), compat.torch.config_from(group).build()
    chex.assert_trees_all_equal_structs(tx.init(WEIGHTS), plain.init(WEIGHTS))


def test_groups_of_several_learning_rates_have_nadams_of_their_own():
    kind = KINDS["layer-wise groups"]
    with pytest.warns(UserWarning, match="group_name, layer_id"):
        tx = compat.torch.from_groups(kind["checkpoint"]["param_groups"], to_params)
    params = jax.tree.map(jnp.ones_like, to_params(WEIGHTS))
    state = tx.init(params)
    assert sorted(state.inner_states) == ["0", "1", "frozen"]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    got = {name: float(jnp.mean(x)) for name, x in from_params(updates).items()}
    step, _ = compat.torch.nadam(LR).update(jnp.ones(()), compat.torch.nadam(LR).init(jnp.ones(())))
    expected = {"kernel": step - 0.1 * LR, "bias": step, "conv": 0.5 * step - 0.05 * 0.5 * LR, "scale": step}
    np.testing.assert_allclose([got[k] for k in expected], list(expected.values()), rtol=1e-5)


def test_what_is_frozen_stands_still_and_is_left_out_of_a_checkpoint():
    kind = KINDS["frozen"]
    tx = compat.torch.from_groups(kind["checkpoint"], to_params)
    params = to_params(jax.tree.map(jnp.asarray, WEIGHTS))
    state = compat.torch.load_state(tx.init(params), kind["checkpoint"], to_params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not updates["block"]["bias"].any()
    dumped = compat.torch.dump_state(state, from_params, param_groups=kind["checkpoint"]["param_groups"])
    assert dumped["state"].keys() == {0, 2, 3}


def test_nadams_of_one_state_have_counts_of_their_own():
    kind = KINDS["layer-wise groups"]
    state = {i: dict(entry) for i, entry in kind["checkpoint"]["state"].items()}
    state[2] |= {"step": np.float32(5), "mu_product": np.float32(0.25)}
    checkpoint = {**kind["checkpoint"], "state": state}
    with pytest.warns(UserWarning, match="group_name"):
        tx = compat.torch.from_groups(checkpoint, to_params)
    loaded = compat.torch.load_state(tx.init(to_params(WEIGHTS)), checkpoint, to_params)
    counts = {key: get_state(part).count for key, part in loaded.inner_states.items() if key != "frozen"}
    assert counts == {"0": 12, "1": 5}
    dumped = compat.torch.dump_state(loaded, from_params, param_groups=checkpoint["param_groups"])
    assert {i: float(entry["step"]) for i, entry in dumped["state"].items()} == {0: 12, 1: 12, 2: 5, 3: 12}
    assert float(dumped["state"][2]["mu_product"]) == 0.25
    state[0]["step"] = np.float32(4)
    with pytest.raises(ValueError, match=r"'kernel' took 4 .*; 2 others took 12"):
        compat.torch.load_state(tx.init(to_params(WEIGHTS)), {**checkpoint, "state": state}, to_params)


def test_a_leaf_of_two_groups_is_rejected():
    groups = KINDS["two unnamed groups"]["checkpoint"]["param_groups"]
    names = KINDS["two unnamed groups"]["names"]
    with pytest.raises(ValueError, match=r"params\['w'\] is made of parameters of several parameter groups"):
        compat.torch.from_groups(groups, lambda w: {"w": np.stack([w["kernel"], w["bias"]])}, names=names)


def test_names_and_several_unnamed_groups_are_not_matched_by_guess():
    params = to_params(WEIGHTS)
    groups = KINDS["two unnamed groups"]["checkpoint"]["param_groups"]
    with pytest.raises(ValueError, match=r"param_groups are several without param_names. Return a list"):
        compat.torch.dump_state(compat.torch.nadam().init(params), from_params, param_groups=groups)


@pytest.mark.parametrize("both", [{}, {"config": NadamConfig(), "param_groups": []}], ids=["neither", "both"])
def test_a_dump_has_either_a_config_or_groups(both):
    for ours in (compat.torch, compat.timm):
        with pytest.raises(ValueError, match=r"needs either config, .*, or param_groups, .*got (neither|both)"):
            ours.dump_state(compat.torch.nadam().init(jnp.ones(2)), lambda p: [p], **both)


def test_the_config_of_the_optimizer_gives_a_product_that_is_not_stored():
    checkpoint, names = KINDS["timm NAdamW"]["checkpoint"], KINDS["timm NAdamW"]["names"]
    init = compat.timm.nadamw().init(to_params(WEIGHTS))
    state = compat.timm.load_state(init, checkpoint, to_params, names=names)
    np.testing.assert_allclose(get_state(state).mu_product, 0.9**12, rtol=1e-6)
    config = NadamConfig(rule="simplified", b1=0.5)
    state = compat.timm.load_state(init, checkpoint, to_params, names=names, config=config)
    np.testing.assert_allclose(get_state(state).mu_product, 0.5**12, rtol=1e-6)


def test_lightning_users_are_told_what_to_pass():
    with pytest.raises(ValueError, match=r"got the keys \['optimizer_states'.*checkpoint\['optimizer_states'\]\[0\]"):
        load({"optimizer_states": [NAMED], "state_dict": {}})


@pytest.mark.lenient("optax.nadamw")
def test_torch_can_express_the_constant_rule():
    config = NadamConfig(rule="constant", learning_rate=0.1, weight_decay=0.2)
    group = compat.torch.config_to(config)
    assert (group["momentum_decay"], group["decoupled_weight_decay"], group["weight_decay"]) == (1e4, True, 0.2)
    params, grads = problem(3, steps=200)
    ours, _ = run(compat.torch.config_from(group).build(), params, grads)
    optaxs, _ = run(optax.nadamw(0.1, eps=config.eps, weight_decay=0.2), params, grads)
    assert gap(ours, optaxs, 0.1) < 2e-4


def test_a_leaf_may_be_padded_or_made_of_parameters_that_are_alike():
    kind = KINDS["layer-wise groups"]
    checkpoint = {**kind["checkpoint"], "param_groups": [without(g, ["layer_id", "group_name"]) for g in GROUPS]}

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


def test_a_function_that_changes_numbers_is_rejected():
    checkpoint = {**NAMED, "param_groups": [without(g, ["layer_id", "group_name"]) for g in GROUPS]}
    with pytest.raises(ValueError, match=r"must rearrange numbers only .*but it made \[0.5\] of \[-1, 1, 2, 3\]"):
        compat.torch.from_groups(checkpoint, lambda w: to_params({**w, "kernel": np.asarray(w["kernel"]) / 2}))
