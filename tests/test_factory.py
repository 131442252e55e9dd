"""Configs become what they say; what does not fit is named."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_diffusion_jax import experiment, factory, interop, lora
from lora_diffusion_jax.default_config import base, sampler
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training import workdir

CONFIGS = sorted(p.stem for p in Path("configs").glob("*.py") if p.stem != "__init__")


def tiny(**changes) -> ConfigDict:
    """A small unconditional network on 8x8 gray images, with fields changed: lora__rank=2."""
    config = base()
    config.data.image_size, config.data.channels = 8, 1
    config.model.channels, config.model.channel_mult, config.model.num_blocks = 8, (1, 2), 1
    config.model.attn_resolutions = (4,)
    config.lora.rank, config.lora.bases, config.lora.widths = 2, 3, (16, 8)
    if "sampler__name" in changes:
        config.sampler = sampler(changes["sampler__name"])
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert f"--config=configs/{name}.py" in module.__doc__
    assert set(config.to_dict()) == set(base().to_dict())
    denoiser = factory.build_denoiser(config)
    shapes = jax.eval_shape(lambda: factory.init_variables(config, denoiser, jax.random.key(0)))
    count = lora.count(shapes["params"])
    assert f"{count:,}" in module.__doc__ or name == "digits"
    factory.build_sampler(config, denoiser)
    factory.build_cadence(config)


@pytest.mark.parametrize("mode", ["baseline", "with_lora", "only_lora"])
@pytest.mark.parametrize("model", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm"])
def test_architecture_and_config_are_inverse(mode, model, precond):
    config = tiny(
        lora__mode=mode,
        model__name=model,
        precond__name=precond,
        class_conditional=True,
        data__num_classes=5,
    )
    if model == "adm":
        config.model.channels, config.model.attn_resolutions = 64, (4,)
    architecture = factory.architecture_from_config(config)
    again = factory.config_from_architecture(json.loads(json.dumps(architecture)))
    assert factory.architecture_from_config(again) == {
        **architecture,
        "lora": architecture["lora"],
    }
    assert again.lora.mode == mode
    assert again.model.to_dict() == config.model.to_dict()


def test_unusual_architectures_have_no_config():
    architecture = factory.architecture_from_config(tiny()) | {"resample_filter": [1, 3, 3, 1]}
    with pytest.raises(UserError, match=r"resample_filter=\[1, 3, 3, 1\]"):
        factory.config_from_architecture(architecture)


def test_config_survives_json():
    config = tiny(sampler__s_max=float("inf"))
    again = factory.config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(UserError, match="model.wings"):
        factory.config_from_dict({"model": {"wings": 2}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__name": "resnet"}, "model.name is 'resnet'"),
        ({"precond__name": "flow"}, "precond.name is 'flow'"),
        ({"lora__mode": "lora"}, "lora.mode is 'lora'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"lora__rank": 0}, "rank is 0"),
        ({"train__batch_size": 0}, "train.batch_size is 0"),
        ({"model__channels": 0}, "model.channels is 0"),
        ({"augment__p": 1.5}, "augment.p is 1.5"),
        ({"model__augment_dim": 4}, "model.augment_dim is 4"),
        ({"train__freeze_base": True, "lora__mode": "baseline"}, "nothing to train"),
        ({"data__name": "a", "data__path": "b"}, "Both data.name"),
        ({"lora__widths": ()}, "lora.widths is empty"),
        ({"class_conditional": True}, "has none"),
        ({"data__image_size": 0}, "image size is not known"),
    ],
)
def test_unusable_configs_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        factory.build_denoiser(tiny(**changes))


def objective_value(config, train=True, moved=0.0):
    denoiser = factory.build_denoiser(config)
    variables = factory.init_variables(config, denoiser, jax.random.key(0))
    variables = jax.tree.map(lambda v: v + moved, variables)
    objective = factory.build_objective(config, denoiser)
    images = jnp.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)
    draws = objective.draw(jax.random.key(1), images.shape)
    loss = jax.jit(objective.loss, static_argnums=4)
    return loss(variables, images, None, draws, train)


@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm"])
def test_objective_of_a_fresh_network_is_near_its_closed_form(precond):
    """A fresh network's F is almost zero, so D = c_skip x, and the loss follows from the draws."""
    config = tiny(precond__name=precond, augment__p=0.0, model__dropout=0.0)
    images = np.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)
    denoiser = factory.build_denoiser(config)
    draws = factory.build_objective(config, denoiser).draw(jax.random.key(1), images.shape)
    sigma = np.asarray(draws["sigma"], np.float64)[:, None, None, None]
    skip = 0.25 / (0.25 + sigma**2) if precond == "edm" else 1.0
    weight = (0.25 + sigma**2) / (0.5 * sigma) ** 2 if precond == "edm" else sigma**-2
    expected = weight * (skip * (images + sigma * draws["noise"]) - images) ** 2
    loss, level = objective_value(config)
    np.testing.assert_array_equal(level, draws["sigma"])
    np.testing.assert_allclose(loss, expected, rtol=0.02, atol=2e-3)


