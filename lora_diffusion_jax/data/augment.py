"""Non-leaking augmentation (EDM, appendix F.2): random draws, and their application to images.

The transformations of Karras et al. 2020, "Training Generative Adversarial Networks with Limited
Data", with EDM's labels: the network is told what was done, so what it generates is not augmented.
Drawing and applying are two steps; the draws are a pytree that shards with the images.

    draws = draw(key, batch=512)                  # EDM's training set of transformations, p = 0.12
    images, labels = augment(images, draws)       # [512, H, W, C], [512, 9]
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import AugmentLabels, Images
from lora_diffusion_jax.data import augment_geometry
from lora_diffusion_jax.data.augment_draws import (
    EDM_TRAINING,
    AugmentConfig,
    Draws,
    draw,
    draws_from_raw,
)
from lora_diffusion_jax.errors import UserError

__all__ = ["EDM_TRAINING", "AugmentConfig", "Draws", "augment", "draw", "draws_from_raw"]

_GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
_COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


def augment(images: Images, draws: Draws) -> tuple[Images, AugmentLabels]:
    """Applies the draws.

    Each image is transformed on its own, with shapes that do not depend on the draws: pixel moves
    first, then one affine warp, then one affine map of its colours. The warp also resamples images
    whose parameters are zero, which changes them by about 1e-6. With p = 0 it is the identity.

    Args:
        images: [B, H, W, C] float32 in [-1, 1]. Results may lie outside.
        draws: from `draw` or `draws_from_raw`, for the same batch.

    Returns:
        The images [B, H, W, C], and labels [B, draws.config.label_dim] float32, zero where nothing
        was done. The columns are named by draws.config.label_names.

    Raises:
        UserError: the images do not fit the draws or the transformations.
    """
    config, values = draws.config, draws.values
    if not values:
        return images, jnp.zeros([images.shape[0], config.label_dim], jnp.float32)
    _check(images, draws)
    draws = _like_images(draws, images)
    _, height, width, _ = images.shape
    images = _move_pixels(images, draws)
    if any(name in values for name in _GEOMETRIC):
        images = augment_geometry.warp(images, _inverse_affine(draws, height, width))
    if any(name in values for name in _COLOUR):
        images = _recolour(images, _colour_map(draws))
    columns = [column for name in config.active for column in _labels(name, draws, height, width)]
    return images, jnp.stack([column.astype(jnp.float32) for column in columns], axis=-1)


def _check(images: Images, draws: Draws) -> None:
    batch = next(iter(draws.values.values())).shape[0]
    if images.ndim != 4 or images.shape[0] != batch or min(images.shape[1:3]) < 2:
        raise UserError(
            f"Images to augment have shape {images.shape}; with these draws it must be "
            f"[{batch}, height, width, channels], height and width 2 or more."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"Images to augment are {images.dtype}; convert them to float32 in [-1, 1] first."
        )
    _, height, width, channels = images.shape
    if "rotate_int" in draws.values and height != width:
        raise UserError(
            f"Quarter turns need square images, these are {height} x {width}; set rotate_int to 0."
        )
    if channels not in (1, 3) and any(name in draws.values for name in _COLOUR):
        raise UserError(
            f"Colour transformations need 3 channels (RGB) or 1 (gray), these images have "
            f"{channels}; set {', '.join(_COLOUR)} to 0."
        )


def _like_images(draws: Draws, images: Images) -> Draws:
    """Spreads the draws as the images are, which JAX leaves to us if the mesh's axes are Explicit.

    Adding zeros does it, and costs nothing: XLA removes them.
    """
    zeros = jnp.zeros_like(images[:, 0, 0, 0], jnp.float32)
    return jax.tree.map(lambda value: value + (zeros if value.ndim == 1 else zeros[:, None]), draws)


def _pixel_shift(draws: Draws, height: int, width: int) -> tuple[Array, Array]:
    """Whole pixels [B] to the right and upwards."""
    reach = draws.config.translate_int_max
    shift = draws.values["translate_int"]
    return jnp.round(shift[:, 0] * (width * reach)), jnp.round(shift[:, 1] * (height * reach))


def _move_pixels(images: Images, draws: Draws) -> Images:
    """Flips, quarter turns and whole-pixel shifts, which change no pixel's value."""
    _, height, width, _ = images.shape
    values = draws.values
    if "xflip" in values or "yflip" in values:
        none = jnp.zeros(images.shape[0], jnp.float32)
        flips = (values.get(name, none) == 1 for name in ("xflip", "yflip"))
        images = augment_geometry.flip(images, *flips)
    if "rotate_int" in values:
        images = augment_geometry.rotate_quarters(images, values["rotate_int"])
    if "translate_int" in values:
        images = augment_geometry.shift(images, *_pixel_shift(draws, height, width))
    return images


