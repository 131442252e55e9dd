"""Samplers of a discrete process: ancestral sampling and DDIM, one row of a table per step.

A step from timestep t of the process to the one before it is

    x <- of_denoised D + of_noisy x + exp(log_variance / 2) z,        z ~ N(0, 1)

with x of about unit variance and D the prediction of x_0, clipped to [-1, 1] unless `clip_denoised` is off.
The table is written in float64 on the host, the scan over its rows runs in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, Key
from lora_diffusion_jax.diffusion.discrete import (
    Process,
    interpolate_log_variance,
    process_of_levels,
)
from lora_diffusion_jax.diffusion.precond import DDPM
from lora_diffusion_jax.diffusion.samplers.plan import noise_source, precond_of, to_float32
from lora_diffusion_jax.errors import UserError

DEFAULT_RANGE = (0.002, 80.0)  # of networks without a discrete process: EDM's sampler
DDIM_RESPACING = "ddim50"  # the default of ddim


class Steps(NamedTuple):
    """The rows of a run, each field [K], from the most noise to the least."""

    sigma: Any  # noise level that the network is given
    scale: Any  # sqrt(abar): the state over a noisy image of EDM's
    of_denoised: Any
    of_noisy: Any
    low: Any  # ln variance, the smallest that a network with learned variances may choose
    high: Any  # and the largest
    fixed: Any  # ln variance without learned ones
    number: Any  # 0 for the first step, of which each draws noise of its own
    last: Any  # the last step adds no noise


def ancestral_steps(process: Process) -> Steps:
    """Samples p(x_{t-1} | x_t), whose mean is that of q(x_{t-1} | x_t, x_0 = D) (Ho et al. 2020)."""
    low, high = process.log_variances
    return _steps(process, *process.mean_coefficients, low, high, process.fixed_log_variance)


def ddim_steps(process: Process, eta: float = 0.0) -> Steps:
    """DDIM (Song, Meng & Ermon 2021, equation 12): x <- sqrt(abar') D + sqrt(1 - abar' - v) e + sqrt(v) z.

    abar' belongs to the step before, e = (x - sqrt(abar) D) / sqrt(1 - abar) is the predicted noise, and
    v = eta^2 (1 - abar') / (1 - abar) (1 - abar / abar').

    Args:
        process: the tables.
        eta: 0 is deterministic, 1 has the variance of the posterior.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"sampler.eta is {eta:g}; it must lie in [0, 1].")
    # The reference computes the square roots from abar in float32, which moves sqrt(1 - abar) by up to 0.3 %.
    tables = (process.alphas_cumprod, process.alphas_cumprod_prev)
    abar, before = (table.astype(np.float32).astype(np.float64) for table in tables)
    variance = np.zeros(len(process))
    if eta:
        variance = eta**2 * (1 - before) / (1 - abar) * (1 - abar / before)
    of_noise = np.sqrt(np.maximum(1 - before - variance, 0))
    of_denoised = np.sqrt(before) - of_noise / process.sigmas
    of_noisy = of_noise / (process.sigmas * process.sqrt_alphas_cumprod)
    with np.errstate(divide="ignore"):  # exp(-inf) is the 0 that is meant
        log_variance = np.log(variance)
    return _steps(process, of_denoised, of_noisy, log_variance, log_variance, log_variance)


def _steps(process: Process, *columns: np.ndarray) -> Steps:
    t = np.arange(len(process))
    rows = (process.sigmas, process.sqrt_alphas_cumprod, *columns, t[::-1], t == 0)
    return Steps(*(column[::-1].copy() for column in rows))  # a run begins at the process's end


