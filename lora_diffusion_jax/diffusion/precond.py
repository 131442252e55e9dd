"""Preconditioning: the raw network F becomes the denoiser D(x; sigma) (Karras et al. 2022, table 1).

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

Each class but DDPM is one row of the table: coefficients, the law of the noise levels in training, their
weight in the loss, and the levels that the network knows. DDPM is the discrete process itself, with the same
parts.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import AugmentLabels, Images, Key, Labels, Sigma
from lora_diffusion_jax.diffusion import discrete, schedules
from lora_diffusion_jax.errors import UserError, choose


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each of sigma's shape."""

    skip: Array
    out: Array
    input: Array
    noise: Array


class Precond(abc.ABC):
    """A row of EDM's table 1, or a discrete process in its form.

    Attributes:
        sigma_min, sigma_max: range of noise levels that the network supports.
        out_factor: channels of the raw network's output for each channel of the image.
    """

    sigma_min: float
    sigma_max: float
    out_factor: ClassVar[int] = 1

    @abc.abstractmethod
    def coefficients(self, sigma: Sigma) -> Coefficients:
        """The coefficients at noise level sigma."""

    @abc.abstractmethod
    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """Noise levels of n training images."""

    @abc.abstractmethod
    def time(self, c_noise: Array) -> Array:
        """The network's noise label as a time in [0, 1] that grows with the noise level."""

    def timestep(self, c_noise: Array, num_timesteps: int) -> Array:
        """The same in [0, num_timesteps]; a process of so many discrete steps gives its step exactly."""
        return num_timesteps * self.time(c_noise)

    def weight(self, sigma: Sigma) -> Sigma:
        """Weight lambda(sigma) of the squared error: 1 / sigma^2."""
        return 1 / jnp.square(sigma)

    def clip(self, sigma_min: float, sigma_max: float) -> tuple[float, float]:
        """The part of [sigma_min, sigma_max] that the network supports."""
        return max(sigma_min, self.sigma_min), min(sigma_max, self.sigma_max)

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest noise level that the network knows, in float64: here every one."""
        return np.asarray(sigma, np.float64)


@dataclasses.dataclass(frozen=True)
class EDM(Precond):
    """EDM's own: unit variance in and out.

    Attributes:
        sigma_data: standard deviation of the data.
        p_mean, p_std: mean and standard deviation of ln sigma in training.
    """

    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.0
    sigma_max: float = float("inf")

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = s_d^2/(s^2+s_d^2), c_out = s s_d/sqrt(s^2+s_d^2), c_noise = ln(s)/4."""
        total = jnp.square(sigma) + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / jnp.sqrt(total),
            input=1 / jnp.sqrt(total),
            noise=jnp.log(sigma) / 4,
        )

    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return jnp.exp(self.p_mean + self.p_std * jax.random.normal(key, (n,)))

    def weight(self, sigma: Sigma) -> Sigma:
        """(s^2 + s_d^2) / (s s_d)^2."""
        return (jnp.square(sigma) + self.sigma_data**2) / jnp.square(sigma * self.sigma_data)

    def time(self, c_noise: Array) -> Array:
        """Linear in ln sigma over [0.002, 80], the range of EDM's sampler."""
        return _uniform(4 * c_noise, 0.002, 80.0)


@dataclasses.dataclass(frozen=True)
class VP(Precond):
    """Variance preserving (Song et al. 2021): sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    num_steps: int = 1000  # M
    epsilon_t: float = 1e-5  # least time of training

    @property
    def schedule(self) -> schedules.Schedule:
        """sigma(t), its derivative and its inverse."""
        return schedules.vp_schedule(self.beta_d, self.beta_min)

    @property
    def sigma_min(self) -> float:
        """The least noise level of training."""
        return float(self.schedule.sigma(self.epsilon_t))

    @property
    def sigma_max(self) -> float:
        """The largest noise level of training."""
        return float(self.schedule.sigma(1.0))

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = (M-1) t(s)."""
        noise = (self.num_steps - 1) * self.schedule.time(sigma)
        return _predicts_noise(sigma, noise)

    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """sigma(t) at t ~ U(epsilon_t, 1)."""
        return self.schedule.sigma(1 + jax.random.uniform(key, (n,)) * (self.epsilon_t - 1))

    def time(self, c_noise: Array) -> Array:
        """The t of sigma(t)."""
        return jnp.clip(c_noise / (self.num_steps - 1), 0, 1)


