"""Non-leaking augmentation (EDM, appendix F.2): settings, random draws, and their application.

The transformations of Karras et al. 2020, "Training Generative Adversarial Networks with Limited
Data", with EDM's labels: the network is told what was done, so what it generates is not augmented.
Drawing and applying are two steps; the draws are a pytree that shards with the images.

    draws = draw(key, batch=512)                  # EDM's training set of transformations, p = 0.12
    images, labels = augment(images, draws)       # [512, H, W, C], [512, 9]
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import AugmentLabels, Images, Key
from lora_diffusion_jax.data import transforms
from lora_diffusion_jax.errors import UserError

# For each transformation, in the order of EDM's AugmentPipe: the random numbers of a sample (kind
# and count) and the names of its labels. A bit is 0 or 1, a quarter 0 to 3. The last number gates
# the transformation; in aniso that is the third, and the last one gates the turn of its axis.
_NORMAL, _UNIFORM, _BIT, _QUARTER = ("normal", 1), ("uniform", 1), ("bit", 1), ("quarter", 1)
_TRANSFORMATIONS = {
    "xflip": ((_BIT, _UNIFORM), ("xflip",)),
    "yflip": ((_BIT, _UNIFORM), ("yflip",)),
    "rotate_int": ((_QUARTER, _UNIFORM), ("rotate_int x", "rotate_int y")),
    "translate_int": ((("uniform", 2), _UNIFORM), ("translate_int x", "translate_int y")),
    "scale": ((_NORMAL, _UNIFORM), ("scale",)),
    "rotate_frac": ((_UNIFORM, _UNIFORM), ("rotate_frac cos - 1", "rotate_frac sin")),
    "aniso": ((_NORMAL, _UNIFORM, _UNIFORM, _UNIFORM), ("aniso cos", "aniso sin")),
    "translate_frac": ((("normal", 2), _UNIFORM), ("translate_frac x", "translate_frac y")),
    "brightness": ((_NORMAL, _UNIFORM), ("brightness",)),
    "contrast": ((_NORMAL, _UNIFORM), ("contrast",)),
    "lumaflip": ((_BIT, _UNIFORM), ("lumaflip",)),
    "hue": ((_UNIFORM, _UNIFORM), ("hue cos - 1", "hue sin")),
    "saturation": ((_NORMAL, _UNIFORM), ("saturation",)),
}
_GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
_COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Which transformations may happen to an image, how often, and how strongly.

    A transformation with multiplier m happens to a sample with probability min(1, m * p),
    independently of the others; m = 0 leaves it and its labels out. (A flip or a quarter turn
    that happens is still drawn uniformly, so it may leave the image as it is.)
    """

    p: float = 1.0  # in [0, 1]; 0 is the identity, at no cost

    # pixel moves: multipliers, and their ranges
    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0  # quarter turns; square images only
    translate_int: float = 0.0
    translate_int_max: float = 0.125  # of the image's size; labels are in units of it

    # geometry
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    scale_std: float = 0.2  # of log2
    rotate_frac_max: float = 1.0  # in half turns, either way
    aniso_std: float = 0.2  # of log2
    aniso_rotate_prob: float = 0.5  # otherwise along the image's axes
    translate_frac_std: float = 0.125  # of the image's size

    # colour
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness_std: float = 0.2  # in units of the pixels
    contrast_std: float = 0.5  # of log2
    hue_max: float = 1.0  # in half turns, either way
    saturation_std: float = 1.0  # of log2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf or (field.name == "p" and value > 1):
                expected = "0 to 1" if field.name == "p" else "a finite number of at least 0"
                raise UserError(f"augment.{field.name} is {value}; expected {expected}.")

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the transformations that can happen, in the order of draws and labels."""
        return tuple(name for name in _TRANSFORMATIONS if getattr(self, name))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The meaning of each column of the labels."""
        return tuple(label for name in self.active for label in _TRANSFORMATIONS[name][1])

    @property
    def augment_dim(self) -> int:
        """Number of columns of the labels: the network's augment_dim."""
        return len(self.label_names)


