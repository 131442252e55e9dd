"""Weights under configs: JSON, overrides of a loaded network, and starting from other weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    init_variables,
    resolved,
    variable_shapes,
)
from lora_diffusion_jax.factory.pretrained import (
    Pretrained,
    check_adapters,
    config_from_dict,
    load_workdir,
    network_fields,
    overlay,
    start_from,
    with_config,
    with_more_classes,
)
from lora_diffusion_jax.factory.training import build_optimizer, trainable
from lora_diffusion_jax.modes.train import OPEN_AFTER_IMPORT, RESUMABLE_CHANGES
from lora_diffusion_jax.paths import split
from lora_diffusion_jax.training import checkpoint, workdir
from tests.small import fast_jit, random_variables, small_config


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__bases": 4}, "other shapes: .*/lora/"),
        ({"lora__mode": "baseline"}, "left over: .*/lora/"),
        ({"model__num_blocks": 2}, "it lacks: .*block1"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_named(tmp_path, changes, words):
    config = small_config()
    params = filled(config, 0.1)["params"]
    weights = checkpoint.SavedWeights(params=params, frozen={}, buffers={}, ema=params)
    with workdir.open_workdir(tmp_path, config.to_dict()) as path:
        checkpoint.save_weights(path, weights)
    assert load_workdir(tmp_path).step == 0
    (tmp_path / "config.json").write_text(json.dumps(small_config(**changes).to_dict()))
    with pytest.raises(UserError, match=f"weights of step 0 do not fit .*config.json; .*{words}"):
        load_workdir(tmp_path)


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


def test_overlay_leaves_out_a_mapping_network_that_nothing_reads():
    only = filled(small_config(lora__mode="only_lora", lora__adapter="time"), 0.0)
    assert "map" not in only["params"]["model"]
    base = filled(small_config(lora__mode="baseline"), 1.0)
    merged = overlay(only, base, "x")
    assert jax.tree.structure(merged) == jax.tree.structure(only)
    assert np.all(merged["params"]["model"]["dec"]["4x4_in0"]["conv0"]["kernel"] == 1)


CLASSES = {
    "class_conditional": True,
    "lora__adapter": "time_class",
    "lora__num_timesteps": 10,
    "model__channel_mult": (1,),
    "model__attn_resolutions": (),
    "model__augment_dim": 0,
}
IMPROVED = {"model__name": "improved", "model__channels": 32}


def with_classes(number, **changes):
    """The config of a small network with ClassLoRA."""
    return small_config(data__num_classes=number, **{**CLASSES, **changes})


def random_network(config) -> Pretrained:
    denoiser = build_denoiser(config)
    labels = np.zeros((1, config.data.num_classes), np.float32)
    variables = random_variables(denoiser, np.zeros((1, 8, 8, 1), np.float32), np.ones(1), labels)
    return Pretrained(denoiser, variables, config)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(IMPROVED, marks=pytest.mark.slow)], ids=["ddpmpp", "improved"]
)
def test_new_classes_leave_the_old_ones_as_they_are(changes):
    """Classes 0 and 1 compute the same; 2 and 3 start as an image without a class."""
    start, config = random_network(with_classes(2, **changes)), with_classes(4, **changes)
    denoiser = build_denoiser(config)
    fresh = fast_jit(functools.partial(init_variables, config, denoiser))(jax.random.key(0))
    variables, words = with_more_classes(start, config, fresh)
    variables = overlay(fresh, variables, "x")
    assert words.startswith(
        "added fresh pairs for classes 2 to 3 at 2 sites, and zeros in the class"
    )
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    before = fast_jit(start.denoiser.apply)(
        start.variables, x, np.float32(1), np.float32([[1, 0], [0.5, 0.5], [0, 0]])
    )
    labels = np.float32([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1]])
    after = fast_jit(denoiser.apply)(variables, x, np.float32(1), labels)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    pair = variables["params"]["model"]["dec"]["8x8_in0"]["qkv"]["lora"]["class"]
    assert not np.any(pair["up"]["kernel"][4:])  # of rank 2
    own = fresh["params"]["model"]["dec"]["8x8_in0"]["qkv"]["lora"]["class"]
    np.testing.assert_array_equal(pair["down"]["kernel"][:, 4:], own["down"]["kernel"][:, 4:])


def test_only_networks_of_classlora_take_more_classes():
    config = with_classes(4)
    fresh = filled(config, 0.0)
    for start in (
        with_classes(2, lora__adapter="time"),
        with_classes(2, lora__mode="baseline"),
        with_classes(5),
        with_classes(4),
    ):
        network = Pretrained(build_denoiser(start), filled(start, 1.0), start)
        variables, words = with_more_classes(network, config, fresh)
        assert words == ""
        assert variables is network.variables


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            {"lora__adapter": "class"},
            {"lora__adapter": "time"},
            "lora.adapter 'class', here 'time'",
        ),
        ({"lora__rank": 4}, {"lora__rank": 2}, "lora.rank 4, here 2"),
        ({}, {"lora__bases": 4}, "lora.bases 3, here 4"),
        ({}, {"lora__num_timesteps": 0}, "lora.num_timesteps 10, here 4000"),
        ({}, {"lora__sites": ".*/qkv", "lora__mode": "only_lora"}, "lora.sites '.*', here"),
        (
            {"lora__adapter": "uc"},
            {"lora__adapter": "uc", "lora__widths": (8, 8)},
            r"lora.widths \(16, 8\), here \(8, 8\)",
        ),
    ],
)
def test_adapters_start_from_the_same_adapters_alone(old, new, words):
    """Other ones may have arrays of the same shapes."""
    with pytest.raises(
        UserError, match=f"init_from=x has other adapters than this config: .*{words}"
    ):
        check_adapters(with_classes(2, **old), with_classes(2, **new), "x")


def test_adapters_are_the_same_by_what_they_use():
    check_adapters(with_classes(2), with_classes(4), "x")
    check_adapters(with_classes(2, lora__mode="baseline"), with_classes(2, lora__rank=7), "x")
    alone = {"lora__adapter": "class"}
    check_adapters(with_classes(2, lora__bases=9, **alone), with_classes(4, **alone), "x")
    ddpm = {"precond__name": "ddpm", "precond__num_steps": 30}
    check_adapters(
        with_classes(2, **ddpm, lora__num_timesteps=30),
        with_classes(2, **ddpm, lora__num_timesteps=0),
        "x",
    )


def test_classes_keep_their_numbers():
    def names(*names):
        return with_classes(len(names), data__class_names=names)

    check_adapters(names("ant", "bee"), names("ant", "bee", "cat"), "x")
    check_adapters(with_classes(2), names("ant", "bee", "cat"), "x")
    with pytest.raises(UserError, match="its class 1 is 'bee', here 'cat'"):
        check_adapters(names("ant", "bee"), names("ant", "cat", "bee"), "x")
    baseline = names("ant", "bee")
    baseline.lora.mode = "baseline"
    check_adapters(baseline, names("cat", "dog"), "x")


def test_a_start_tells_of_another_process_and_of_new_classes():
    linear = {"precond__name": "ddpm", "precond__schedule": "linear", "precond__num_steps": 30}
    start, config = with_classes(2, **linear), with_classes(3, **linear)
    config.precond.schedule, config.precond.loss = "cosine", "simple"
    network = Pretrained(build_denoiser(start), filled(start, 1.0), start)
    variables, notes = start_from(network, config, filled(config, 0.0), "x")
    assert np.all(variables["params"]["model"]["dec"]["8x8_in0"]["conv0"]["kernel"] == 1)
    assert notes == [
        "added fresh pairs for class 2 at 2 sites, and zeros in the class embedding",
        "trained for another process: precond.schedule 'linear', here 'cosine'",
    ]
    written = with_classes(2, **linear, precond__rescale_timesteps=True)
    assert start_from(network, written, filled(written, 0.0), "x")[1] == []


def test_training_new_classes_alone():
    """The last pairs move, and nothing else; the base is frozen."""
    config = with_classes(4, train__freeze_base=True, train__new_classes=1, train__rampup_images=0)
    check(config)
    params = filled(config, 1.0)["params"]
    trained, frozen = split(params, trainable(config))
    paths = flatten_dict(trained, sep="/")
    assert len(paths) == 4  # down and up at two sites
    assert all("/lora/class/" in path for path in paths)
    assert any("/lora/time/" in path for path in flatten_dict(frozen, sep="/"))
    optimizer = build_optimizer(config)
    ones = jax.tree.map(np.ones_like, trained)
    updates, _ = optimizer.update(ones, optimizer.init(trained), trained, jnp.float32(0))
    for path, update in flatten_dict(updates, sep="/").items():
        inner = update.T if path.endswith("/down/kernel") else update  # [classes * rank, ...]
        assert not np.any(inner[:6]), path
        assert np.all(inner[6:] < 0), path
    alone = with_classes(4, lora__adapter="class", train__freeze_base=True, train__new_classes=1)
    trained, _ = split(filled(alone, 1.0)["params"], trainable(alone))
    assert len(jax.tree.leaves(trained)) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__freeze_base": False}, "train.new_classes is 1; it needs train.freeze_base=True"),
        ({"lora__adapter": "time"}, "it needs train.freeze_base=True and lora.adapter=class or"),
        ({"train__new_classes": 5}, "train.new_classes is 5, but data.num_classes is 4"),
        ({"train__new_classes": -1}, "train.new_classes is -1"),
    ],
)
def test_new_classes_that_do_not_exist_are_refused(changes, words):
    settings = {"train__freeze_base": True, "train__new_classes": 1, **changes}
    with pytest.raises(UserError, match=words):
        check(with_classes(4, **settings))


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


def test_a_default_written_out_is_no_change():
    written = {
        "model__embedding": "positional",
        "model__encoder": "standard",
        "model__resample_filter": (1, 1),
        "model__learn_sigma": False,
        "model__attn_resolutions": (),
        "model__attn_levels": (1,),
    }
    assert with_config(loaded(), small_config(**written)).config.model.attn_levels == (1,)
    process = {"precond__name": "ddpm", "model__name": "improved", "model__channels": 32}
    timed = {**process, "lora__adapter": "time"}
    written = {
        "precond__schedule": "cosine",
        "precond__num_steps": 4000,
        "precond__rescale_timesteps": True,
        "model__learn_sigma": True,
        "model__num_heads_upsample": -1,
        "model__use_scale_shift_norm": True,
        "lora__num_timesteps": 4000,
        "lora__widths": (4,),
    }
    with_config(loaded(**timed), small_config(**timed, **written))
    with pytest.raises(UserError, match="lora.num_timesteps 4000, now 1000"):
        with_config(loaded(**timed), small_config(**timed, lora__num_timesteps=1000))


def test_a_run_of_an_older_version_resumes():
    """It has lora.num_timesteps=4000 whatever the adapter, and lacks the fields that came later."""
    config = small_config()
    saved = json.loads(json.dumps(config.to_dict()))
    saved["lora"]["num_timesteps"] = 4000
    del saved["precond"]["rescale_timesteps"], saved["model"]["attn_levels"]
    there, here = (resolved(config_from_dict(c)) for c in (saved, config.to_dict()))
    assert workdir.differences(there, here) == ({}, {})
    config.lora.rank = 3
    there, here = (resolved(config_from_dict(c)) for c in (saved, config.to_dict()))
    assert workdir.differences(there, here)[0] == {"lora.rank": (2, 3)}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model__channels", 16, "model.channels 8, now 16"),
        ("model__embedding", "fourier", "model.embedding 'positional', now 'fourier'"),
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
