"""Configs become networks; invalid values are named."""

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.diffusion import precond
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    bypass_lora,
    check_attention,
    forward_flops,
    init_variables,
    variable_shapes,
)
from lora_diffusion_jax.factory.objectives import build_sampler
from lora_diffusion_jax.factory.training import build_cadence, build_mesh
from lora_diffusion_jax.models import NETWORKS, convolution
from lora_diffusion_jax.models.adm_unet import ADMUNet
from lora_diffusion_jax.models.song_unet import SongUNet
from lora_diffusion_jax.training.sharding import make_mesh, replicated
from tests.small import fast_jit, random_variables, small_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


# What the U-Net of small_config() has, besides the sizes of images and labels.
SMALL = {
    "augment_dim": 9,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.13,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert f"--config=configs/{name}.py" in module.__doc__
    assert set(config.to_dict()) == set(base().to_dict())
    denoiser = build_denoiser(config)
    hash(denoiser)  # a key of the cache of shapes
    build_sampler(config, denoiser)
    build_cadence(config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("digits", "cifar10_edm") else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_every_config_says_how_large_its_network_is(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    count = lora.count(variable_shapes(config, build_denoiser(config))["params"])
    assert f"{count:,}" in module.__doc__ or name == "digits"


def test_a_network_of_ones_own_needs_no_hash():
    config = small_config()
    denoiser = build_denoiser(config)
    adapter = lora.UCLoRA(rank=2, bases=3, widths=[16, 8])  # of a list
    given = denoiser.model.attachments[0]
    own = dataclasses.replace(given, adapter=adapter)
    denoiser = denoiser.clone(model=denoiser.model.clone(attachments=(own,)))
    with pytest.raises(TypeError, match="unhashable"):
        hash(denoiser)
    expected = variable_shapes(config, build_denoiser(config))
    assert variable_shapes(config, denoiser) == expected


def test_a_network_is_traced_once(monkeypatch):
    """By its shapes, those of a state, and the program of fresh weights: it takes seconds."""
    traced = []
    init = Denoiser.init
    monkeypatch.setattr(Denoiser, "init", lambda *args: traced.append(1) or init(*args))
    config = small_config(lora__rank=3)

    def fresh(key):
        return init_variables(config, build_denoiser(config), key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = variable_shapes(config, build_denoiser(config))
    assert jax.eval_shape(fresh, key) == shapes
    whole = replicated(make_mesh())
    jax.jit(fresh, in_shardings=whole, out_shardings=whole).lower(key)
    assert len(traced) == 1


def test_fresh_weights_are_those_of_plain_init():
    config = small_config()
    denoiser, key = build_denoiser(config), jax.random.key(5)
    plain = jax.jit(
        lambda key: denoiser.init({"params": key}, jnp.zeros((1, 8, 8, 1)), jnp.ones(1))
    )
    jax.tree.map(
        np.testing.assert_array_equal, init_variables(config, denoiser, key), dict(plain(key))
    )


def test_a_config_becomes_the_modules_that_one_would_write_by_hand():
    config = small_config(class_conditional=True, data__num_classes=5, precond__name="ve")
    config.model.name, config.dtype, config.train.remat = "ncsnpp", "bfloat16", "norms"
    unet = SongUNet(
        image_size=8,
        in_channels=1,
        out_channels=1,
        num_classes=5,
        **SMALL,
        remat="norms",
        dtype=jnp.bfloat16,
        embedding="fourier",
        encoder="residual",
        channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1),
    )
    adapter = lora.UCLoRA(rank=2, bases=3, widths=(16, 8))
    wrapped = lora.attach(unet, sites=r".*/(qkv|proj)", adapter=adapter, condition="map")
    assert build_denoiser(config) == precond.Denoiser(wrapped, precond.VE(), 5)
    config.lora.mode = "only_lora"
    assert build_denoiser(config).model.module == unet.clone(use_affine=False)
    config.lora.mode = "baseline"
    assert build_denoiser(config).model == unet


def test_iddpm_networks_have_twice_the_channels():
    denoiser = build_denoiser(
        small_config(precond__name="iddpm", model__name="adm", lora__mode="baseline")
    )
    assert denoiser.model == ADMUNet(
        image_size=8,
        in_channels=1,
        out_channels=2,
        **SMALL,
    )


def test_optional_fields_replace_what_the_name_implies():
    config = small_config(model__name="ncsnpp", lora__mode="baseline", precond__name="vp")
    config.model.encoder, config.model.resample_filter = "standard", (1, 1)
    config.precond.beta_d = 19.1
    denoiser = build_denoiser(config)
    assert (denoiser.model.encoder, denoiser.model.resample_filter) == ("standard", (1, 1))
    assert (denoiser.model.embedding, denoiser.model.channel_mult_noise) == ("fourier", 2)
    assert denoiser.precond == precond.VP(beta_d=19.1)


def test_a_new_network_needs_one_entry(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", lambda image_size, channels, out_channels: channels)
    check(small_config(model__name="mine"))
    config = small_config(model__name="mine", lora__mode="baseline", model__channels=7)
    assert build_denoiser(config).model == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__name": "resnet"},
            "model.name is 'resnet'; it must be one of ddpmpp, ncsnpp, adm",
        ),
        ({"precond__name": "flow"}, "precond.name is 'flow'"),
        ({"lora__mode": "lora"}, "lora.mode is 'lora'"),
        ({"lora__adapter": "moe"}, "lora.adapter is 'moe'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"lora__rank": 0}, "lora.rank is 0; it must be 1 to 4096"),
        ({"lora__widths": ()}, r"lora.widths is \[\]; expected 1 to 16 integers"),
        ({"lora__widths": (18, 64)}, "cannot split 18 into 4"),
        ({"train__batch_size": 0}, "train.batch_size is 0; it must be at least 1"),
        ({"train__microbatch": -4}, "train.microbatch is -4"),
        ({"train__seed": 2**32}, "train.seed is 4294967296"),
        ({"sampler__batch_size": 0}, "sampler.batch_size is 0"),
        ({"eval__num_samples": -1}, "eval.num_samples is -1"),
        ({"model__channels": 0}, "model.channels is 0"),
        ({"model__num_blocks": 10**9}, "model.num_blocks is 1000000000; it must be 1 to 256"),
        ({"model__channel_mult": ()}, "model.channel_mult"),
        ({"model__channel_mult": (1, 0.5)}, r"model.channel_mult is \[1, 0.5\]"),
        ({"model__channel_mult_emb": 0}, "model.channel_mult_emb is 0"),
        ({"model__dropout": 1.5}, "model.dropout is 1.5; it must be 0 to 1"),
        ({"model__encoder": "skip"}, "model.encoder is 'skip'"),
        (
            {"model__name": "adm", "model__encoder": "standard"},
            "model.name=adm has no such setting",
        ),
        ({"precond__sigma_data": 0.0}, "precond.sigma_data is 0.0; it must be above 0"),
        (
            {"precond__beta_d": 1.0},
            "precond.beta_d is 1.0, but precond.name=edm has no such setting",
        ),
        ({"augment__p": 1.5}, "augment.p is 1.5"),
        ({"model__augment_dim": 4}, "model.augment_dim is 4"),
        ({"train__freeze_base": True, "lora__mode": "baseline"}, "nothing to train"),
        ({"data__name": "a", "data__path": "b"}, "Both data.name"),
        ({"class_conditional": True}, "has none"),
        ({"data__image_size": 0}, "image size is unknown"),
        ({"lora__adapter": "class"}, "lora.adapter=class needs classes"),
        ({"lora__adapter": "time_class"}, "lora.adapter=time_class needs classes"),
    ],
)
def test_invalid_values_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        build_denoiser(small_config(**changes))


@pytest.mark.parametrize(
    ("channels", "words"), [(14, "14 channels into 3"), (2, "noise embedding of 2 channels")]
)
def test_widths_that_no_layer_can_have_are_refused(channels, words):
    config = small_config(model__channels=channels)
    with pytest.raises(UserError, match=words):
        variable_shapes(config, build_denoiser(config))


def test_bypass_is_the_base():
    denoiser = build_denoiser(small_config())
    bare = build_denoiser(small_config(lora__mode="baseline"))
    x, sigma = jnp.ones((2, 8, 8, 1)), jnp.ones(1)
    variables = random_variables(denoiser, x, sigma)
    base_params = {"params": lora.split(variables["params"])[0]}
    found = fast_jit(bypass_lora(denoiser).apply)(variables, x, sigma)
    np.testing.assert_array_equal(found, fast_jit(bare.apply)(base_params, x, sigma))
    adapted = fast_jit(denoiser.apply)(variables, x, sigma)
    assert np.abs(adapted - found).max() > 0


def test_residual_encoder_stays_in_half_precision():
    """A float64 scalar of NumPy would make everything after the first residual sum float32."""
    config = small_config(model__name="ncsnpp", dtype="bfloat16", lora__mode="baseline")
    denoiser = build_denoiser(config)
    x = jnp.ones((1, 8, 8, 1))

    def run(key):
        variables = init_variables(config, denoiser, key)
        return denoiser.apply(
            variables, x, 1.0, capture_intermediates=True, mutable="intermediates"
        )

    _, state = jax.eval_shape(run, jax.random.key(0))
    skips = state["intermediates"]["model"]["enc"]["__call__"][0]
    assert {skip.dtype.name for skip in skips} == {"bfloat16"}


@pytest.mark.parametrize("size", [8, 16])
def test_attention_by_level_is_attention_by_height_at_every_size(size):
    by_level = small_config(data__image_size=size, model__attn_levels=(1,))
    by_height = small_config(data__image_size=size, model__attn_resolutions=(size // 2,))
    assert build_denoiser(by_level) == build_denoiser(by_height)
    with pytest.raises(UserError, match="there is no level 2: .* 0 to 1"):
        build_denoiser(small_config(model__attn_levels=(2,)))


def test_attention_at_a_height_that_no_level_has_is_refused():
    check_attention(small_config())
    with pytest.raises(UserError, match="no level of an image 24 pixels high has 4: .* 24, 12"):
        check_attention(small_config(data__image_size=24))


def test_the_count_is_of_the_network_not_of_the_cpus_convolutions(monkeypatch):
    config = small_config(model__channels=convolution.MIN_CHANNELS)
    counted = forward_flops(config, build_denoiser(config))
    monkeypatch.setattr(convolution, "pays_off", lambda *call: False)
    assert counted == forward_flops(config, build_denoiser(config)) > 0


def test_float16_is_counted_and_refused_on_a_cpu():
    whole, half = small_config(), small_config(dtype="float16")
    expected = forward_flops(whole, build_denoiser(whole))
    assert forward_flops(half, build_denoiser(half)) == expected > 0
    with pytest.raises(UserError, match="dtype is float16, .* use float32 or bfloat16"):
        build_mesh(half)
