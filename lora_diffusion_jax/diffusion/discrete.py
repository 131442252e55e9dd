"""The diffusion process in discrete time of DDPM (Ho et al. 2020) and improved DDPM (Nichol & Dhariwal 2021).

q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t) for t = 0 ... T - 1. The tables are float64 on the host and are
cast where they are used. In terms of EDM, x_t = sqrt(abar_t) (x_0 + sigma_t n) with unit normal noise n and
sigma_t = sqrt((1 - abar_t) / abar_t).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_diffusion_jax.array_types import Images
from lora_diffusion_jax.errors import UserError, choose

Raw = Float[Array, "B H W out"]  # output of a network: C or 2C channels
Timestep = Int[Array, ""] | Int[Array, " B"]  # an index of the process, in [0, K)

MAX_BETA = 0.999  # of the cosine schedule, whose last step would be singular
TINY = 1e-12  # least probability that enters a logarithm
BIN = 1 / 255  # half the distance between two gray levels in [-1, 1]


def cosine_betas(num_steps: int) -> np.ndarray:
    """beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999), f(s) = cos^2((s + 0.008)/1.008 pi/2), float64 [T].

    Nichol & Dhariwal 2021, equation 17.
    """
    # math.cos, as the reference: the cancellation in 1 - f / f magnifies the last bit of numpy's.
    times = (i / num_steps for i in range(num_steps + 1))
    f = np.array([math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 for s in times])
    return np.minimum(1 - f[1:] / f[:-1], MAX_BETA)


def linear_betas(num_steps: int) -> np.ndarray:
    """Equal steps from 1e-4 to 0.02, both times 1000 / T, float64 [T] (Ho et al. 2020, section 4).

    Raises:
        UserError: so few steps that the last beta reaches 1.
    """
    if num_steps <= 20:
        raise UserError(
            f"The linear schedule with {num_steps} steps has a beta of 1 or more; use more than 20 "
            "steps, or the cosine schedule."
        )
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps)


SCHEDULES = {"cosine": cosine_betas, "linear": linear_betas}


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """The tables of a process of K steps, a part of the T steps that a network was trained on.

    Attributes:
        betas: variances of the steps, float64 [K], in (0, 1).
        timesteps: which of the network's T timesteps they are, ascending, int [K].
    """

    betas: np.ndarray
    timesteps: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, the product of 1 - beta up to t, [K]."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """abar_{t-1}, [K]; 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        """sqrt(abar_t), [K]: the share of x_0 in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """sigma_t = sqrt(1/abar_t - 1), EDM's noise levels, ascending, [K]."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), [K]; 0 at t = 0 (Ho et al. 2020, equation 7)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @functools.cached_property
    def mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(of x_0, of x_t) in the mean of q(x_{t-1} | x_t, x_0), [K] each (equation 7)."""
        rest = 1 - self.alphas_cumprod
        return (
            self.betas * np.sqrt(self.alphas_cumprod_prev) / rest,
            np.sqrt(1 - self.betas) * (1 - self.alphas_cumprod_prev) / rest,
        )

    @functools.cached_property
    def log_variances(self) -> tuple[np.ndarray, np.ndarray]:
        """(smallest, largest) ln variance that a network with learned variances chooses between, [K] each.

        ln of the posterior variance, which at t = 0 stands for that at t = 1, and ln beta.
        """
        return np.log(self._replace_first(self.posterior_variance)), np.log(self.betas)

    @functools.cached_property
    def fixed_log_variance(self) -> np.ndarray:
        """ln variance for a network without learned variances, [K]: ln beta, but at t = 0 the posterior's.

        The reference's "fixed large" variance, its default.
        """
        return np.log(np.append(self._replace_first(self.posterior_variance)[0], self.betas[1:]))

    def _replace_first(self, variance: np.ndarray) -> np.ndarray:
        """The posterior variance with the value at t = 1 for that at t = 0, or beta if there is no t = 1."""
        return np.append(variance[1:2] if len(self) > 1 else self.betas, variance[1:])

    def respace(self, steps: str) -> "Process":
        """The process that visits some of the steps alone; `space_timesteps` says which.

        Raises:
            UserError: there are no such steps.
        """
        return self.select(space_timesteps(len(self), steps))

    def select(self, kept: np.ndarray) -> "Process":
        """The process that visits these steps alone."""
        return _from_alphas(self.alphas_cumprod[kept], self.timesteps[kept])


def _from_alphas(alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> Process:
    return Process(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), timesteps)


def process_of_levels(sigmas: np.ndarray) -> Process:
    """The process that visits EDM's noise levels, ascending, [K]."""
    return _from_alphas(1 / (1 + np.square(sigmas)), np.arange(len(sigmas)))


