"""Augmentation against the authors' PyTorch code, closed forms and its own guarantees."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.data import transforms
from lora_diffusion_jax.data.augment import (
    EDM_TRAINING,
    AugmentConfig,
    Draws,
    augment,
    draw,
    draws_from_raw,
)
from lora_diffusion_jax.errors import UserError
from tests.small import ROOT, fast_compile_env

GOLDEN = Path(__file__).parents[1] / "golden" / "augment_small.npz"
EVERYTHING = AugmentConfig(
    **{field.name: 1.0 for field in dataclasses.fields(AugmentConfig) if field.default == 0},
    p=0.6,
)
apply = jax.jit(augment)


def smooth_images(batch: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.uniform(-1, 1, [batch, 4, 4, channels]).astype(np.float32)
    return np.asarray(jax.image.resize(coarse, [batch, height, width, channels], "cubic"))


def one(name: str, value: list, **settings: float) -> Draws:
    """Draws of one transformation with the given parameters."""
    config = AugmentConfig(**{name: 1.0}, **settings)
    return Draws({name: jnp.asarray(value, jnp.float32)}, config)


@pytest.mark.parametrize(
    "run", ["train_p0.12_16", "train_p1_16", "train_p1_32", "all_p0.6_16", "gray_12x20"]
)
def test_recorded_draws_give_the_reference_images_and_labels(run):
    data = np.load(GOLDEN)
    raw = [data[name] for name in sorted(data.files) if name.startswith(f"{run}/raw/")]
    draws = draws_from_raw(raw, AugmentConfig(**json.loads(str(data[f"{run}/settings"]))))
    images, labels = apply(data[f"{run}/images_u8"].astype(np.float32) / 127.5 - 1, draws)
    # float32 positions of up to 200 half pixels; measured 4e-6, white noise (gray_12x20) 9e-6
    np.testing.assert_allclose(images, data[f"{run}/images"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(labels, data[f"{run}/labels"], rtol=0, atol=1e-6)


def test_zero_probability_is_the_identity_without_work():
    images = smooth_images(2, 8, 8)
    draws = draw(jax.random.key(0), 2, p=0)
    augmented, labels = augment(images, draws)
    assert augmented is images
    assert labels.shape == (2, 9)
    assert not labels.any()


def test_nothing_drawn_changes_nothing():
    config = dataclasses.replace(EVERYTHING, p=1e-9)
    images = np.random.default_rng(1).uniform(-1, 1, [4, 10, 10, 3]).astype(np.float32)
    augmented, labels = apply(images, draw(jax.random.key(0), 4, config=config))
    # the filters are orthonormal: up and down again is the identity up to rounding
    np.testing.assert_allclose(augmented, images, rtol=0, atol=1e-5)
    assert labels.shape == (4, 19)
    assert not labels.any()


def test_pixel_moves_are_exact():
    images = smooth_images(4, 6, 6)
    for name, move in (("xflip", np.fliplr), ("yflip", np.flipud)):
        moved, labels = apply(images, one(name, [1, 0, 1, 0]))
        np.testing.assert_array_equal(moved[::2], [move(image) for image in images[::2]])
        np.testing.assert_array_equal(moved[1::2], images[1::2])
        np.testing.assert_array_equal(labels[:, 0], [1, 0, 1, 0])
    turned, _ = apply(images, one("rotate_int", [0, 1, 2, 3]))
    np.testing.assert_array_equal(turned, [np.rot90(image, k) for k, image in enumerate(images)])


def padded_shift(image: np.ndarray, right: int, down: int) -> np.ndarray:
    height, width, _ = image.shape
    padded = np.pad(image, [(9, 9), (9, 9), (0, 0)], "reflect")
    return padded[9 - down : 9 - down + height, 9 - right : 9 - right + width]


def test_whole_pixel_shift_brings_in_the_reflection():
    images = smooth_images(3, 10, 12)
    shifts = [(3, 0), (-6, 5), (2, -4)]  # right, up; the range is half the image
    shifted, labels = apply(
        images, one("translate_int", [[x / 6, y / 5] for x, y in shifts], translate_int_max=0.5)
    )
    expected = [padded_shift(image, x, -y) for image, (x, y) in zip(images, shifts, strict=True)]
    np.testing.assert_array_equal(shifted, expected)
    np.testing.assert_allclose(labels, [[x / 6, y / 5] for x, y in shifts], rtol=1e-6)


def test_fractional_shift_by_whole_pixels_is_a_shift():
    images = smooth_images(3, 10, 12)
    shifts = [(3, 0), (-6, 5), (2, -4)]  # right, down
    draws = one("translate_frac", [[x / 6, y / 5] for x, y in shifts], translate_frac_std=0.5)
    expected = [padded_shift(image, x, y) for image, (x, y) in zip(images, shifts, strict=True)]
    np.testing.assert_allclose(apply(images, draws)[0], expected, rtol=0, atol=1e-5)


def test_warps_move_content_as_their_names_say():
    """Slow waves, evaluated at the transformed positions: resampling errors are second order."""
    size, angle = 32, 0.5
    y, x = np.mgrid[:size, :size] - (size - 1) / 2

    def wave(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.cos(0.15 * x) + np.sin(0.1 * y))[None, :, :, None].astype(np.float32)

    cos, sin = np.cos(angle), np.sin(angle)
    cases = (
        (one("scale", [5.0]), wave(x / 2, y / 2)),  # std 0.2: doubled
        (one("rotate_frac", [angle]), wave(cos * x - sin * y, sin * x + cos * y)),
        (one("aniso", [[2.5, 0.0]]), wave(x / 2**0.5, y * 2**0.5)),
        (one("aniso", [[2.5, np.pi / 2]]), wave(x * 2**0.5, y / 2**0.5)),
        (one("translate_frac", [[0.5, -1.0]]), wave(x - 2, y + 4)),
    )
    inner = np.s_[:, 12:20, 12:20]  # away from reflections
    for draws, expected in cases:
        moved, _ = apply(wave(x, y), draws)
        np.testing.assert_allclose(moved[inner], expected[inner], rtol=0, atol=0.02)


def test_both_ways_to_interpolate_agree_even_far_outside():
    images = np.random.default_rng(2).uniform(-1, 1, [6, 9, 12, 2]).astype(np.float32)
    affine = np.random.default_rng(3).normal(0, 1, [6, 2, 3]).astype(np.float32)
    affine[:, :, 2] *= 12  # pixels: reflections, and the zeros beyond them
    positions = transforms.sample_positions(affine, 9, 12)
    ways = [
        jax.jit(sample)(images, *positions)
        for sample in (transforms.sample_by_gather, transforms.sample_by_products)
    ]
    assert (ways[0] == 0).any()
    np.testing.assert_allclose(*ways, rtol=0, atol=2e-5)  # rounding of the order of summation


def test_colours_have_their_closed_forms():
    images = np.random.default_rng(4).uniform(-1, 1, [2, 4, 4, 3]).astype(np.float32)
    gray = images.mean(-1, keepdims=True)
    third = 2 * np.pi / 3  # red becomes green
    cases = (
        (one("brightness", [1.0, -2.0]), images + np.reshape([0.2, -0.4], [2, 1, 1, 1])),
        (one("contrast", [1.0, -2.0]), images * np.reshape([2**0.5, 0.5], [2, 1, 1, 1])),
        (one("lumaflip", [1, 1]), images - 2 * gray),
        (one("hue", [third, third]), np.roll(images, 1, axis=-1)),
        (one("saturation", [1.0, 1.0]), gray + 2 * (images - gray)),
    )
    for draws, expected in cases:
        np.testing.assert_allclose(apply(images, draws)[0], expected, rtol=0, atol=1e-6)


def test_transformations_happen_as_often_as_asked():
    count, p = 20_000, 0.12
    draws = jax.jit(lambda key: draw(key, count, p))(jax.random.key(1)).values
    shares = {
        name: float((value.reshape(count, -1) != 0).any(-1).mean()) for name, value in draws.items()
    }
    # xflip ignores p; half of the flips that happen are none; an anisotropic axis is turned half
    # the time, its strength is never 0
    expected = dict.fromkeys(draws, p) | {"xflip": 0.5, "yflip": p / 2}
    for name, share in shares.items():
        error = (expected[name] * (1 - expected[name]) / count) ** 0.5
        assert abs(share - expected[name]) < 4 * error, name
    strength = draws["scale"][draws["scale"] != 0]
    assert abs(strength.std() - 1) < 4 * (2 * strength.size) ** -0.5
    turned = (draws["aniso"][:, 1] != 0).sum() / (draws["aniso"][:, 0] != 0).sum()
    assert abs(turned - 0.5) < 4 * 0.5 * (p * count) ** -0.5


def test_a_sample_does_not_depend_on_its_batch_or_on_other_transformations():
    key, images = jax.random.key(2), smooth_images(8, 12, 12)
    drawn = jax.jit(draw, static_argnames=("batch", "p", "config"))
    draws = drawn(key, 8, p=1)
    for name, value in drawn(key, 3, p=1).values.items():
        np.testing.assert_array_equal(value, draws.values[name][:3])
    for name, value in drawn(key, 8, p=1, config=EVERYTHING).values.items():
        if name in draws.values:  # at p = 1 all gates are open
            np.testing.assert_array_equal(value, draws.values[name])
    whole, labels = apply(images, draws)
    part, part_labels = apply(images[2:5], jax.tree.map(lambda leaf: leaf[2:5], draws))
    np.testing.assert_allclose(part, whole[2:5], rtol=0, atol=1e-6)  # products may sum otherwise
    np.testing.assert_allclose(part_labels, labels[2:5], rtol=0, atol=1e-7)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lora_diffusion_jax.data.augment import augment, draw
assert jax.device_count() == 4
key, images = jax.random.key(0), jax.random.uniform(jax.random.key(1), (16, 8, 8, 3))
step = lambda images, key: augment(images, draw(key, 16, p=0.9))
alone = jax.jit(step)(images, key)
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, P(("data", "fsdp")))
sharded = jax.jit(step, in_shardings=(rows, None), out_shardings=rows)
spread = sharded(jax.device_put(images, rows), key)
for a, b in zip(alone, spread):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
text = sharded.lower(images, key).compile().as_text()
assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute("))
print("done")
"""


