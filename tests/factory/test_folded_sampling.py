"""`sampler.fold`: batches of one condition, sampled with the adapters folded into the base."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.training import build_generator, build_mesh, folds
from lora_diffusion_jax.paths import path_of
from tests.small import fast_jit, random_variables, small_config

SHAPE = {"model__channel_mult": (1,), "model__attn_resolutions": (8,), "sampler__num_steps": 3}
CLASSES = {"class_conditional": True, "data__num_classes": 3}
SEEDS = np.arange(5)  # of batches of 4: the last one is padded


def generator_of(**changes):
    """A generator, and variables whose adapters matter."""
    config = small_config(**{**SHAPE, "sampler__batch_size": 4, **changes})
    denoiser = build_denoiser(config)
    x, labels = np.zeros((1, 8, 8, 1), np.float32), np.zeros((1, 3), np.float32)
    given = labels if config.class_conditional else None
    variables = random_variables(denoiser, x, np.float32(1), given)

    def grown(path, value):
        return 30 * value if "lora" in path_of(path) and "up" in path_of(path) else value

    variables = jax.tree_util.tree_map_with_path(grown, variables)
    return build_generator(config, denoiser, build_mesh(config)), variables


def sampled(seeds=SEEDS, classes=None, **changes):
    """The images of the seeds, [N, H, W, C]."""
    generator, variables = generator_of(**changes)
    labels = generator.choose_labels(np.asarray(seeds), classes)
    return np.concatenate([b.images for b in generator.batches(variables, seeds, labels)])


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__adapter": "uc"},
        pytest.param({"lora__adapter": "time", "lora__mode": "only_lora"}, marks=pytest.mark.slow),
        pytest.param(
            {"lora__adapter": "uc", "lora__scale": 0.5, "lora__interval": (0.5, 20.0)},
            marks=pytest.mark.slow,
        ),
        {"lora__adapter": "time_class", **CLASSES},
    ],
)
def test_folded_adapters_give_the_same_images(changes):
    classes = 1 if "class_conditional" in changes else None
    apart, folded = (
        sampled(classes=classes, sampler__fold=fold, **changes).astype(int)
        for fold in ("off", "on")
    )
    assert np.abs(apart - folded).max() <= 1  # rounding may cross a gray level
    base = sampled(classes=classes, **{**changes, "lora__scale": 0.0, "lora__interval": ()})
    assert np.abs(apart - base).max() > 10


def test_images_of_different_classes_are_not_folded():
    generator, variables = generator_of(lora__adapter="class", sampler__fold="on", **CLASSES)
    mixed = list(generator.batches(variables, SEEDS, np.array([0, 1, 2, 0, 1])))
    assert "compiled_shared" not in vars(generator)
    alone = list(generator.batches(variables, SEEDS, np.full(5, 1)))
    assert "compiled_shared" in vars(generator)
    for at in (1, 4):  # those of class 1 are the same images
        whole = [np.concatenate([b.images for b in batches]) for batches in (mixed, alone)]
        assert np.abs(whole[0][at].astype(int) - whole[1][at]).max() <= 1


def test_a_folded_program_has_no_adapters_on_images():
    """Its low-rank maps are multiplied with each other, not with the images' pixels."""
    rank = 2 * 3  # inner channels of all bases

    def maps_of_images(fold):
        generator, variables = generator_of(sampler__fold=fold)
        seeds, row = np.arange(4, dtype=np.uint32), np.zeros((1, 1), np.float32)
        bind = generator.bind_shared
        program = fast_jit(lambda v, s, r: generator.sample(v, s, r, bind=bind))
        text = program.lower(variables, seeds, row).compile().as_text()
        return f"f32[4,8,8,{rank}]" in text or f"f32[256,{rank}]" in text

    assert maps_of_images("off")
    assert not maps_of_images("on")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"sampler__batch_size": 1}, False),
        ({"sampler__batch_size": 1, "sampler__fold": "on"}, True),
        ({"sampler__fold": "off"}, False),
        ({"lora__mode": "baseline", "sampler__fold": "on"}, False),
        ({"guidance__name": "adapters", "guidance__scale": 2.0, "sampler__fold": "on"}, False),
    ],
)
def test_what_is_folded(changes, expected):
    assert folds(small_config(**changes)) is expected