def test_frozen_base_has_no_dropout():
    losses = [
        np.asarray(objective_value(tiny(model__dropout=0.5, train__freeze_base=f), moved=0.05)[0])
        for f in (True, False)
    ]
    config = tiny(model__dropout=0.5)
    evaluated = objective_value(config, train=False, moved=0.05)[0]
    np.testing.assert_array_equal(losses[0], evaluated)
    assert np.abs(losses[0] - losses[1]).max() > 0


def test_overlay_puts_a_base_under_new_adapters():
    key = jax.random.key(0)
    config, bare = tiny(), tiny(lora__mode="baseline")
    fresh = factory.init_variables(config, factory.build_denoiser(config), key)
    other = factory.init_variables(bare, factory.build_denoiser(bare), jax.random.key(5))
    merged = experiment.overlay(fresh, other, "x")
    base_params, adapters = lora.split(merged["params"])
    jax.tree.map(np.testing.assert_array_equal, base_params, other["params"])
    jax.tree.map(np.testing.assert_array_equal, adapters, lora.split(fresh["params"])[1])
    only = tiny(lora__mode="only_lora")
    without = factory.init_variables(only, factory.build_denoiser(only), key)
    lora_alone = experiment.overlay(without, other, "x")
    assert jax.tree.structure(lora_alone) == jax.tree.structure(without)
    wider = tiny(model__channels=16)
    wide = factory.init_variables(wider, factory.build_denoiser(wider), key)
    with pytest.raises(UserError, match="other shapes"):
        experiment.overlay(wide, other, "x")
    with pytest.raises(UserError, match="left over"):
        experiment.overlay(other, fresh, "x")
    with pytest.raises(UserError, match="it lacks"):
        experiment.overlay(other, without, "x")


def test_bypass_is_the_base():
    config, bare = tiny(), tiny(lora__mode="baseline")
    denoiser = factory.build_denoiser(config)
    variables = factory.init_variables(config, denoiser, jax.random.key(0))
    noisy = jax.tree.map(lambda v: v + 0.1, variables)
    base_params = {"params": lora.split(noisy["params"])[0]}
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(
        factory.bypass_lora(denoiser).apply(noisy, x, 1.0),
        factory.build_denoiser(bare).apply(base_params, x, 1.0),
    )
    assert np.abs(denoiser.apply(noisy, x, 1.0) - denoiser.apply(variables, x, 1.0)).max() > 0


@pytest.mark.parametrize(
    ("class_id", "count", "classes", "expected"),
    [(None, 4, 3, None), ("2", 4, 3, 2), ("all", 6, 3, [0, 0, 1, 1, 2, 2])],
)
def test_class_id_texts(class_id, count, classes, expected):
    assert experiment.choose_classes(class_id, count, classes) == expected


@pytest.mark.parametrize(("class_id", "classes"), [("x", 3), ("-1", 3), ("all", 0)])
def test_class_id_mistakes(class_id, classes):
    with pytest.raises(UserError, match="--class_id"):
        experiment.choose_classes(class_id, 4, classes)


@pytest.mark.parametrize(
    ("channels", "words"), [(14, "14 channels into 3"), (2, "noise embedding of 2 channels")]
)
def test_widths_that_no_layer_can_have_are_refused(channels, words):
    config = tiny(model__channels=channels)
    denoiser = factory.build_denoiser(config)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: factory.init_variables(config, denoiser, jax.random.key(0)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampler__batch_size", 0),
        ("train__microbatch", -4),
        ("train__seed", 2**32),
        ("model__channel_mult", ()),
        ("model__channel_mult_emb", 0),
        ("model__dropout", 1.5),
        ("precond__sigma_data", 0.0),
        ("eval__num_samples", -1),
    ],
)
def test_numbers_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=field.replace("__", ".")):
        factory.check(tiny(**{field: value}))


def test_norm_that_cannot_split_a_hidden_width_of_lora_is_refused():
    with pytest.raises(UserError, match="cannot split 18 into 4"):
        factory.build_denoiser(tiny(lora__widths=(18, 64)))