@dataclasses.dataclass(frozen=True)
class VE(Precond):
    """Variance exploding (Song et al. 2021)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s/2)."""
        one = jnp.ones_like(sigma)
        return Coefficients(skip=one, out=sigma, input=one, noise=jnp.log(0.5 * sigma))

    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """ln sigma ~ U(ln sigma_min, ln sigma_max)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** jax.random.uniform(key, (n,))

    def time(self, c_noise: Array) -> Array:
        """Linear in ln sigma over [sigma_min, sigma_max]."""
        return _uniform(c_noise + np.log(2), self.sigma_min, self.sigma_max)


@dataclasses.dataclass(frozen=True)
class IDDPM(Precond):
    """EDM's reading of iDDPM (table 1), with the discrete noise levels u_0 > ... > u_M = 0.

    To train as Nichol & Dhariwal (2021) do, use `DDPM`.
    The network has twice the image's channels out, of which the first half is the prediction.
    """

    c_1: float = 0.001
    c_2: float = 0.008
    num_steps: int = 1000  # M
    out_factor: ClassVar[int] = 2

    def levels(self) -> np.ndarray:
        """u_0 ... u_M, [M + 1] float32, with the rounding of the reference (`schedules.iddpm_levels`)."""
        return schedules.iddpm_levels(self.c_1, self.c_2, self.num_steps, np.float32)

    @property
    def sigma_min(self) -> float:
        """The least noise level above zero."""
        return float(self.levels()[-2])

    @property
    def sigma_max(self) -> float:
        """The largest noise level."""
        return float(self.levels()[0])

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = M-1 - argmin_j |u_j - s|."""
        index = jnp.argmin(jnp.abs(sigma[..., None] - self.levels()), axis=-1)
        return _predicts_noise(sigma, (self.num_steps - 1 - index).astype(jnp.float32))

    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """One of the levels above zero, all equally likely."""
        levels = jnp.asarray(self.levels()[:-1])
        return levels[jax.random.randint(key, (n,), 0, len(levels))]

    def time(self, c_noise: Array) -> Array:
        """Position of the level among all, 0 for the least."""
        return jnp.clip(c_noise / (self.num_steps - 1), 0, 1)

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest of the levels u, in float64."""
        distance = np.abs(np.asarray(sigma, np.float32)[..., None] - self.levels())
        return self.levels()[np.argmin(distance, axis=-1)].astype(np.float64)


@dataclasses.dataclass(frozen=True)
class DDPM(Precond):
    """The discrete process of DDPM and improved DDPM, with timesteps t = 0 ... T - 1.

    sigma_t = sqrt((1 - abar_t) / abar_t). The network predicts the noise from x_t and the time t 1000 / T.
    With 2C channels out it also chooses the variances of the reverse steps: the second half is for that.

    Attributes:
        schedule: of the betas, `discrete.SCHEDULES`.
        num_steps: T.
        loss: simple, vlb, or hybrid: see `losses.ddpm_loss`.
        rescale_timesteps: False gives the network t itself, as some official checkpoints want.
    """

    schedule: str = "cosine"
    num_steps: int = 4000
    loss: str = "hybrid"
    rescale_timesteps: bool = True
    out_factor: ClassVar[int] = 2

    def __post_init__(self):
        choose("precond.loss", self.loss, DDPM_LOSSES)
        _ = self.process  # raises for a schedule that does not exist or has too few steps

    @property
    def process(self) -> discrete.Process:
        """The tables of all T steps."""
        return discrete.make_process(self.schedule, self.num_steps)

    @property
    def sigma_min(self) -> float:
        """The noise level of t = 0."""
        return float(self.process.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The noise level of t = T - 1."""
        return float(self.process.sigmas[-1])

    @property
    def _time_unit(self) -> float:
        """c_noise of t = 1."""
        return 1000 / self.num_steps if self.rescale_timesteps else 1.0

    def nearest(self, sigma: Sigma) -> Array:
        """The timestep, int32, whose noise level is nearest to sigma."""
        return discrete.nearest(self.process.sigmas, sigma)

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = t 1000/T for the nearest s_t."""
        t = self.nearest(sigma).astype(jnp.float32)
        return _predicts_noise(sigma, t * self._time_unit)

    def draw_sigma(self, key: Key, n: int) -> Float[Array, " n"]:
        """One of the levels, all equally likely."""
        levels = jnp.asarray(self.process.sigmas, jnp.float32)
        return levels[jax.random.randint(key, (n,), 0, self.num_steps)]

    def time(self, c_noise: Array) -> Array:
        """t / T."""
        return self.timestep(c_noise, 1)

    def timestep(self, c_noise: Array, num_timesteps: int) -> Array:
        """t num_timesteps / T."""
        t = jnp.clip(jnp.round(c_noise / self._time_unit), 0, self.num_steps - 1)
        return t * (num_timesteps / self.num_steps)

    def round_sigma(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest of the levels, in float64."""
        levels = self.process.sigmas
        return levels[np.searchsorted(discrete.middles(levels), np.asarray(sigma))]


