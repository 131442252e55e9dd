"""Images are functions of their seeds."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lora_diffusion_jax import generate
from lora_diffusion_jax.diffusion.precond import EDM
from lora_diffusion_jax.diffusion.samplers import edm_sampler
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.sharding import make_mesh


def apply(variables, x, sigma, labels):
    """The ideal denoiser of points at the class's mean: 0.1 * class - 0.4 (or the variable)."""
    mean = variables["mean"] if labels is None else (labels @ (0.1 * np.arange(8)) - 0.4)
    return (0.01 * x + sigma**2 * np.float32(1) * mean.reshape(-1, 1, 1, 1)) / (0.01 + sigma**2)


IDEAL = types.SimpleNamespace(apply=apply, precond=EDM())


def make(batch_size=4, num_classes=8, **settings):
    def sampler(denoise, latents, *, key):
        return edm_sampler(denoise, latents, num_steps=6, key=key, **settings)

    return generate.Generator(IDEAL, sampler, (4, 4, 1), num_classes, make_mesh(), batch_size)


VARIABLES = {"mean": np.zeros(1, np.float32)}


def images_of(generator, seeds, classes=None):
    labels = None if classes is None else generator.choose_labels(seeds, classes)
    batches = list(generator.batches(VARIABLES, seeds, labels))
    return generate.Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize("s_churn", [0.0, 30.0])
def test_image_depends_on_its_seed_alone(s_churn):
    """Not on the batch size, the place in the batch, or the padding of a short last one."""
    whole = images_of(make(4, s_churn=s_churn), range(10))
    for size, seeds in ((3, [7, 2, 9, 2]), (16, [9]), (1, [0, 7])):
        part = images_of(make(size, s_churn=s_churn), seeds)
        np.testing.assert_array_equal(part.seeds, seeds)
        np.testing.assert_array_equal(part.labels, whole.labels[seeds])
        # One unit: the compiler may round differently at another batch size.
        assert np.abs(part.images.astype(int) - whole.images[seeds]).max() <= 1
    assert np.ptp(whole.images.reshape(10, -1).mean(1)) > 5


def test_classes_follow_the_request_or_the_seed():
    generator = make()
    drawn = generator.choose_labels(np.arange(4000))
    counts = np.bincount(drawn, minlength=8)
    assert counts.min() > 400  # 500 each, standard deviation 21
    assert counts.max() < 600
    asked = images_of(generator, range(6), [0, 1, 2, 5, 6, 7])
    # The ideal denoiser of class c gives 0.1 c - 0.4 plus what the seed gives: 12.75 units per class.
    first = images_of(generator, range(6), 0)
    apart = (asked.images.astype(float) - first.images).reshape(6, -1).mean(1)
    np.testing.assert_allclose(apart, 12.75 * asked.labels, atol=1)
    np.testing.assert_array_equal(images_of(generator, range(3), 4).labels, 4)


def test_unconditional_images_have_no_label():
    assert (images_of(make(num_classes=0), range(3)).labels == generate.NO_LABEL).all()


@pytest.mark.parametrize(
    ("classes", "num_classes", "words"),
    [(8, 8, "Class 8 does not exist"), (-1, 8, "Class -1"), (0, 0, "unconditional")],
)
def test_impossible_classes_are_refused(classes, num_classes, words):
    with pytest.raises(UserError, match=words):
        images_of(make(num_classes=num_classes), [0], classes)


def test_seed_lists():
    assert generate.parse_seeds("0-3, 7,10-11") == [0, 1, 2, 3, 7, 10, 11]
    for text in ("", "3-1", "a", "1-", "-4", "1,,2", "0x10"):
        with pytest.raises(UserError, match="--seeds"):
            generate.parse_seeds(text)
    with pytest.raises(UserError, match="4294967296"):
        generate.check_seeds([2**32])
    with pytest.raises(UserError, match="No seeds"):
        generate.check_seeds([])


def test_sampler_is_compiled_once():
    """Sample grids during training come from one generator."""
    generator = make()
    images_of(generator, range(6))
    images_of(generator, range(2))
    assert generator.compiled._cache_size() == 1


@pytest.mark.parametrize("text", ["0-99999999999", "4294967296", "0-4294967295"])
def test_seeds_are_bounded_before_they_are_listed(text):
    with pytest.raises(UserError, match="--seeds="):
        generate.parse_seeds(text)


def test_numbers_beyond_any_integer_are_plain_errors():
    with pytest.raises(UserError, match="must lie in"):
        generate.check_seeds([0, 10**30])
    with pytest.raises(UserError, match=f"Class {10**30} does not exist"):
        images_of(make(), [0], 10**30)


_ON_MANY = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from tests.test_generate import images_of, make
import jax
assert len(jax.devices()) == 8
np.save(sys.argv[1], images_of(make(8, s_churn=30.0), range(10)).images)
"""


def test_image_does_not_depend_on_the_number_of_devices(tmp_path):
    path, root = tmp_path / "images.npy", os.getcwd()
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", _ON_MANY, str(path), root],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=root,
    )
    assert len(jax.devices()) == 1
    here = images_of(make(8, s_churn=30.0), range(10)).images
    assert np.abs(np.load(path).astype(int) - here).max() <= 1