@functools.cache
def make_process(schedule: str, num_steps: int) -> Process:
    """The process of a named schedule, `cosine` or `linear`, with T steps.

    Raises:
        UserError: no such schedule, or too few steps for it.
    """
    betas = choose("precond.schedule", schedule, SCHEDULES)(num_steps)
    return Process(betas, np.arange(num_steps))


def space_timesteps(num_steps: int, steps: str) -> np.ndarray:
    """The timesteps that a description of a respacing keeps, ascending, int [K].

    Args:
        num_steps: T.
        steps: "250": 250 steps at equal distances, from 0 to T - 1. "10,15,20": so many in each of equal
            sections of the process. "ddim50": every s-th step from 0, with the least integer s that gives
            50 steps; of 4000 that is 0, 80, ..., 3920. "": all.

    Raises:
        UserError: it is none of these, or there are not so many steps.
    """
    if not steps:
        return np.arange(num_steps)
    counts = steps.removeprefix("ddim").split(",")
    if not all(count.isascii() and count.isdigit() for count in counts) or (
        steps.startswith("ddim") and len(counts) > 1
    ):
        raise UserError(
            f"sampler.respacing is {steps!r}; write the number of steps ('250'), one for each section "
            "('10,15,20'), or 'ddim50'."
        )
    if steps.startswith("ddim"):
        return _strided(num_steps, int(counts[0]))
    sizes = [len(part) for part in np.array_split(np.arange(num_steps), len(counts))]
    kept: list[int] = []
    for start, size, count in zip(np.cumsum([0, *sizes]), sizes, map(int, counts), strict=False):
        if count > size:
            raise UserError(
                f"sampler.respacing={steps} asks for {count} steps of a section of {size}; the process "
                f"has {num_steps} steps."
            )
        # The reference adds up the stride, and rounds to even.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
    if not kept:
        raise UserError(f"sampler.respacing={steps} keeps no step; ask for at least 1.")
    return np.unique(kept)


def _strided(num_steps: int, count: int) -> np.ndarray:
    """Every s-th step from 0, with the least s for which they are `count`."""
    for stride in range(1, num_steps + 1):
        kept = np.arange(0, num_steps, stride)
        if len(kept) == count:
            return kept
    raise UserError(
        f"sampler.respacing=ddim{count}: no integer stride takes {count} of {num_steps} steps; write "
        f"'{min(count, num_steps)}' for steps at nearly equal distances."
    )


def at(table: np.ndarray, t: Timestep) -> Array:
    """table[t] as float32, of the shape that multiplies images: [B or 1, 1, 1, 1]."""
    return jnp.asarray(table, jnp.float32)[t].reshape(-1, 1, 1, 1)


def posterior_mean(process: Process, t: Timestep, x_0: Images, x_t: Images) -> Images:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    of_start, of_noisy = process.mean_coefficients
    return at(of_start, t) * x_0 + at(of_noisy, t) * x_t