DDPM_LOSSES = ("hybrid", "simple", "vlb")
PRECONDS = {"edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM, "ddpm": DDPM}
ALL_LEVELS = EDM()  # supports every noise level


def _predicts_noise(sigma: Sigma, noise: Array) -> Coefficients:
    """F predicts the noise in an image that was scaled to unit variance: VP, iDDPM and DDPM."""
    scale = 1 / jnp.sqrt(jnp.square(sigma) + 1)
    return Coefficients(skip=jnp.ones_like(sigma), out=-sigma, input=scale, noise=noise)


def _uniform(log_sigma: Array, low: float, high: float) -> Array:
    """Position of ln sigma between ln low and ln high, clipped to [0, 1]."""
    return jnp.clip((log_sigma - np.log(low)) / np.log(high / low), 0, 1)


class Denoiser(nn.Module):
    """A raw network with its preconditioning: D(x; sigma), the seam of everything above.

    Attributes:
        model: F(c_in x, c_noise, class_labels, augment_labels, train), possibly with LoRA attached.
        precond: the coefficients.
        num_classes: classes of the model, 0 for none.
    """

    model: nn.Module
    precond: Precond = EDM()
    num_classes: int = 0

    def __call__(
        self,
        x: Images,
        sigma: Sigma,
        class_labels: Labels | None = None,
        augment_labels: AugmentLabels | None = None,
        train: bool = False,
        with_raw: bool = False,
    ) -> Images | tuple[Images, Float[Array, "B H W out"]]:
        """Returns the expected clean image D [B, H, W, C] float32.

        Args:
            x: noisy images, clean image plus sigma times unit noise.
            sigma: noise level, [] for all images or [B]; what depends on it alone is then
                computed once for the batch.
            class_labels: [B, num_classes] one-hot or mixtures; None stands for all zeros.
            augment_labels: [B, augment_dim] or None.
            train: dropout on, from the rng stream `dropout`.
            with_raw: returns (D, F), where F is the network's whole output: out_factor C channels.
        """
        x = jnp.asarray(x, jnp.float32)
        sigma = jnp.asarray(sigma, jnp.float32).reshape(-1)
        if sigma.shape[0] not in (1, x.shape[0]):
            raise UserError(
                f"sigma has {sigma.shape[0]} values for {x.shape[0]} images; give one for all, or "
                "one per image."
            )
        class_labels = check_labels(class_labels, self.num_classes, x.shape[0])
        c = self.precond.coefficients(sigma)
        skip, out, scale = (v[:, None, None, None] for v in (c.skip, c.out, c.input))
        raw = self.model(scale * x, c.noise, class_labels, augment_labels, train)
        denoised = skip * x + out * raw[..., : x.shape[-1]].astype(jnp.float32)
        return (denoised, raw) if with_raw else denoised


def check_labels(
    class_labels: Float[Array, "B num_classes"] | None, num_classes: int, batch: int
) -> Float[Array, "B num_classes"] | None:
    """Returns labels that fit the network; None for networks without classes.

    Raises:
        UserError: labels of another number of classes, not one row per image, or class ids.
    """
    if class_labels is None or not num_classes:
        return None
    labels = jnp.asarray(class_labels)
    ids = labels.ndim < 2 and jnp.issubdtype(labels.dtype, jnp.integer)
    if ids or labels.shape not in ((num_classes,), (1, num_classes), (batch, num_classes)):
        raise UserError(
            f"class_labels has shape {labels.shape} and type {labels.dtype}; this network takes "
            f"one-hot labels or mixtures of shape ({batch}, {num_classes}): jax.nn.one_hot(ids, "
            f"{num_classes}) for class ids."
        )
    return labels.astype(jnp.float32).reshape(-1, num_classes)
