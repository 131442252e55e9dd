"""The name table: the paper's parameter counts, exact round trips, and errors that name tensors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop import (
    base_hash,
    check_architecture,
    count_parameters,
    infer_architecture,
    read_snapshot,
    to_state_dict,
    to_variables,
)
from lora_diffusion_jax.interop.convert import split_adapters
from lora_diffusion_jax.interop.names import iddpm_levels, name_table
from lora_diffusion_jax.readers.pickles import ModuleNode

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("edm_lora", "ve_ncsnpp", "iddpm_adm")

DDPMPP = {
    "precond": "edm",
    "precond_args": {"sigma_data": 0.5},
    "model": "ddpmpp",
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 0,
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.13,
    "label_dropout": 0,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "channel_mult_emb": 4,
    "resample_filter": [1, 1],
    "use_fp16": False,
    "use_affine": True,
    "lora": None,
}
NCSNPP = {
    "model": "ncsnpp",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
FFHQ = {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
ADM = {
    "model": "adm",
    "img_resolution": 64,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "label_dim": 1000,
    "augment_dim": 0,
}
LORA = {"lora": {"rank": 4, "bases": 18, "widths": [128, 64]}}
LORA20 = {"lora": {"rank": 4, "bases": 20, "widths": [128, 64]}}
ONLY = {"use_affine": False}
COND = {"label_dim": 10}

# Choi et al. 2024, table 2, and counts of the reference code.
COUNTS = [
    ({}, 55_733_891),
    (ONLY | LORA, 53_411_675),
    (LORA, 57_745_499),
    (COND, 55_735_299),
    (COND | ONLY | LORA, 53_413_083),
    (COND | LORA, 57_746_907),
    (NCSNPP, 56_397_827),
    (NCSNPP | LORA, 58_409_435),
    (NCSNPP | COND, 56_400_643),
    (NCSNPP | COND | LORA, 58_412_251),
    (FFHQ, 61_805_571),
    (FFHQ | LORA20, 63_941_619),
    (FFHQ | NCSNPP, 62_761_091),
    (FFHQ | NCSNPP | LORA20, 64_897_139),
    (ADM, 295_899_267),
    (ADM | LORA, 309_923_995),
]


@pytest.mark.parametrize(("changes", "expected"), COUNTS)
def test_parameter_counts_of_the_paper(changes, expected):
    assert count_parameters(check_architecture(DDPMPP | changes)) == expected


def golden(name: str) -> ModuleNode:
    return read_snapshot(GOLDEN / f"snapshot_{name}.pkl").ema


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact_in_names_order_shapes_types_and_bits(name):
    ema = golden(name)
    weights, architecture = ema.state_dict(), infer_architecture(ema)
    back = to_state_dict(to_variables(weights, architecture), architecture)
    assert list(back) == list(weights)
    for key, value in weights.items():
        assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape)
        assert back[key].tobytes() == value.tobytes(), key


def test_inferred_architectures():
    lora = infer_architecture(golden("edm_lora"))
    assert lora == DDPMPP | {
        "precond_args": {"sigma_min": 0, "sigma_data": 0.5},
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 3,
        "model_channels": 8,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.25,
        "lora": {"rank": 2, "bases": 3, "widths": [8, 4]},
    }
    ncsnpp = infer_architecture(golden("ve_ncsnpp"))
    assert {key: ncsnpp[key] for key in NCSNPP} == NCSNPP
    assert ncsnpp["precond_args"] == {"sigma_min": 0.02, "sigma_max": 100}
    assert ncsnpp["dropout"] == 0.1  # the official default, as none was given
    adm = infer_architecture(golden("iddpm_adm"))
    assert (adm["model"], adm["precond"], adm["use_fp16"]) == ("adm", "iddpm", True)
    assert adm["precond_args"] == {"c_1": 0.001, "c_2": 0.008, "num_steps": 1000}
    assert adm["label_dropout"] == 0.5
    for architecture in (lora, ncsnpp, adm):
        assert json.loads(json.dumps(architecture, allow_nan=False)) == architecture


def without_arguments(ema: ModuleNode) -> ModuleNode:
    model = dataclasses.replace(ema.children["model"], init_kwargs=None)
    return dataclasses.replace(ema, children={"model": model})


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_tell_the_same_architecture(name):
    ema = golden(name)
    told = infer_architecture(ema)
    guessed = infer_architecture(without_arguments(ema))
    if name == "iddpm_adm":  # too narrow for any attention, so that its places leave no trace
        told["attn_resolutions"] = []
    assert guessed == told


def test_values_lie_where_the_networks_look_for_them():
    ema = golden("edm_lora")
    weights = ema.state_dict()
    params = to_variables(weights, infer_architecture(ema))["params"]["model"]
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
    ema = golden("ve_ncsnpp")
    variables = to_variables(ema.state_dict(), infer_architecture(ema))
    freqs = variables["buffers"]["model"]["map"]["noise"]["freqs"]
    np.testing.assert_array_equal(freqs, ema.state_dict()["model.map_noise.freqs"])


def test_iddpm_levels_are_kept_and_otherwise_made():
    ema = golden("iddpm_adm")
    weights, architecture = ema.state_dict(), infer_architecture(ema)
    variables = to_variables(weights, architecture)
    np.testing.assert_array_equal(variables["buffers"]["u"], weights["u"])
    made = to_state_dict({"params": variables["params"]}, architecture)["u"]
    # float32 sines differ by an ulp between libraries; the recursion amplifies it near u = 0
    np.testing.assert_allclose(made, weights["u"], rtol=1e-4)
    np.testing.assert_array_equal(made, iddpm_levels())


@pytest.mark.parametrize("name", NAMES)
def test_missing_unused_and_misshapen_tensors_are_named(name):
    ema = golden(name)
    weights, architecture = ema.state_dict(), infer_architecture(ema)
    lost = {k: v for k, v in weights.items() if k != "model.map_layer1.bias"}
    with pytest.raises(UserError, match=r"lacks 1 tensors: model\.map_layer1\.bias"):
        to_variables(lost, architecture)
    extra = weights | {"model.surplus\nline": np.zeros(1)}
    with pytest.raises(UserError, match=r"unused 1 tensors: model\.surplus\\nline"):
        to_variables(extra, architecture)
    wrong = weights | {"model.map_layer1.bias": np.zeros(3)}
    with pytest.raises(UserError, match=r"map_layer1\.bias has shape \(3,\)"):
        to_variables(wrong, architecture)
    filters = [k for k in weights if k.endswith("resample_filter")]
    other = weights | {filters[0]: weights[filters[0]] * 2}
    with pytest.raises(UserError, match=filters[0]):
        to_variables(other, architecture)


def test_variables_that_do_not_fit_are_named():
    ema = golden("edm_lora")
    architecture = infer_architecture(ema)
    variables = to_variables(ema.state_dict(), architecture)
    with pytest.raises(UserError, match="unused.*lora"):
        to_state_dict(variables, architecture | {"lora": None})
    base, adapters = split_adapters(variables)
    with pytest.raises(UserError, match=r"lacks.*lora/bias"):
        to_state_dict(base, architecture)
    wide = architecture | {"lora": {"rank": 3, "bases": 2, "widths": [8, 4]}}
    with pytest.raises(UserError, match="shape"):
        to_state_dict(variables, wide)
    assert adapters.keys() == {"params"}


def test_base_hash_ignores_adapters_and_notices_any_bit():
    ema = golden("edm_lora")
    architecture = infer_architecture(ema)
    variables = to_variables(ema.state_dict(), architecture)
    base, _ = split_adapters(variables)
    digest = base_hash(variables, architecture)
    assert base_hash(base, architecture | {"lora": None}) == digest
    bias = variables["params"]["model"]["map"]["layer0"]["bias"]
    bias[3] = np.nextafter(bias[3], np.float32(9))
    assert base_hash(variables, architecture) != digest


def replaced(ema: ModuleNode, path: str, **changes) -> ModuleNode:
    """A copy with the module at a dotted path changed."""
    if not path:
        return dataclasses.replace(ema, **changes)
    head, _, rest = path.partition(".")
    child = replaced(ema.children[head], rest, **changes)
    return dataclasses.replace(ema, children=ema.children | {head: child})


def test_unknown_classes_and_options_are_named():
    ema = golden("edm_lora")
    model = ema.children["model"]
    block = "model.enc.4x4_block0"
    attributes = dict(ema.walk())[block].attributes
    cases = {
        "StyleGAN": replaced(ema, "", class_name="StyleGAN"),
        "UViT": replaced(ema, "model", class_name="UViT"),
        "rotary": replaced(ema, "model", init_kwargs=model.init_kwargs | {"rotary": True}),
        "encoder_type = 'skip'": replaced(
            ema, "model", init_kwargs=model.init_kwargs | {"encoder_type": "skip"}
        ),
        "img_resolution": replaced(
            ema, "model", init_kwargs=model.init_kwargs | {"img_resolution": 10**9}
        ),
        "num_heads = 2": replaced(ema, block, attributes=attributes | {"num_heads": 2}),
        "eps = 0.5": replaced(ema, f"{block}.norm0", attributes={"eps": 0.5}),
        "endpoint = False": replaced(ema, "model.map_noise", attributes={"endpoint": False}),
        "skip_scale": replaced(ema, block, attributes=attributes | {"skip_scale": 1.0}),
        "different dropout": replaced(ema, block, attributes=attributes | {"dropout": 0.5}),
        "scales the LoRA": replaced(ema, f"{block}.qkv", attributes={"scale": 0.5}),
        "does not record use_fp16": replaced(ema, "", attributes={}),
    }
    for message, node in cases.items():
        with pytest.raises(UserError, match=message):
            infer_architecture(node)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 10**9}, "num_blocks = 1000000000"),
        ({"channel_mult": []}, "channel_mult"),
        ({"channel_mult": [1.5]}, "channel_mult"),
        ({"model": "improved"}, "model = 'improved'"),
        ({"precond_args": {"sigma_data": float("nan")}}, "precond_args"),
        ({"lora": {"rank": 0, "bases": 1, "widths": [1]}}, "lora"),
        ({"lora": {"rank": 1, "bases": 1}}, "lora"),
        ({"use_fp16": 1}, "use_fp16 = 1"),
        ({"resample_filter": [1, -1]}, "resample_filter"),
        ({"colour": "red"}, "unknown colour"),
    ],
)
def test_architectures_from_files_are_validated(changes, message):
    with pytest.raises(UserError, match=message):
        check_architecture(DDPMPP | changes)
    with pytest.raises(UserError, match="lacks model"):
        check_architecture({k: v for k, v in DDPMPP.items() if k != "model"})


def test_half_precision_checkpoints_keep_their_type():
    ema = golden("edm_lora")
    architecture = infer_architecture(ema)
    halves = {k: v.astype(np.float16) for k, v in ema.state_dict().items()}
    variables = to_variables(halves, architecture)
    assert variables["params"]["model"]["map"]["layer0"]["kernel"].dtype == np.float16


def test_names_and_places_are_unique():
    for changes, _ in COUNTS:
        table = name_table(check_architecture(DDPMPP | changes))
        assert len({e.name for e in table}) == len(table)
        places = [e.path for e in table if e.collection]
        assert len(set(places)) == len(places)