# EDM's training settings (train.py): a horizontal flip of every second image at any p, 9 labels.
EDM_TRAINING = AugmentConfig(
    p=0.12, xflip=1e8, yflip=1.0, scale=1.0, rotate_frac=1.0, aniso=1.0, translate_frac=1.0
)


@flax.struct.dataclass
class Draws:
    """The random draws of one batch: a pytree whose leaves have the batch first.

    values maps each active transformation to its parameters, all 0 where it does not happen:
    xflip, yflip, lumaflip [B] 0 or 1; rotate_int [B] 0 to 3 quarter turns; translate_int [B, 2]
    in [-1, 1]; scale, brightness, contrast, saturation [B] and translate_frac [B, 2] unit
    normals; rotate_frac, hue [B] radians; aniso [B, 2] a unit normal and radians. Empty at p = 0.
    """

    values: dict[str, Array]
    config: AugmentConfig = flax.struct.field(pytree_node=False)


def draw(
    key: Key, batch: int, p: float | None = None, config: AugmentConfig = EDM_TRAINING
) -> Draws:
    """Draws what happens to each image of a batch.

    Sample i depends on fold_in(key, i) alone: not on the batch size, the devices, or on which
    other transformations are on.

    Args:
        key: a typed PRNG key.
        batch: number of images, B.
        p: replaces config.p, which is 0.12 in EDM's training settings.
        config: the settings.

    Raises:
        UserError: p is not in [0, 1].
    """
    config = config if p is None else dataclasses.replace(config, p=p)
    if config.p == 0:
        return Draws({}, config)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    raw = jax.vmap(_raw_sample)(keys)
    return Draws({name: _parameters(name, raw[name], config) for name in config.active}, config)


def draws_from_raw(raw: Sequence[np.ndarray], config: AugmentConfig = EDM_TRAINING) -> Draws:
    """Builds draws from random numbers recorded in the reference implementation.

    Args:
        raw: the results of torch's randint, rand and randn in the order of EDM's AugmentPipe, which
            is that of the table above: [N, ...] with trailing ones, or [2, N, ...] for a pair.
        config: the settings of that pipe; AugmentConfig has its argument names.

    Raises:
        ValueError: the number of arrays does not fit the settings.
    """
    counts = [count for name in config.active for _, count in _TRANSFORMATIONS[name][0]]
    rows = (np.reshape(array, [count, -1]).T for array, count in zip(raw, counts, strict=True))
    arrays = iter([jnp.float32(r if r.shape[1] > 1 else r[:, 0]) for r in rows])  # [N] or [N, 2]
    grouped = {name: [next(arrays) for _ in _TRANSFORMATIONS[name][0]] for name in config.active}
    values = {name: _parameters(name, grouped[name], config) for name in grouped}
    return Draws(values if config.p else {}, config)


def _raw_sample(key: Key) -> dict[str, list[Array]]:
    """One sample's random numbers for every transformation, active or not."""
    entries = [entry for numbers, _ in _TRANSFORMATIONS.values() for entry in numbers]
    count_normal = sum(count for kind, count in entries if kind == "normal")
    count_uniform = sum(count for kind, count in entries if kind != "normal")
    normal_key, uniform_key = jax.random.split(key)
    normal = iter(jax.random.normal(normal_key, [count_normal], jnp.float32))
    uniform = iter(jax.random.uniform(uniform_key, [count_uniform], jnp.float32))

    def take(kind: str, count: int) -> Array:
        numbers = [next(normal if kind == "normal" else uniform) for _ in range(count)]
        if kind in ("bit", "quarter"):
            numbers = [jnp.floor(number * (2 if kind == "bit" else 4)) for number in numbers]
        return numbers[0] if count == 1 else jnp.stack(numbers)

    return {
        name: [take(*entry) for entry in numbers] for name, (numbers, _) in _TRANSFORMATIONS.items()
    }


