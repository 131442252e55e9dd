"""Preconditioning: the raw network F becomes the denoiser D(x; sigma) (Karras et al. 2022, table 1).

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import AugmentLabels, Images, Labels, Sigma
from lora_diffusion_jax.errors import UserError


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each of sigma's shape."""

    skip: Array
    out: Array
    input: Array
    noise: Array


@dataclasses.dataclass(frozen=True)
class EDM:
    """EDM's own: unit variance in and out, sigma_data the standard deviation of the data."""

    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float = float("inf")
    out_factor: ClassVar[int] = 1

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = s_d^2/(s^2+s_d^2), c_out = s s_d/sqrt(s^2+s_d^2), c_noise = ln(s)/4."""
        total = jnp.square(sigma) + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / jnp.sqrt(total),
            input=1 / jnp.sqrt(total),
            noise=jnp.log(sigma) / 4,
        )

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest noise level the network knows: every one."""
        return np.asarray(sigma, np.float64)


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance preserving (Song et al. 2021): sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    num_steps: int = 1000  # M
    epsilon_t: float = 1e-5
    out_factor: ClassVar[int] = 1

    def sigma(self, t: float) -> float:
        """Noise level at time t in [0, 1]."""
        return float(np.sqrt(np.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t)))

    @property
    def sigma_min(self) -> float:
        """The least noise level of training."""
        return self.sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        """The largest noise level of training."""
        return self.sigma(1.0)

    def time(self, sigma: Sigma) -> Sigma:
        """The inverse of sigma(t)."""
        discriminant = self.beta_min**2 + 2 * self.beta_d * jnp.log(1 + jnp.square(sigma))
        return (jnp.sqrt(discriminant) - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = (M-1) t(s)."""
        return Coefficients(
            skip=jnp.ones_like(sigma),
            out=-sigma,
            input=1 / jnp.sqrt(jnp.square(sigma) + 1),
            noise=(self.num_steps - 1) * self.time(sigma),
        )

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest noise level the network knows: every one."""
        return np.asarray(sigma, np.float64)


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance exploding (Song et al. 2021)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    out_factor: ClassVar[int] = 1

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s/2)."""
        return Coefficients(
            skip=jnp.ones_like(sigma),
            out=sigma,
            input=jnp.ones_like(sigma),
            noise=jnp.log(0.5 * sigma),
        )

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest noise level the network knows: every one."""
        return np.asarray(sigma, np.float64)


@dataclasses.dataclass(frozen=True)
class IDDPM:
    """Improved DDPM's discrete noise levels u_0 > ... > u_M = 0 (Nichol & Dhariwal 2021).

    The network has twice the image's channels out, of which the first half is the prediction.
    """

    c_1: float = 0.001
    c_2: float = 0.008
    num_steps: int = 1000  # M
    table: tuple[float, ...] | None = None  # the levels as a checkpoint holds them; None: computed
    out_factor: ClassVar[int] = 2

    def levels(self) -> np.ndarray:
        """U [M + 1] float32: u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1).

        Computed in float32 step by step as the reference does: its networks were trained on
        those levels, which lie 5e-4 off the float64 ones. Another library's sine still moves them by
        1e-5, so a checkpoint's own table is used where there is one.
        """
        if self.table is not None:
            return np.asarray(self.table, np.float32)
        f32 = np.float32
        j = np.arange(self.num_steps + 1, dtype=np.float32)
        abar = np.sin(f32(0.5 * np.pi) * j / f32(self.num_steps) / f32(self.c_2 + 1)) ** 2
        levels = np.zeros(self.num_steps + 1, np.float32)
        for i in range(self.num_steps, 0, -1):
            ratio = max(abar[i - 1] / abar[i], f32(self.c_1))
            levels[i - 1] = np.sqrt((levels[i] ** 2 + f32(1)) / ratio - f32(1))
        return levels

    @property
    def sigma_min(self) -> float:
        """The least noise level above zero."""
        return float(self.levels()[self.num_steps - 1])

    @property
    def sigma_max(self) -> float:
        """The largest noise level."""
        return float(self.levels()[0])

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = M-1 - argmin_j |u_j - s|."""
        index = jnp.argmin(jnp.abs(sigma[..., None] - self.levels()), axis=-1)
        return Coefficients(
            skip=jnp.ones_like(sigma),
            out=-sigma,
            input=1 / jnp.sqrt(jnp.square(sigma) + 1),
            noise=(self.num_steps - 1 - index).astype(jnp.float32),
        )

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest of the levels u."""
        levels = self.levels()
        distance = np.abs(np.asarray(sigma, np.float32)[..., None] - levels)
        return levels[np.argmin(distance, axis=-1)].astype(np.float64)


