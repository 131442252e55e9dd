"""Configs from snapshots: what is unusual becomes a field, what is unknown is named."""

import json

import numpy as np
import pytest

from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.pretrained import config_from_dict, network_fields
from lora_diffusion_jax.interop.infer import config_from_format_1, infer_config
from tests.interop.golden import NAMES, replaced, snapshot, with_arguments

# What exports of format 1 say of the network in snapshot_edm_lora.pkl.
FORMAT_1 = {
    "precond": "edm",
    "precond_args": {"sigma_min": 0, "sigma_data": 0.5},
    "model": "ddpmpp",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "augment_dim": 9,
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.25,
    "label_dropout": 0,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "channel_mult_emb": 4,
    "resample_filter": [1, 1],
    "use_fp16": False,
    "use_affine": True,
    "lora": {"rank": 2, "bases": 3, "widths": [8, 4]},
}


def edm_lora_config():
    config = base()
    config.class_conditional = True
    config.data.update({"image_size": 8, "channels": 1, "num_classes": 3})
    config.model.channels, config.model.channel_mult, config.model.num_blocks = 8, (1, 1), 1
    config.model.attn_resolutions, config.model.dropout = (4,), 0.25
    config.lora.rank, config.lora.bases, config.lora.widths = 2, 3, (8, 4)
    return config


def test_configs_of_the_golden_snapshots():
    assert infer_config(snapshot("edm_lora")).to_dict() == edm_lora_config().to_dict()
    ncsnpp = infer_config(snapshot("ve_ncsnpp"))
    assert (ncsnpp.model.name, ncsnpp.precond.name, ncsnpp.lora.mode) == (
        "ncsnpp",
        "ve",
        "baseline",
    )
    assert ncsnpp.model.dropout == 0.1  # the official default, as none was given
    assert ncsnpp.augment.p == 0
    adm = infer_config(snapshot("iddpm_adm"))
    assert (adm.model.name, adm.precond.name, adm.model.label_dropout) == ("adm", "iddpm", 0.5)
    unset = base()
    for config in (ncsnpp, adm):  # what the names imply is not said twice
        for group in ("model", "precond"):
            for field, value in unset[group].items():
                assert value is not None or config[group][field] is None


def test_format_1_describes_the_same_network():
    assert config_from_format_1(FORMAT_1).to_dict() == edm_lora_config().to_dict()
    adm = FORMAT_1 | {"model": "adm", "precond": "iddpm", "precond_args": {"num_steps": 1000}}
    config = config_from_format_1(adm | {"lora": None})
    assert (config.model.name, config.precond.num_steps, config.lora.mode) == (
        "adm",
        None,
        "baseline",
    )
    build_denoiser(config)


@pytest.mark.parametrize("name", NAMES)
def test_network_fields_survive_json(name):
    config = infer_config(snapshot(name))
    fields = json.loads(json.dumps(network_fields(config), allow_nan=False))
    assert config_from_dict(fields).to_dict() == config.to_dict()


def test_unusual_networks_are_described_by_optional_fields():
    unusual = with_arguments(
        snapshot("ve_ncsnpp"), encoder_type="standard", resample_filter=[1, 2, 1]
    )
    unusual = replaced(unusual, "", attributes=unusual.attributes | {"sigma_max": 50})
    config = infer_config(unusual)
    assert config.model.encoder == "standard"
    assert config.model.resample_filter == (1, 2, 1)
    assert config.model.embedding is None
    assert (config.precond.sigma_min, config.precond.sigma_max) == (None, 50)
    denoiser = build_denoiser(config)
    assert (denoiser.model.encoder, denoiser.model.embedding) == ("standard", "fourier")
    assert denoiser.model.resample_filter == (1, 2, 1)
    assert (denoiser.precond.sigma_min, denoiser.precond.sigma_max) == (0.02, 50)


def test_unknown_classes_and_options_are_named():
    ema = snapshot("edm_lora")
    block = "model.enc.4x4_block0"
    attributes = dict(ema.walk())[block].attributes
    cases = {
        "StyleGAN": replaced(ema, "", class_name="StyleGAN"),
        "UViT": replaced(ema, "model", class_name="UViT"),
        "rotary": with_arguments(ema, rotary=True),
        "model.encoder is 'skip'": with_arguments(ema, encoder_type="skip"),
        "data.image_size is 1000000000": with_arguments(ema, img_resolution=10**9),
        r"channel_mult is \[1.5\]": with_arguments(ema, channel_mult=[1.5]),
        "model_channels = 8.5": with_arguments(ema, model_channels=8.5),
        "num_blocks = None": with_arguments(ema, num_blocks=None),
        "does not record the arguments": replaced(ema, "model", init_kwargs=None),
        "does not record img_resolution": replaced(ema, "model", init_kwargs={"in_channels": 1}),
        "num_heads = 2": replaced(ema, block, attributes=attributes | {"num_heads": 2}),
        "eps = 0.5": replaced(ema, f"{block}.norm0", attributes={"eps": 0.5}),
        "endpoint = False": replaced(ema, "model.map_noise", attributes={"endpoint": False}),
        "skip_scale": replaced(ema, block, attributes=attributes | {"skip_scale": 1.0}),
        "different dropout": replaced(ema, block, attributes=attributes | {"dropout": 0.5}),
        "scales the LoRA": replaced(ema, f"{block}.qkv", attributes={"scale": 0.5}),
    }
    for message, node in cases.items():
        with pytest.raises(UserError, match=message):
            build_denoiser(infer_config(node))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 10**9}, "model.num_blocks is 1000000000"),
        ({"channel_mult": []}, "model.channel_mult"),
        ({"precond_args": {"sigma_data": "x"}}, "sigma_data = x"),
        ({"precond_args": {"sigma_data": float("nan")}}, "precond.sigma_data is nan"),
        ({"lora": {"rank": 0, "bases": 1, "widths": [1]}}, "lora.rank is 0"),
        ({"lora": None, "use_affine": False}, "neither scale-and-shift nor LoRA"),
        ({"resample_filter": [1, -1]}, "model.resample_filter"),
    ],
)
def test_descriptions_from_files_are_validated(changes, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(config_from_format_1(FORMAT_1 | changes))


def test_a_network_that_was_resized_by_hand_does_not_load(tmp_path):
    """Recorded arguments that do not fit the tensors are found by their shapes."""
    from lora_diffusion_jax.interop import to_variables

    ema = with_arguments(snapshot("edm_lora"), model_channels=16)
    with pytest.raises(UserError, match=r"other shapes: .*\(8, .* there, \(16, .* here"):
        to_variables(ema.state_dict(), infer_config(ema))
    assert np.shape(ema.state_dict()["model.map_layer0.weight"]) == (32, 8)