def _inverse_affine(draws: Draws, height: int, width: int) -> augment_geometry.Affine:
    config = draws.config
    zero = jnp.zeros(next(iter(draws.values.values())).shape[0], jnp.float32)
    zeros = jnp.stack([zero, zero], axis=-1)
    values = {"scale": zero, "rotate_frac": zero, "aniso": zeros, "translate_frac": zeros}
    values |= draws.values
    return augment_geometry.inverse_affine(
        scale=jnp.exp2(values["scale"] * config.scale_std),
        angle=values["rotate_frac"],
        stretch=jnp.exp2(values["aniso"][:, 0] * config.aniso_std),
        axis=values["aniso"][:, 1],
        right=values["translate_frac"][:, 0] * (width * config.translate_frac_std),
        down=values["translate_frac"][:, 1] * (height * config.translate_frac_std),
    )


def _colour_map(draws: Draws) -> Float[Array, "B 3 4"]:
    """The affine map of RGB: new = map[:, :, :3] @ old + map[:, :, 3]."""
    config, values = draws.config, draws.values
    batch = next(iter(values.values())).shape[0]
    eye, luma = np.eye(3, dtype=np.float32), np.full([3, 3], 1 / 3, np.float32)
    cross = np.float32([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(np.float32(3))
    total = jnp.broadcast_to(jnp.eye(3, 4, dtype=jnp.float32), [batch, 3, 4])

    def then(matrix: Float[Array, "B 3 3"]) -> Float[Array, "B 3 4"]:
        return jnp.einsum("bij,bjk->bik", matrix, total, precision=jax.lax.Precision.HIGHEST)

    def per_sample(value: Array) -> Float[Array, "B 1 1"]:
        return value[:, None, None]

    if "brightness" in values:
        offset = np.float32([0, 0, 0, 1]) * per_sample(values["brightness"])
        total = total + config.brightness_std * offset
    if "contrast" in values:
        total = total * per_sample(jnp.exp2(values["contrast"] * config.contrast_std))
    if "lumaflip" in values:
        total = then(eye - 2 * luma * per_sample(values["lumaflip"]))
    if "hue" in values:  # Rodrigues' rotation about the gray axis
        cos, sin = per_sample(jnp.cos(values["hue"])), per_sample(jnp.sin(values["hue"]))
        total = then(luma + cos * (eye - luma) + sin * cross)
    if "saturation" in values:
        strength = per_sample(jnp.exp2(values["saturation"] * config.saturation_std))
        total = then(luma + (eye - luma) * strength)
    return total


def _recolour(images: Images, mapping: Float[Array, "B 3 4"]) -> Images:
    """Applies a map of RGB; a gray image gets the gray of the result: the mean over its rows."""
    if images.shape[-1] == 1:
        mean = mapping.mean(axis=1)  # [B, 4]
        gain, offset = mean[:, :3].sum(axis=-1), mean[:, 3]
        return images * gain[:, None, None, None] + offset[:, None, None, None]
    mixed = jnp.einsum(
        "bhwc,bdc->bhwd", images, mapping[:, :, :3], precision=jax.lax.Precision.HIGHEST
    )
    return mixed + mapping[:, None, None, :, 3]


def _labels(name: str, draws: Draws, height: int, width: int) -> list[Array]:
    """The label columns [B] of one transformation: raw draws, not multiplied by their std."""
    value = draws.values[name]
    if name == "rotate_int":
        return list(augment_geometry.quarter_flips(value))
    if name == "translate_int":
        right, up = _pixel_shift(draws, height, width)
        reach = draws.config.translate_int_max
        return [right / (width * reach), up / (height * reach)]
    if name in ("rotate_frac", "hue"):
        return [jnp.cos(value) - 1, jnp.sin(value)]
    if name == "aniso":
        weight, turn = value[:, 0], value[:, 1]
        return [weight * jnp.cos(turn), weight * jnp.sin(turn)]
    return [value] if value.ndim == 1 else [value[:, 0], value[:, 1]]