def _parameters(name: str, raw: Sequence[Array], config: AugmentConfig) -> Array:
    """Parameters of one transformation from its random numbers, zero where it does not happen."""

    def angle(uniform: Array, half_turns: float = 1.0) -> Array:
        return (2 * uniform - 1) * (math.pi * half_turns)

    value, gate = raw[0], raw[-1]
    if name == "aniso":
        _, uniform, gate, turned = raw
        axis = jnp.where(turned < config.aniso_rotate_prob, angle(uniform), 0.0)
        value = jnp.stack([value, axis], axis=-1)
    elif name == "translate_int":
        value = 2 * value - 1  # [0, 1) -> [-1, 1)
    elif name == "rotate_frac":
        value = angle(value, config.rotate_frac_max)
    elif name == "hue":
        value = angle(value, config.hue_max)
    happens = gate < getattr(config, name) * config.p
    return jnp.where(happens if value.ndim == 1 else happens[:, None], value, 0.0)


def augment(images: Images, draws: Draws) -> tuple[Images, AugmentLabels]:
    """Applies the draws.

    Each image is transformed on its own, with shapes that do not depend on the draws: pixel moves
    first, then one affine warp, then one affine map of its colours. The warp also resamples images
    whose parameters are zero, which changes them by about 1e-6. With p = 0 it is the identity.

    Args:
        images: [B, H, W, C] float32 in [-1, 1]. Results may lie outside.
        draws: from `draw` or `draws_from_raw`, for the same batch.

    Returns:
        The images [B, H, W, C], and labels [B, draws.config.augment_dim] float32, zero where nothing
        was done. The columns are named by draws.config.label_names.

    Raises:
        UserError: the images do not fit the draws or the transformations.
    """
    if not draws.values:
        return images, jnp.zeros([images.shape[0], draws.config.augment_dim], jnp.float32)
    _check(images, draws)
    draws = _sharded_like(images, draws)
    _, height, width, _ = images.shape
    images = _move_pixels(images, draws)
    if any(name in draws.values for name in _GEOMETRIC):
        images = transforms.warp(images, _inverse_affine(draws, height, width))
    if any(name in draws.values for name in _COLOUR):
        images = transforms.recolour(images, _colour_matrix(draws))
    columns = [
        column for name in draws.config.active for column in _labels(name, draws, height, width)
    ]
    return images, jnp.stack([column.astype(jnp.float32) for column in columns], axis=-1)


def _check(images: Images, draws: Draws) -> None:
    batch = next(iter(draws.values.values())).shape[0]
    fits = images.ndim == 4 and images.shape[0] == batch and min(images.shape[1:3]) >= 2
    if not (fits and jnp.issubdtype(images.dtype, jnp.floating)):
        raise UserError(
            f"images to augment are {images.dtype} {images.shape}; these draws need float32 "
            f"[{batch}, height, width, channels] in [-1, 1], height and width 2 or more."
        )
    _, height, width, channels = images.shape
    if "rotate_int" in draws.values and height != width:
        raise UserError(
            f"quarter turns need square images, these are {height}x{width}; set rotate_int to 0."
        )
    if channels not in (1, 3) and any(name in draws.values for name in _COLOUR):
        raise UserError(
            f"colour transformations need 3 channels (RGB) or 1 (gray), these images have "
            f"{channels}; set {', '.join(_COLOUR)} to 0."
        )


def _sharded_like(images: Images, draws: Draws) -> Draws:
    """Gives the draws the images' sharding, which JAX does not do if the mesh's axes are Explicit.

    Adding zeros does it, and costs nothing: XLA removes them.
    """
    zeros = jnp.zeros_like(images[:, 0, 0, 0], jnp.float32)
    return jax.tree.map(lambda value: value + (zeros if value.ndim == 1 else zeros[:, None]), draws)


def _move_pixels(images: Images, draws: Draws) -> Images:
    """Flips, quarter turns and whole-pixel shifts, which change no pixel's value."""
    _, height, width, _ = images.shape
    values = draws.values
    if "xflip" in values or "yflip" in values:
        none = jnp.zeros(images.shape[0], jnp.float32)
        flips = (values.get(name, none) == 1 for name in ("xflip", "yflip"))
        images = transforms.flip(images, *flips)
    if "rotate_int" in values:
        images = transforms.rotate_quarters(images, values["rotate_int"])
    if "translate_int" in values:
        images = transforms.shift(images, *_pixel_shift(draws, height, width))
    return images