Precond = EDM | VP | VE | IDDPM
PRECONDS = {"edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM}


class Denoiser(nn.Module):
    """A raw network with its preconditioning: D(x; sigma), the seam of everything above.

    Attributes:
        model: F(c_in x, c_noise, class_labels, augment_labels, train), possibly with LoRA attached.
        precond: the coefficients.
        label_dim: classes of the model, 0 for none.
    """

    model: nn.Module
    precond: Precond = EDM()
    label_dim: int = 0

    @property
    def sigma_min(self) -> float:
        """The least noise level the network supports."""
        return self.precond.sigma_min

    @property
    def sigma_max(self) -> float:
        """The largest noise level the network supports."""
        return self.precond.sigma_max

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest noise level the network supports, in float64."""
        return self.precond.round_sigma(sigma)

    def __call__(
        self,
        x: Images,
        sigma: Sigma,
        class_labels: Labels | None = None,
        augment_labels: AugmentLabels | None = None,
        train: bool = False,
    ) -> Images:
        """Returns the expected clean image [B, H, W, C] float32.

        Args:
            x: noisy images, clean image plus sigma times unit noise.
            sigma: noise level, [] for all images or [B]; what depends on it alone is then
                computed once for the batch.
            class_labels: [B, label_dim] one-hot or mixtures; None stands for all zeros.
            augment_labels: [B, augment_dim] or None.
            train: dropout on, from the rng stream `dropout`.
        """
        x = jnp.asarray(x, jnp.float32)
        sigma = jnp.asarray(sigma, jnp.float32).reshape(-1)
        if sigma.shape[0] not in (1, x.shape[0]):
            raise UserError(
                f"sigma has {sigma.shape[0]} values for {x.shape[0]} images; give one, or one each."
            )
        class_labels = check_labels(class_labels, self.label_dim, x.shape[0])
        c = self.precond.coefficients(sigma)
        skip, out, scale = (v[:, None, None, None] for v in (c.skip, c.out, c.input))
        raw = self.model(scale * x, c.noise, class_labels, augment_labels, train)
        return skip * x + out * raw[..., : x.shape[-1]].astype(jnp.float32)


def check_labels(
    class_labels: Float[Array, "B label_dim"] | None, label_dim: int, batch: int
) -> Float[Array, "B label_dim"] | None:
    """Returns labels that fit the network; None for networks without classes.

    Raises:
        UserError: labels of another number of classes, not one row per image, or class ids.
    """
    if class_labels is None or not label_dim:
        return None
    labels = jnp.asarray(class_labels)
    ids = labels.ndim < 2 and jnp.issubdtype(labels.dtype, jnp.integer)
    if ids or labels.shape not in ((label_dim,), (1, label_dim), (batch, label_dim)):
        raise UserError(
            f"class_labels has shape {labels.shape} and type {labels.dtype}; this network takes "
            f"one-hot labels or mixtures of shape ({batch}, {label_dim}): jax.nn.one_hot(ids, "
            f"{label_dim}) for class ids."
        )
    return labels.astype(jnp.float32).reshape(-1, label_dim)
