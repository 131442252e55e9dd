"""Noise schedules sigma(t), scalings s(t) and grids of noise levels (Karras et al. 2022, table 1).

Grids are computed in float64 on the host. VP's formulas also take JAX arrays: the preconditioning and
the training draws of `precond.VP` are the same functions.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.errors import UserError

MAX_STEPS = 10_000  # of a sampling run, whose plan is written row by row
_SQUARABLE = (1e-18, 1e18)  # noise levels whose squares float32 holds
_MAX_LEVELS = 1_000_000  # of iDDPM's discretization, which is computed level by level


class Schedule(NamedTuple):
    """sigma(t), its derivative and its inverse."""

    sigma: Callable[[Any], Any]
    derivative: Callable[[Any], Any]
    time: Callable[[Any], Any]


class Scaling(NamedTuple):
    """s(t) and its derivative: the sampler's state is s(t) times a noisy image."""

    scale: Callable[[Any], Any]
    derivative: Callable[[Any], Any]


def _numpy_for(x: Any) -> ModuleType:
    return jnp if isinstance(x, jax.Array) else np


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    def sigma(t: Any) -> Any:
        xp = _numpy_for(t)
        return xp.sqrt(xp.expm1(0.5 * beta_d * xp.square(t) + beta_min * t))

    def time(level: Any) -> Any:
        xp = _numpy_for(level)
        discriminant = beta_min**2 + 2 * beta_d * xp.log(1 + xp.square(level))
        return (xp.sqrt(discriminant) - beta_min) / beta_d

    def derivative(t: Any) -> Any:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    return Schedule(sigma, derivative, time)


VE_SCHEDULE = Schedule(np.sqrt, lambda t: 0.5 / np.sqrt(t), np.square)
LINEAR_SCHEDULE = Schedule(np.asarray, np.ones_like, np.asarray)
NO_SCALING = Scaling(np.ones_like, np.zeros_like)


def vp_scaling(schedule: Schedule) -> Scaling:
    """s(t) = 1 / sqrt(1 + sigma(t)^2), which keeps the state's variance near that of the data."""

    def scale(t: Any) -> Any:
        return 1 / np.sqrt(1 + np.square(schedule.sigma(t)))

    return Scaling(scale, lambda t: -schedule.sigma(t) * schedule.derivative(t) * scale(t) ** 3)


def vp_betas(sigma_min: float, sigma_max: float, epsilon: float) -> tuple[float, float]:
    """(beta_d, beta_min) for which sigma(epsilon) = sigma_min and sigma(1) = sigma_max."""
    low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    return float(beta_d), float(high - 0.5 * beta_d)


def ramp(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """i / (N - 1) for i = 0 ... N - 1, of a grid that `check_grid` lets pass."""
    check_grid(num_steps, sigma_min, sigma_max)
    return np.arange(num_steps, dtype=np.float64) / (num_steps - 1)


def check_grid(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    """Raises UserError for fewer than 2 steps or too many, or an empty range of noise levels."""
    if not isinstance(num_steps, (int, np.integer)) or not 2 <= num_steps <= MAX_STEPS:
        raise UserError(
            f"num_steps is {num_steps!r}; the sampler needs at least 2 steps, since the grid runs "
            f"from sigma_max to sigma_min, and takes at most {MAX_STEPS:,}."
        )
    low, high = _SQUARABLE
    if not low <= sigma_min < sigma_max <= high:
        raise UserError(
            f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}, within what the network "
            f"supports; {low:g} <= sigma_min < sigma_max <= {high:g} is required."
        )


def edm_grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """sigma_i = (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho, [N] (EDM eq. 5)."""
    if not 0 < rho < float("inf"):
        raise UserError(f"rho is {rho:g}; it must be positive and finite.")
    steps = ramp(num_steps, sigma_min, sigma_max)
    try:
        high, low = float(sigma_max) ** (1 / rho), float(sigma_min) ** (1 / rho)
    except OverflowError:
        high, low = float("inf"), 0.0
    with np.errstate(all="ignore"):
        sigmas = (high + steps * (low - high)) ** rho
        held = sigmas.astype(np.float32)
    if not (np.isfinite(held).all() and (held >= np.finfo(np.float32).tiny).all()):
        raise UserError(
            f"sigma_min {sigma_min:g}, sigma_max {sigma_max:g} and rho {rho:g} give noise levels that "
            "float32 cannot hold; choose a rho nearer to 7, or a narrower range."
        )
    return sigmas


def vp_grid(num_steps: int, sigma_min: float, sigma_max: float, epsilon: float) -> np.ndarray:
    """Noise levels at equal steps of VP's time from 1 to epsilon, [N]."""
    steps = ramp(num_steps, sigma_min, sigma_max)
    return vp_schedule(*vp_betas(sigma_min, sigma_max, epsilon)).sigma(1 + steps * (epsilon - 1))


def ve_grid(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Noise levels in geometric progression, [N]."""
    return sigma_max * (sigma_min / sigma_max) ** ramp(num_steps, sigma_min, sigma_max)


@functools.cache
def iddpm_levels(c_1: float, c_2: float, num_levels: int, dtype: type = np.float64) -> np.ndarray:
    """u_0 > ... > u_M = 0 with u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1), [M + 1].

    The reference computes abar in float32, which moves u by 5e-4, and sums up in float32 for its network
    and in float64 for its sampler. Networks were trained on those levels, so this does the same; the
    sine of another library leaves a difference of 1.3e-5 (relative) to the reference's own tables.

    Raises:
        UserError: constants that define no such levels, or too many levels.
    """
    if not isinstance(num_levels, (int, np.integer)) or not 1 <= num_levels <= _MAX_LEVELS:
        raise UserError(
            f"The number of iDDPM's levels is {num_levels!r}; it must be a whole number from 1 to "
            f"{_MAX_LEVELS:,}."
        )
    if not (0 < c_1 < 1 and 0 <= c_2 < float("inf")):
        raise UserError(
            f"iDDPM's constants are c_1 = {c_1:g} and c_2 = {c_2:g}; expected 0 < c_1 < 1 and "
            "c_2 >= 0."
        )
    f32 = np.float32
    j = np.arange(num_levels + 1, dtype=f32)
    abar = np.sin(f32(0.5 * np.pi) * j / f32(num_levels) / f32(c_2 + 1)) ** 2
    levels: np.ndarray = np.zeros(num_levels + 1, dtype)
    for i in range(num_levels, 0, -1):
        ratio = dtype(max(abar[i - 1] / abar[i], f32(c_1)))
        levels[i - 1] = np.sqrt((levels[i] ** 2 + dtype(1)) / ratio - dtype(1))
    levels.flags.writeable = False  # the cache hands out one array
    return levels


def iddpm_grid(
    num_steps: int, sigma_min: float, sigma_max: float, c_1: float, c_2: float, m: int
) -> np.ndarray:
    """Every k-th of iDDPM's m levels within [sigma_min, sigma_max], [N]."""
    check_grid(num_steps, sigma_min, sigma_max)
    levels = iddpm_levels(c_1, c_2, m)
    inside = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(inside) < num_steps:
        raise UserError(
            f"The iddpm discretization has {len(inside)} levels between sigma_min {sigma_min:g} and "
            f"sigma_max {sigma_max:g}, fewer than num_steps={num_steps}; use fewer steps or a larger m."
        )
    steps = np.arange(num_steps)
    return inside[np.round((len(inside) - 1) / (num_steps - 1) * steps).astype(int)]
