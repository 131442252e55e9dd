"""Official names by rule: exact round trips of snapshots, and errors that name tensors."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.interop import base_hash, infer_config, names, to_state_dict, to_variables
from tests.interop.golden import NAMES, snapshot
from tests.small import small_config


def network_variables(config):
    rng = np.random.default_rng(0)
    shapes = names.variable_shapes(config, build_denoiser(config))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact_in_names_shapes_types_and_bits(name):
    weights, config = snapshot(name).state_dict(), infer_config(snapshot(name))
    back = to_state_dict(to_variables(weights, config), config)
    if name == "iddpm_adm":  # a constant here: made from its formula, see below
        weights, back = ({k: v for k, v in d.items() if k != "u"} for d in (weights, back))
    assert_same(back, weights)


def test_values_lie_where_the_networks_look_for_them():
    weights = snapshot("edm_lora").state_dict()
    params = to_variables(weights, infer_config(snapshot("edm_lora")))["params"]["model"]
    block, site = "model.enc.4x4_block0", "model.enc.4x4_block0.qkv"
    here = params["enc"]["4x4_block0"]
    conv = weights[f"{block}.conv0.weight"]
    assert here["conv0"]["kernel"].shape == (3, 3, conv.shape[1], conv.shape[0])
    assert here["conv0"]["kernel"][0, 2, 1, 5] == conv[5, 1, 0, 2]
    linear = weights["model.map_layer0.weight"]
    np.testing.assert_array_equal(params["map"]["layer0"]["kernel"], linear.T)
    qkv = weights[f"{site}.conv.weight"]
    np.testing.assert_array_equal(here["qkv"]["kernel"], qkv[:, :, 0, 0].T)
    np.testing.assert_array_equal(here["qkv"]["bias"], weights[f"{site}.conv.bias"])
    adapter = here["qkv"]["lora"]
    np.testing.assert_array_equal(adapter["bias"], weights[f"{site}.bias"])
    down = weights[f"{site}.lora_down.weight"]
    np.testing.assert_array_equal(adapter["down"]["kernel"], down[:, :, 0, 0].T)
    composition = adapter["composition"]
    assert set(composition) == {"dense_0", "norm_0", "dense_1", "norm_1", "dense_out"}
    scale = weights[f"{site}.comp_weights.1.1.weight"]
    np.testing.assert_array_equal(composition["norm_1"]["scale"], scale)
    assert here["norm0"].keys() == {"scale", "bias"}


def test_fixed_frequencies_are_buffers():
    weights, config = snapshot("ve_ncsnpp").state_dict(), infer_config(snapshot("ve_ncsnpp"))
    freqs = to_variables(weights, config)["buffers"]["model"]["map"]["noise"]["freqs"]
    np.testing.assert_array_equal(freqs, weights["model.map_noise.freqs"])


def test_iddpm_levels_follow_from_their_formula():
    """float32 sines differ by an ulp between libraries, which the recursion amplifies near u = 0."""
    weights, config = snapshot("iddpm_adm").state_dict(), infer_config(snapshot("iddpm_adm"))
    variables = to_variables(weights, config)
    assert set(variables) == {"params"}
    levels = build_denoiser(config).precond.levels()
    np.testing.assert_allclose(levels, weights["u"], rtol=2e-5)
    np.testing.assert_array_equal(to_state_dict(variables, config)["u"], levels)
    other = weights | {"u": weights["u"] * 1.01}
    with pytest.raises(UserError, match="checkpoint's u is not"):
        to_variables(other, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__adapter": "time_class", "lora__num_timesteps": 10},
        {"lora__sites": r".*/(conv0|affine)"},
        {"model__name": "adm", "model__channels": 64, "lora__mode": "only_lora"},
    ],
)
def test_networks_beyond_the_official_ones_have_unique_names_and_come_back(changes):
    config = small_config(class_conditional=True, data__num_classes=3, **changes)
    variables = network_variables(config)
    state_dict = to_state_dict(variables, config)
    trained = [name for name in state_dict if not name.endswith("resample_filter")]
    assert len(trained) == len(jax.tree.leaves(variables))
    jax.tree.map(np.testing.assert_array_equal, to_variables(state_dict, config), variables)


@pytest.mark.parametrize("name", NAMES)
def test_missing_left_over_and_misshapen_tensors_are_named(name):
    weights, config = snapshot(name).state_dict(), infer_config(snapshot(name))
    changed = {k: v for k, v in weights.items() if k != "model.map_layer1.weight"}
    changed |= {"model.surplus\nline": np.zeros(1), "model.map_layer1.bias": np.zeros(3)}
    with pytest.raises(UserError) as error:
        to_variables(changed, config)
    for words in (
        "it lacks: model.map_layer1.weight;",
        r"left over: model.surplus\nline;",
        "other shapes: model.map_layer1.bias is (3,) there, (32,) here.",
    ):
        assert words in str(error.value)


def test_filters_that_differ_from_the_networks_are_refused():
    weights, config = snapshot("ve_ncsnpp").state_dict(), infer_config(snapshot("ve_ncsnpp"))
    name = "model.enc.4x4_down.conv0.resample_filter"
    with pytest.raises(UserError, match=name):
        to_variables(weights | {name: weights[name] * 2}, config)


def test_variables_that_do_not_fit_are_named():
    config = small_config()
    variables = network_variables(config)
    with pytest.raises(UserError, match="left over: .*lora"):
        to_state_dict(variables, small_config(lora__mode="baseline"))
    with pytest.raises(UserError, match="it lacks: .*lora/bias"):
        to_state_dict({"params": lora.split(variables["params"])[0]}, config)
    with pytest.raises(UserError, match="other shapes: .*lora"):
        to_state_dict(variables, small_config(lora__rank=3))


# SHA-256 that versions with format 1 wrote for these bases.
HASHES = {
    "edm_lora": "ce31143156087efa7cf96231ff5da158b15ad5b23c5f1aaab7bb84ac6e6b8f00",
    "ve_ncsnpp": "d3a35ebb542e177cec71fcb0fc0c6c404773a8714654928dba70222c6262e47f",
    "iddpm_adm": "97c53909ffefd2550743e18d8671d55917b7a8b6a16454950c2ab14723541251",
}


@pytest.mark.parametrize("name", NAMES)
def test_base_hash_ignores_adapters_and_notices_any_bit(name):
    variables = to_variables(snapshot(name).state_dict(), infer_config(snapshot(name)))
    assert base_hash(variables) == base_hash(lora.split(variables)[0]) == HASHES[name]
    bias = variables["params"]["model"]["map"]["layer0"]["bias"]
    bias[3] = np.nextafter(bias[3], np.float32(9))
    assert base_hash(variables) != HASHES[name]


def test_half_precision_checkpoints_keep_their_type():
    weights, config = snapshot("edm_lora").state_dict(), infer_config(snapshot("edm_lora"))
    variables = to_variables({k: v.astype(np.float16) for k, v in weights.items()}, config)
    assert variables["params"]["model"]["map"]["layer0"]["kernel"].dtype == np.float16