def interpolate_log_variance(low: Any, high: Any, raw: Raw) -> Images:
    """ln variance between low and high as the network says: v = -1 is low, 1 high (equation 15).

    Args:
        low, high: ln of the smallest and the largest variance, [] or [B or 1, 1, 1, 1].
        raw: output of the network [B, H, W, 2C]; its second half is v.
    """
    part = (raw[..., raw.shape[-1] // 2 :].astype(jnp.float32) + 1) / 2
    return part * high + (1 - part) * low


def log_variance(process: Process, t: Timestep, raw: Raw, channels: int) -> Images:
    """ln variance of p(x_{t-1} | x_t): learned by networks with 2C channels, fixed with C.

    Args:
        process: the tables.
        t: the timestep.
        raw: output of the network.
        channels: C, of the images.
    """
    if raw.shape[-1] == channels:
        return at(process.fixed_log_variance, t)
    low, high = (at(table, t) for table in process.log_variances)
    return interpolate_log_variance(low, high, raw)


def normal_kl(distance: Any, log_variance_1: Any, log_variance_2: Any) -> Any:
    """KL(N(m_1, v_1) || N(m_2, v_2)) in nats.

    Args:
        distance: m_1 - m_2.
        log_variance_1, log_variance_2: ln v_1, ln v_2.
    """
    # In the reference's order: where the variances agree, what is left of this sum is rounding.
    spread = -1.0 + log_variance_2 - log_variance_1 + jnp.exp(log_variance_1 - log_variance_2)
    return 0.5 * (spread + jnp.square(distance) * jnp.exp(-log_variance_2))


def log_probability(images: Images, mean: Images, log_scale: Images) -> Images:
    """ln of the probability that a normal distribution gives to the gray level of each pixel, in nats.

    A level is as wide as the distance to the next; the first and the last reach to infinity (Ho et al.
    2020, equation 13). The distribution function is the tanh approximation of the reference.

    Args:
        images: gray levels of 8 bits in [-1, 1].
        mean, log_scale: of the distribution; log_scale is ln of the standard deviation.
    """
    inverse = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse * (images - mean + BIN))
    lower = _normal_cdf(inverse * (images - mean - BIN))
    inside = jnp.where(images > 0.999, 1 - lower, upper - lower)
    return jnp.log(jnp.maximum(jnp.where(images < -0.999, upper, inside), TINY))


def _normal_cdf(x: Any) -> Any:
    """The distribution function of N(0, 1), to about 3e-4."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bound_term(
    process: Process,
    t: Timestep,
    images: Images,
    noisy: Images,
    denoised: Images,
    log_variance: Images,
) -> Float[Array, "B H W C"]:
    """One term of the variational bound, bits per pixel (Nichol & Dhariwal 2021, equations 4 to 7).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0, -log2 p(x_0 | x_1).

    Args:
        process: the tables.
        t: the timestep.
        images: x_0, gray levels of 8 bits in [-1, 1].
        noisy: x_t, of about unit variance.
        denoised: the network's prediction of x_0.
        log_variance: of p(x_{t-1} | x_t).
    """
    mean = posterior_mean(process, t, denoised, noisy)
    distance = posterior_mean(process, t, images, noisy) - mean
    kl = normal_kl(distance, at(process.log_variances[0], t), log_variance)
    decoder = -log_probability(images, mean, 0.5 * log_variance)
    first = jnp.reshape(t, (-1, 1, 1, 1)) == 0
    return jnp.where(first, decoder, kl) / np.log(2)


def prior_bits(process: Process, images: Images) -> Float[Array, " B"]:
    """KL(q(x_{T-1} | x_0) || N(0, 1)), bits per dimension of each image."""
    abar = process.alphas_cumprod[-1]
    kl = normal_kl(np.float32(np.sqrt(abar)) * images, np.float32(np.log1p(-abar)), 0.0)
    return jnp.mean(kl, axis=(1, 2, 3)) / np.log(2)


def nearest(levels: np.ndarray, sigma: jax.Array) -> Int[Array, "..."]:
    """Index of the level nearest to sigma, of ascending levels [K]."""
    return jnp.searchsorted(jnp.asarray(middles(levels), jnp.float32), sigma)


def middles(levels: np.ndarray) -> np.ndarray:
    """Halfway between each of ascending levels [K] and the next, [K - 1]: where the nearest one changes."""
    return (levels[1:] + levels[:-1]) / 2
