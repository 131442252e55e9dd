"""What random augmentation does to each image of a batch: the settings, and the draws."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_diffusion_jax.array_types import Key
from lora_diffusion_jax.errors import UserError

# Raw random numbers of each transformation in the reference's order of calls: kind, and how many a
# sample. 'bit' and 'quarter' are integers below 2 and 4. The third one of aniso, the last one of
# the others, decides whether the transformation happens.
_RAW = {
    "xflip": (("bit", 1), ("uniform", 1)),
    "yflip": (("bit", 1), ("uniform", 1)),
    "rotate_int": (("quarter", 1), ("uniform", 1)),
    "translate_int": (("uniform", 2), ("uniform", 1)),
    "scale": (("normal", 1), ("uniform", 1)),
    "rotate_frac": (("uniform", 1), ("uniform", 1)),
    "aniso": (("normal", 1), ("uniform", 1), ("uniform", 1), ("uniform", 1)),
    "translate_frac": (("normal", 2), ("uniform", 1)),
    "brightness": (("normal", 1), ("uniform", 1)),
    "contrast": (("normal", 1), ("uniform", 1)),
    "lumaflip": (("bit", 1), ("uniform", 1)),
    "hue": (("uniform", 1), ("uniform", 1)),
    "saturation": (("normal", 1), ("uniform", 1)),
}
_LABELS = {
    "xflip": ("xflip",),
    "yflip": ("yflip",),
    "rotate_int": ("rotate_int x", "rotate_int y"),
    "translate_int": ("translate_int x", "translate_int y"),
    "scale": ("scale",),
    "rotate_frac": ("rotate_frac cos - 1", "rotate_frac sin"),
    "aniso": ("aniso cos", "aniso sin"),
    "translate_frac": ("translate_frac x", "translate_frac y"),
    "brightness": ("brightness",),
    "contrast": ("contrast",),
    "lumaflip": ("lumaflip",),
    "hue": ("hue cos - 1", "hue sin"),
    "saturation": ("saturation",),
}


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What may happen to an image, how often, and how strongly.

    A transformation with multiplier m happens to a sample with probability min(1, m * p),
    independently of the others; m = 0 leaves it, and its labels, out. (A flip or a quarter turn
    that "happens" is still drawn uniformly, and may be none.)
    """

    p: float = 1.0  # in [0, 1]; 0: identity, at no cost

    # pixel moves: multipliers, and their ranges
    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0  # quarter turns; square images only
    translate_int: float = 0.0
    translate_int_max: float = 0.125  # of the image's size

    # geometry
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    scale_std: float = 0.2  # of log2
    rotate_frac_max: float = 1.0  # of the half turn to either side
    aniso_std: float = 0.2  # of log2
    aniso_rotate_prob: float = 0.5  # else along the image's axes
    translate_frac_std: float = 0.125  # of the image's size

    # colour
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness_std: float = 0.2  # in units of the pixels
    contrast_std: float = 0.5  # of log2
    hue_max: float = 1.0  # of the half turn to either side
    saturation_std: float = 1.0  # of log2

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise UserError(
                f"The augmentation probability p is {self.p}; choose a number from 0 to 1."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise UserError(
                    f"Augmentation setting {field.name} is {value}; it must be finite, 0 or more."
                )
        if self.translate_int and not self.translate_int_max:
            raise UserError(
                "translate_int is on but translate_int_max is 0, so its labels have no scale; "
                "set translate_int_max above 0 or translate_int to 0."
            )

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the transformations that can happen, in the order of draws and labels."""
        return tuple(name for name in _RAW if getattr(self, name))

    @property
    def label_names(self) -> tuple[str, ...]:
        """What each column of the labels means."""
        return tuple(label for name in self.active for label in _LABELS[name])

    @property
    def label_dim(self) -> int:
        """Number of columns of the labels: the network's augment_dim."""
        return len(self.label_names)


# EDM's training settings (train.py): a horizontal flip of every second image at any p, 9 labels.
EDM_TRAINING = AugmentConfig(
    p=0.12, xflip=1e8, yflip=1.0, scale=1.0, rotate_frac=1.0, aniso=1.0, translate_frac=1.0
)


@flax.struct.dataclass
class Draws:
    """What one batch drew: a pytree whose leaves have the batch first.

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
    """Draws what happens to each of `batch` images.

    Sample i depends on fold_in(key, i) alone: not on the batch size, the devices, or on which
    other transformations are on. p replaces config.p (0.12 in EDM's training settings).

    Raises:
        UserError: p is not in [0, 1].
    """
    config = config if p is None else dataclasses.replace(config, p=p)
    if config.p == 0:
        return Draws({}, config)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    raw = jax.vmap(_raw_sample)(keys)
    return Draws(_gate({name: raw[name] for name in config.active}, config), config)


def draws_from_raw(
    raw: Sequence[np.ndarray],
    config: AugmentConfig = EDM_TRAINING,
    p: float | None = None,
) -> Draws:
    """Builds draws from random numbers recorded in the reference implementation.

    Args:
        raw: the results of torch's randint, rand and randn in the order of EDM's AugmentPipe,
            shapes as there: [N, ...] or [2, N, ...] or [1, N, ...] with trailing ones. E.g. for
            EDM's training settings 14 arrays: two for each flip (bit, gate), scale (normal,
            gate), rotate_frac (uniform, gate), aniso (normal, angle, gate, rotation gate) and
            translate_frac (normal [2, N], gate [1, N]).
        config: the settings of that pipe; AugmentConfig has its argument names.
        p: replaces config.p.

    Raises:
        UserError: the number of arrays, or of their elements, does not fit the settings.
    """
    config = config if p is None else dataclasses.replace(config, p=p)
    wanted = [(name, kind, size) for name in config.active for kind, size in _RAW[name]]
    if len(raw) != len(wanted):
        raise UserError(
            f"Found {len(raw)} recorded arrays, but {len(wanted)} are drawn for "
            f"{', '.join(config.active) or 'no transformation'}; check config and the recording."
        )
    if config.p == 0 or not raw:
        return Draws({}, config)
    arrays = [np.asarray(array, np.float32) for array in raw]
    batch = arrays[0].size // wanted[0][2]
    grouped = {name: [] for name in config.active}
    for number, (array, (name, kind, size)) in enumerate(zip(arrays, wanted, strict=True)):
        if array.size != batch * size:
            raise UserError(
                f"Recorded array {number} ({kind} of {name}) has shape {array.shape}; "
                f"{size} number(s) for each of {batch} images were expected."
            )
        rows = array.reshape(batch) if size == 1 else array.reshape(size, batch).T
        grouped[name].append(jnp.asarray(rows))
    return Draws(_gate(grouped, config), config)


def _raw_sample(key: Key) -> dict[str, list[Array]]:
    """One sample's random numbers for every transformation, active or not."""
    entries = [entry for entries in _RAW.values() for entry in entries]
    count_normal = sum(size for kind, size in entries if kind == "normal")
    count_uniform = sum(size for kind, size in entries if kind != "normal")
    normal_key, uniform_key = jax.random.split(key)
    normal = iter(jax.random.normal(normal_key, [count_normal], jnp.float32))
    uniform = iter(jax.random.uniform(uniform_key, [count_uniform], jnp.float32))

    def take(kind: str, size: int) -> Array:
        source: Iterator[Array] = normal if kind == "normal" else uniform
        numbers = [next(source) for _ in range(size)]
        if kind in ("bit", "quarter"):
            numbers = [jnp.floor(number * (2 if kind == "bit" else 4)) for number in numbers]
        return numbers[0] if size == 1 else jnp.stack(numbers)

    return {name: [take(*entry) for entry in entries] for name, entries in _RAW.items()}


def _gate(raw: dict[str, list[Array]], config: AugmentConfig) -> dict[str, Array]:
    """Parameters of each transformation, zero where it does not happen."""

    def angle(uniform: Array, reach: float = 1.0) -> Array:
        return (2 * uniform - 1) * (math.pi * reach)

    def gated(name: str) -> Array:
        value, *others = raw[name]
        if name == "aniso":
            uniform, gate, turned = others
            turn = jnp.where(turned < config.aniso_rotate_prob, angle(uniform), 0.0)
            value = jnp.stack([value, turn], axis=-1)
        else:
            (gate,) = others
        if name == "translate_int":
            value = 2 * value - 1
        elif name == "rotate_frac":
            value = angle(value, config.rotate_frac_max)
        elif name == "hue":
            value = angle(value, config.hue_max)
        happens = gate < getattr(config, name) * config.p
        return jnp.where(happens if value.ndim == 1 else happens[:, None], value, 0.0)

    return {name: gated(name) for name in raw}