def _pixel_shift(draws: Draws, height: int, width: int) -> tuple[Array, Array]:
    """Whole pixels (right, up), each [B]."""
    reach = draws.config.translate_int_max
    shift = draws.values["translate_int"]
    return jnp.round(shift[:, 0] * (width * reach)), jnp.round(shift[:, 1] * (height * reach))


def _inverse_affine(draws: Draws, height: int, width: int) -> transforms.Affine:
    config = draws.config
    zero = jnp.zeros(next(iter(draws.values.values())).shape[0], jnp.float32)
    zeros = jnp.stack([zero, zero], axis=-1)
    values = {"scale": zero, "rotate_frac": zero, "aniso": zeros, "translate_frac": zeros}
    values |= draws.values
    return transforms.inverse_affine(
        scale=jnp.exp2(values["scale"] * config.scale_std),
        angle=values["rotate_frac"],
        stretch=jnp.exp2(values["aniso"][:, 0] * config.aniso_std),
        axis=values["aniso"][:, 1],
        right=values["translate_frac"][:, 0] * (width * config.translate_frac_std),
        down=values["translate_frac"][:, 1] * (height * config.translate_frac_std),
    )


def _colour_matrix(draws: Draws) -> Float[Array, "B 3 4"]:
    """The affine map of RGB: new = matrix[:, :, :3] @ old + matrix[:, :, 3]."""
    config = draws.config
    values = {name: draws.values[name][:, None, None] for name in _COLOUR if name in draws.values}
    batch = next(iter(values.values())).shape[0]
    eye, luma = np.eye(3, dtype=np.float32), np.full([3, 3], 1 / 3, np.float32)
    # The cross product with the gray axis (1, 1, 1) / sqrt(3), for the rotation of the hue.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], np.float32) / np.sqrt(np.float32(3))
    total = jnp.broadcast_to(jnp.eye(3, 4, dtype=jnp.float32), [batch, 3, 4])

    def then(matrix: Float[Array, "B 3 3"] | np.ndarray) -> Float[Array, "B 3 4"]:
        return jnp.einsum("bij,bjk->bik", matrix, total, precision=jax.lax.Precision.HIGHEST)

    if "brightness" in values:
        offset = np.array([0, 0, 0, 1], np.float32) * values["brightness"]
        total = total + config.brightness_std * offset
    if "contrast" in values:
        total = total * jnp.exp2(values["contrast"] * config.contrast_std)
    if "lumaflip" in values:  # inverts the luma, keeps the chroma
        total = then(eye - 2 * luma * values["lumaflip"])
    if "hue" in values:  # Rodrigues' rotation about the gray axis
        cos, sin = jnp.cos(values["hue"]), jnp.sin(values["hue"])
        total = then(luma + cos * (eye - luma) + sin * cross)
    if "saturation" in values:
        strength = jnp.exp2(values["saturation"] * config.saturation_std)
        total = then(luma + (eye - luma) * strength)
    return total


def _labels(name: str, draws: Draws, height: int, width: int) -> list[Array]:
    """The label columns [B] of one transformation: raw draws, not multiplied by their std."""
    value = draws.values[name]
    if name == "rotate_int":  # turns that are neighbours differ in one label
        return list(transforms.quarter_flips(value))
    if name == "translate_int":
        right, up = _pixel_shift(draws, height, width)
        reach = draws.config.translate_int_max
        return [right / (width * reach), up / (height * reach)]
    if name in ("rotate_frac", "hue"):  # - 1: zero where nothing was done
        return [jnp.cos(value) - 1, jnp.sin(value)]
    if name == "aniso":
        strength, axis = value[:, 0], value[:, 1]
        return [strength * jnp.cos(axis), strength * jnp.sin(axis)]
    return [value] if value.ndim == 1 else [value[:, 0], value[:, 1]]
