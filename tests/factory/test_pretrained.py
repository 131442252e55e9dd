"""Weights under configs: JSON, overrides of a loaded network, and starting from other weights."""

import json

import jax
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser, variable_shapes
from lora_diffusion_jax.factory.pretrained import (
    Pretrained,
    config_from_dict,
    network_fields,
    overlay,
    with_config,
)
from lora_diffusion_jax.modes.train import OPEN_AFTER_IMPORT, RESUMABLE_CHANGES
from lora_diffusion_jax.training import workdir
from tests.small import small_config


def filled(config, value):
    """Variables of a config's network, all of them `value`."""
    shapes = variable_shapes(config, build_denoiser(config))
    return jax.tree.map(lambda s: np.full(s.shape, value, s.dtype), shapes)


def test_config_survives_json():
    config = small_config(sampler__s_max=float("inf"), model__resample_filter=(1, 2, 1))
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"model": {"wings": 2}}, "model.wings"),
        ({"model": {"channels": "8"}}, "model.channels = 8, which has the wrong type"),
    ],
)
def test_saved_configs_that_do_not_fit_are_named(saved, words):
    with pytest.raises(UserError, match=words):
        config_from_dict(saved)


def test_overlay_puts_a_base_under_new_adapters():
    config, bare = small_config(), small_config(lora__mode="baseline")
    fresh, other = filled(config, 0.0), filled(bare, 1.0)
    merged = overlay(fresh, other, "x")
    base_params, adapters = lora.split(merged["params"])
    jax.tree.map(np.testing.assert_array_equal, base_params, other["params"])
    jax.tree.map(np.testing.assert_array_equal, adapters, lora.split(fresh["params"])[1])
    only = filled(small_config(lora__mode="only_lora"), 0.0)
    assert jax.tree.structure(overlay(only, other, "x")) == jax.tree.structure(only)
    with pytest.raises(UserError, match="init_from=x does not match.*other shapes"):
        overlay(filled(small_config(model__channels=16), 0.0), other, "x")
    with pytest.raises(UserError, match="left over"):
        overlay(other, fresh, "x")
    with pytest.raises(UserError, match="it lacks"):
        overlay(other, only, "x")


def loaded(**changes) -> Pretrained:
    config = small_config(**changes)
    return Pretrained(build_denoiser(config), {"params": {}}, config)


def test_overrides_that_leave_the_weights_valid():
    config = small_config(sampler__num_steps=5, dtype="bfloat16", model__dropout=0.0)
    assert with_config(loaded(), config).denoiser == build_denoiser(config)
    square = small_config(data__image_width=8, data__num_classes=3)  # unconditional all the same
    with_config(loaded(), square)
    bypassed = with_config(loaded(), small_config(lora__mode="baseline", lora__rank=7))
    assert not isinstance(bypassed.denoiser.model, lora.Adapted)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model__channels", 16, "model.channels 8, now 16"),
        ("model__embedding", "fourier", "model.embedding None, now 'fourier'"),
        ("data__image_size", 16, "data.image_size 8, now 16"),
        ("data__image_width", 16, "data.image_width 8, now 16"),
        ("precond__sigma_data", 1.0, "precond.sigma_data"),
        ("lora__rank", 3, "lora.rank 2, now 3"),
        ("lora__sites", ".*/qkv", "lora.sites"),
        ("lora__adapter", "time", "lora.adapter 'uc', now 'time'"),
        ("lora__mode", "only_lora", "lora.mode 'with_lora', now 'only_lora'"),
    ],
)
def test_overrides_that_describe_other_weights_are_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        with_config(loaded(), small_config(**{field: value}))


def test_a_network_that_lora_alone_conditions_has_no_base_of_its_own():
    with pytest.raises(UserError, match="lora.mode 'only_lora', now 'baseline'"):
        with_config(loaded(lora__mode="only_lora"), small_config(lora__mode="baseline"))


def test_an_imported_network_can_be_trained_in_its_workdir():
    """Its config describes the network, and leaves data and training open."""
    imported = config_from_dict(network_fields(small_config()))
    train = imported.copy_and_resolve_references()
    train.data.image_width, train.data.fingerprint, train.data.name = 8, "abc", "digits"
    train.train.batch_size, train.augment.p, train.model.dropout = 16, 0.0, 0.1
    saved = json.loads(json.dumps(imported.to_dict()))
    free = (*RESUMABLE_CHANGES, *OPEN_AFTER_IMPORT)
    matters, _ = workdir.differences(saved, train.to_dict(), free)
    assert not matters
    train.lora.rank = 7
    matters, _ = workdir.differences(saved, train.to_dict(), free)
    assert list(matters) == ["lora.rank"]