def run_steps(
    denoise: Denoise,
    latents: Images,
    steps: Steps,
    *,
    learned: bool,
    clip_denoised: bool = True,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """Executes the steps in one scan, with a float32 state.

    Args:
        denoise: D(x; sigma), called with a scalar sigma.
        latents: unit normal noise [B, H, W, C].
        steps: of `ancestral_steps` or `ddim_steps`.
        learned: the variances are the network's, if it has some; needs `bind`.
        clip_denoised: D is clipped to [-1, 1].
        key: one key, or one per image [B]; step i draws its noise with fold_in(key, i).
        noise: unit normal noise [K, B, H, W, C] to use instead; that of the last step is not used.

    Raises:
        UserError: steps that add noise, without key and noise; or noise of the wrong shape.
    """
    latents = jnp.asarray(latents, jnp.float32)
    stochastic = bool(np.any((steps.fixed > -np.inf) & ~steps.last))
    who = "This sampler" if stochastic else ""
    draw = noise_source(who, key, noise, (len(steps.sigma), *latents.shape))
    raw_of = getattr(denoise, "raw", None) if learned else None

    def body(x: Images, row: Steps) -> tuple[Images, None]:
        log_variance = row.fixed
        if raw_of is None:
            denoised = denoise(x / row.scale, row.sigma)
        else:
            denoised, raw = raw_of(x / row.scale, row.sigma)
            if raw.shape[-1] > x.shape[-1]:
                log_variance = interpolate_log_variance(row.low, row.high, raw)
        if clip_denoised:
            denoised = jnp.clip(denoised, -1, 1)
        x = row.of_denoised * denoised + row.of_noisy * x
        if stochastic:  # steps without noise draw none
            x += jnp.where(row.last, 0, jnp.exp(0.5 * log_variance)) * draw(row.number)
        return x, None

    return jax.lax.scan(body, latents, to_float32(steps))[0]


def ddpm_sampler(
    denoise: Denoise,
    latents: Images,
    *,
    num_steps: int = 0,
    respacing: str = "",
    clip_denoised: bool = True,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """Ancestral sampling of a network of a discrete process (precond.name=ddpm).

    The variances are those that the network learned, if it did (Nichol & Dhariwal 2021).

    Args:
        denoise: D(x; sigma) of `bind`, which tells the process and the variances.
        latents: unit normal noise [B, H, W, C].
        num_steps: as many of the process's steps, evenly spaced; 0: as respacing says.
        respacing: which steps are visited (`discrete.space_timesteps`); "" visits all.
        clip_denoised: the predictions of the clean image are clipped to [-1, 1].
        sigma_min, sigma_max: range of the noise levels that are visited; None: all of the process.
        key: one key, or one per image [B].
        noise: [K, B, H, W, C] unit normal noise that replaces the draws.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: the network is of another kind, there are no such steps, or noise is missing.
    """
    if not isinstance(precond_of(denoise), DDPM):
        raise UserError(
            "sampler.name=ddpm needs a network of a discrete process (precond.name=ddpm), bound with "
            "samplers.bind; use sampler.name=edm, or ddim, which takes any network."
        )
    process = choose_process(denoise, num_steps, respacing, sigma_min, sigma_max)
    return run_steps(
        denoise,
        latents,
        ancestral_steps(process),
        learned=True,
        clip_denoised=clip_denoised,
        key=key,
        noise=noise,
    )


def ddim_sampler(
    denoise: Denoise,
    latents: Images,
    *,
    num_steps: int = 0,
    respacing: str = DDIM_RESPACING,
    eta: float = 0.0,
    clip_denoised: bool = True,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """DDIM (Song, Meng & Ermon 2021), for any network.

    A network without a discrete process visits the noise levels of the cosine process of 4000 steps.

    Args:
        denoise: D(x; sigma).
        latents: unit normal noise [B, H, W, C].
        num_steps, respacing, clip_denoised, key, noise: as in `ddpm_sampler`.
        eta: 0 is deterministic, 1 adds the posterior's noise.
        sigma_min, sigma_max: range of the noise levels that are visited. None: all of the network's own
            process; without one, 0.002 to 80 within what the network supports.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: there are no such steps, eta is out of range, or noise is missing.
    """
    process = choose_process(
        denoise, num_steps, respacing, sigma_min, sigma_max, usual=DDIM_RESPACING
    )
    return run_steps(
        denoise,
        latents,
        ddim_steps(process, eta),
        learned=False,
        clip_denoised=clip_denoised,
        key=key,
        noise=noise,
    )


def check_steps(num_steps: int, respacing: str, usual: str) -> None:
    """Raises UserError for a negative num_steps, or one beside a respacing other than the usual."""
    if num_steps < 0:
        raise UserError(
            f"sampler.num_steps is {num_steps}; take at least 2 steps, or 0 for those of respacing."
        )
    if num_steps and respacing != usual:
        raise UserError(
            f"Both sampler.num_steps={num_steps} and sampler.respacing={respacing!r} say which steps to "
            "visit; set num_steps to 0, or leave respacing out."
        )


def choose_process(
    denoise: Denoise,
    num_steps: int,
    respacing: str,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    usual: str = "",
) -> Process:
    """The steps to visit of a network's own process, or of the default one; see `ddim_sampler`.

    Args:
        denoise, num_steps, respacing, sigma_min, sigma_max: of the sampler.
        usual: the sampler's default respacing, beside which num_steps may stand.

    Raises:
        UserError: num_steps and respacing contradict each other, or ask for steps that the range does
            not have.
    """
    check_steps(num_steps, respacing, usual)
    precond = precond_of(denoise)
    if isinstance(precond, DDPM):
        process, (low, high) = precond.process, (0.0, float("inf"))
    else:
        levels = np.unique(precond.round_sigma(DDPM().process.sigmas))
        process, (low, high) = process_of_levels(levels[levels > 0]), DEFAULT_RANGE
    low = low if sigma_min is None else sigma_min
    high = high if sigma_max is None else sigma_max
    low, high = precond.clip(low, high)
    # A level that was rounded on its way here is still inside.
    inside = (process.sigmas > low * (1 - 1e-6)) & (process.sigmas < high * (1 + 1e-6))
    if not inside.any():
        raise UserError(f"No step of the process has a noise level from {low:g} to {high:g}.")
    process = process.select(np.flatnonzero(inside))
    if num_steps > len(process):
        raise UserError(
            f"sampler.num_steps is {num_steps}, and the process has {len(process)} steps to visit; ask for "
            "at most as many."
        )
    steps = str(num_steps) if num_steps else respacing
    chosen = process.respace(steps)
    if len(chosen) < 2:
        raise UserError(
            f"sampler.{'num_steps' if num_steps else 'respacing'}={steps} visits a single step; ask for at "
            "least 2."
        )
    return chosen
