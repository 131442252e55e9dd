"""Networks that are formulas: that of the golden file, and the ideal ones of Gaussian data."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.diffusion.precond import DDPM, Denoiser
from lora_diffusion_jax.diffusion.samplers import BoundDenoiser, bind

MEAN, STD = 0.1, 0.25  # of the Gaussian data
LEVELS = np.arange(256) / 127.5 - 1  # the gray levels of 8 bits


class Formula(nn.Module):
    """The network of tests/golden/make_iddpm.py, with its two parameters."""

    learn_sigma: bool = True

    @nn.compact
    def __call__(self, x, time, class_labels=None, augment_labels=None, train=False):
        a, b = (
            self.param("a", nn.initializers.zeros, ()),
            self.param("b", nn.initializers.zeros, ()),
        )
        time = time.reshape(-1, 1, 1, 1)
        noise = a * x + 0.1 * jnp.cos(time / 100)
        if not self.learn_sigma:
            return noise
        return jnp.concatenate([noise, jnp.sin(b * x + time / 300)], axis=-1)


def formula(precond, learn_sigma=True):
    """The bound denoiser of the formula with the golden file's parameters."""
    variables = {"params": {"model": {"a": jnp.float32(0.9), "b": jnp.float32(3.0)}}}
    return bind(Denoiser(Formula(learn_sigma), precond), variables)


def gaussian(x, sigma):
    """The ideal denoiser of data N(MEAN, STD^2): the posterior mean."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def ideal(precond):
    """The ideal denoiser of the Gaussian data; of a discrete process it also has the exact variances.

    p(x_{t-1} | x_t) is normal for such data, of the posterior's variance and what is left of x_0's.
    """
    if not isinstance(precond, DDPM):
        return BoundDenoiser(gaussian, precond)
    process = precond.process
    left = (STD * process.sigmas) ** 2 / (STD**2 + process.sigmas**2)
    variance = process.posterior_variance + process.mean_coefficients[0] ** 2 * left
    low, high = process.log_variances
    part = (np.log(variance) - low) / np.maximum(high - low, 1e-12)

    def raw(x, sigma):
        denoised, t = gaussian(x, sigma), precond.nearest(sigma)
        chosen = jnp.broadcast_to(jnp.asarray(2 * part - 1, jnp.float32)[t], x.shape)
        return denoised, jnp.concatenate([(x - denoised) / sigma, chosen], axis=-1)

    return BoundDenoiser(gaussian, precond, raw)


def ideal_of_levels(precond, chances, variance):
    """The ideal denoiser of gray pixels with these chances of the levels, for a discrete process.

    Args:
        precond: with the process.
        chances: of the levels, [256].
        variance: "low" or "high", the ends of the range; "exact", that of p(x_{t-1} | x_t) within it.
    """
    process = precond.process
    low, high = (jnp.asarray(table, jnp.float32) for table in process.log_variances)
    of_start = jnp.asarray(process.mean_coefficients[0], jnp.float32)
    posterior = jnp.asarray(process.posterior_variance, jnp.float32)
    levels = LEVELS.astype(np.float32)

    def raw(x, sigma):
        logits = np.log(chances) - 0.5 * jnp.square((x - levels) / sigma)  # [B, H, W, 256]
        weights = jax.nn.softmax(logits.astype(jnp.float32))
        denoised = jnp.sum(weights * levels, axis=-1, keepdims=True)
        spread = jnp.sum(weights * jnp.square(levels - denoised), axis=-1, keepdims=True)
        t = precond.nearest(sigma)
        exact = jnp.log(posterior[t] + jnp.square(of_start[t]) * spread)
        inside = jnp.clip(2 * (exact - low[t]) / jnp.maximum(high - low, 1e-12)[t] - 1, -1, 1)
        part = {"low": -jnp.ones_like(x), "high": jnp.ones_like(x), "exact": inside}[variance]
        return denoised, jnp.concatenate([(x - denoised) / sigma, part], axis=-1)

    return BoundDenoiser(lambda x, sigma: raw(x, sigma)[0], precond, raw)


class PixelNet(nn.Module):
    """Two dense layers on every pixel, with the names that LoRA attaches to; 2C channels out."""

    @nn.compact
    def __call__(self, x, time, class_labels=None, augment_labels=None, train=False):
        hidden = nn.Dense(16, name="qkv")(x) + 0.001 * time.reshape(-1, 1, 1, 1)
        return nn.Dense(2 * x.shape[-1], name="proj")(jnp.tanh(hidden))