def test_a_sharded_batch_gives_the_same_without_communication():
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=ROOT,
        env=fast_compile_env("--xla_force_host_platform_device_count=4"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


def test_float32_stays_float32_under_strict_promotion_and_x64():
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        for channels in (1, 3):
            images = jax.ShapeDtypeStruct([2, 6, 6, channels], np.float32)
            both = jax.eval_shape(
                lambda key, images: augment(images, draw(key, 2, config=EVERYTHING)),
                jax.random.key(0),
                images,
            )
            assert [array.dtype for array in both] == [np.float32, np.float32]


def test_labels_are_named():
    assert EDM_TRAINING.augment_dim == 9
    assert EDM_TRAINING.label_names == (
        "xflip",
        "yflip",
        "scale",
        "rotate_frac cos - 1",
        "rotate_frac sin",
        "aniso cos",
        "aniso sin",
        "translate_frac x",
        "translate_frac y",
    )


def test_mistakes_are_named():
    draws = jax.jit(lambda: draw(jax.random.key(0), 2, config=EVERYTHING))()
    cases = (
        (lambda: draw(jax.random.key(0), 2, p=1.5), "augment.p is 1.5; expected 0 to 1"),
        (lambda: AugmentConfig(hue=-1), "hue is -1"),
        (lambda: augment(np.zeros([3, 8, 8, 3], np.float32), draws), "[2, height, width"),
        (lambda: augment(np.zeros([2, 8, 1, 3], np.float32), draws), "2 or more"),
        (lambda: augment(np.zeros([2, 8, 8, 3], np.uint8), draws), "are uint8 (2, 8, 8, 3)"),
        (lambda: augment(np.zeros([2, 8, 6, 3], np.float32), draws), "square"),
        (lambda: augment(np.zeros([2, 8, 8, 4], np.float32), draws), "3 channels"),
    )
    for mistake, words in cases:
        with pytest.raises(UserError) as caught:
            mistake()
        assert words in str(caught.value)