def test_loaded_weights_refuse_a_config_of_another_network():
    config = tiny()
    loaded = interop.Pretrained(factory.build_denoiser(config), {"params": {}}, config)
    factory.with_config(loaded, tiny(sampler__num_steps=5, dtype="bfloat16", model__dropout=0.0))
    bypassed = factory.with_config(loaded, tiny(lora__mode="baseline"))
    assert not isinstance(bypassed.denoiser.model, lora.Adapted)
    for field, value, words in (
        ("model__channels", 16, "model_channels 8, now 16"),
        ("data__image_size", 16, "img_resolution"),
        ("data__image_width", 16, "image size"),
        ("lora__rank", 3, "lora"),
        ("lora__sites", ".*/qkv", "sites"),
    ):
        with pytest.raises(UserError, match=words):
            factory.with_config(loaded, tiny(**{field: value}))


def test_residual_encoder_stays_in_half_precision():
    """A float64 scalar of NumPy would make everything after the first residual sum float32."""
    config = tiny(model__name="ncsnpp", dtype="bfloat16", lora__mode="baseline")
    denoiser = factory.build_denoiser(config)
    x = jnp.ones((1, 8, 8, 1))

    def run(key):
        variables = factory.init_variables(config, denoiser, key)
        return denoiser.apply(
            variables, x, 1.0, capture_intermediates=True, mutable="intermediates"
        )

    _, state = jax.eval_shape(run, jax.random.key(0))
    skips = state["intermediates"]["model"]["enc"]["__call__"][0]
    assert {skip.dtype.name for skip in skips} == {"bfloat16"}


def test_an_imported_network_can_be_trained_in_its_workdir():
    """Its config knows the architecture, and leaves data and training open."""
    imported = factory.config_from_architecture(factory.architecture_from_config(tiny()))
    train = imported.copy_and_resolve_references()
    train.data.image_width, train.data.fingerprint, train.data.name = 8, "abc", "digits"
    train.train.batch_size, train.augment.p, train.model.dropout = 16, 0.0, 0.1
    saved = json.loads(json.dumps(imported.to_dict()))
    free = (*experiment.HARMLESS, *experiment.OPEN_AFTER_IMPORT)
    matters, _ = workdir.differences(saved, train.to_dict(), free)
    assert not matters
    train.lora.rank = 7
    matters, _ = workdir.differences(saved, train.to_dict(), free)
    assert list(matters) == ["lora.rank"]


def test_samplers_are_tried_before_anything_is_compiled():
    denoiser = factory.build_denoiser(tiny(precond__name="ve"))
    build = lambda **changes: factory.build_sampler(tiny(**changes), denoiser)  # noqa: E731
    assert build(sampler__sigma_min=0.5).keywords["sigma_min"] == 0.5
    with pytest.raises(UserError, match="num_steps is 1"):
        build(sampler__num_steps=1)
    with pytest.raises(UserError, match="0.02 and sigma_max 0.01"):  # VE starts at 0.02
        build(sampler__sigma_max=0.01)
    ablation = {"sampler__name": "ablation", "sampler__discretization": "iddpm"}
    with pytest.raises(UserError, match="fewer than num_steps=50"):
        build(**ablation, sampler__m=20, sampler__num_steps=50)
    with pytest.raises(UserError, match="solver is 'rk4'"):
        build(**ablation, sampler__solver="rk4")


class Pictures:
    """A data set that is only looked at from outside."""

    title, num_classes = "pictures", 3

    def __init__(self, shape):
        self.image_shape = shape

    def fingerprint(self):
        return "f"


def test_sizes_come_from_the_data_set_or_agree_with_it():
    open_sizes = {"data__image_size": 0, "data__channels": 0}
    config = factory.complete(tiny(**open_sizes), Pictures((8, 16, 3)))
    assert factory.image_shape(config) == (8, 16, 3)
    assert config.data.num_classes == 0  # not asked for
    conditional = tiny(**open_sizes, class_conditional=True)
    assert factory.complete(conditional, Pictures((8, 8, 1))).data.num_classes == 3
    for shape, words in (((8, 16, 1), "image_width=8"), ((9, 9, 1), "image_size=8")):
        with pytest.raises(UserError, match=words):
            factory.complete(tiny(), Pictures(shape))
    with pytest.raises(UserError, match="multiples of 2"):
        factory.complete(tiny(**open_sizes), Pictures((9, 8, 1)))
    with pytest.raises(UserError, match="channels=1"):
        factory.complete(tiny(), Pictures((8, 8, 3)))


def test_settings_of_another_sampler_are_errors() -> None:
    config = tiny()
    config.sampler.name = "heun"  # with the fields of edm
    with pytest.raises(UserError, match=r"sampler.name=heun has no setting sampler.s_churn"):
        factory.build_sampler(config, factory.build_denoiser(config))
