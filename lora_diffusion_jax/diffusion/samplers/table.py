"""The samplers by name. Keyword arguments with defaults are the fields of the config group `sampler`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, ImagesU8, Key
from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.precond import VE, VP
from lora_diffusion_jax.diffusion.samplers.ancestral import ddim_sampler, ddpm_sampler
from lora_diffusion_jax.diffusion.samplers.multistep import (
    deis_plan,
    dpmpp_plan,
    ipndm_plan,
    unipc_plan,
)
from lora_diffusion_jax.diffusion.samplers.plan import Plan, precond_of, run_plan
from lora_diffusion_jax.diffusion.samplers.solvers import Churn, make_plan
from lora_diffusion_jax.errors import UserError, choose


def edm_sampler(
    denoise: Denoise,
    latents: Images,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """EDM's sampler: Heun's method with optional churn (algorithm 2), 2 N - 1 evaluations.

    sigma_i = (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho, sigma_N = 0; the last
    step is Euler's.

    Args:
        denoise: D(x; sigma). `bind` makes one of a network, weights and labels that keeps the sampler
            to the noise levels the network supports.
        latents: unit normal noise [B, H, W, C].
        num_steps: N, at least 2.
        sigma_min, sigma_max: range of noise levels.
        rho: exponent of the grid.
        s_churn, s_min, s_max, s_noise: stochasticity, see `Churn`.
        key: one key, or one per image [B]; needed when s_churn > 0.
        noise: [num_steps, B, H, W, C] unit normal noise that replaces the draws.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: settings that define no grid, or noise that is missing or misshapen.
    """
    precond = precond_of(denoise)
    sigmas = schedules.edm_grid(num_steps, *precond.clip(sigma_min, sigma_max), rho)
    plan = make_plan(sigmas, churn=Churn(s_churn, s_min, s_max, s_noise), precond=precond)
    return run_plan(denoise, latents, plan, key=key, noise=noise)


def ablation_sampler(
    denoise: Denoise,
    latents: Images,
    *,
    num_steps: int = 18,
    solver: Literal["euler", "heun"] = "heun",
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm",
    schedule: Literal["vp", "ve", "linear"] = "linear",
    scaling: Literal["vp", "none"] = "none",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
    c_1: float = 0.001,
    c_2: float = 0.008,
    m: int = 1000,
    alpha: float = 1.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """The sampler of EDM's ablations: any solver, discretization, schedule and scaling (table 1).

    Args:
        denoise, latents, num_steps, rho, key, noise: as in `edm_sampler`.
        solver: euler or heun.
        discretization: where the noise levels lie.
        schedule: sigma(t); vp has the betas that reach sigma_min at epsilon_s and sigma_max at 1.
        scaling: s(t): vp 1 / sqrt(1 + sigma^2), or none.
        sigma_min, sigma_max: None takes the discretization's own (vp: sigma(epsilon_s) and sigma(1) of
            beta_d 19.9, beta_min 0.1; ve 0.02, 100; iddpm 0.002, 81; edm 0.002, 80).
        epsilon_s: VP's least time.
        c_1, c_2, m: iDDPM's constants and its number of levels.
        alpha: second evaluation at t + alpha h, 0 < alpha <= 1.
        s_churn, s_min, s_max, s_noise: stochasticity, see `Churn`.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: an unknown choice, or settings that define no grid.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"alpha is {alpha:g}; it must lie in (0, 1].")
    if not 0 < epsilon_s < 1:
        raise UserError(f"epsilon_s is {epsilon_s:g}; it must lie between 0 and 1.")
    vp, ve = VP(epsilon_t=epsilon_s), VE()
    grids = {
        "edm": (0.002, 80.0, functools.partial(schedules.edm_grid, rho=rho)),
        "vp": (vp.sigma_min, vp.sigma_max, functools.partial(schedules.vp_grid, epsilon=epsilon_s)),
        "ve": (ve.sigma_min, ve.sigma_max, schedules.ve_grid),
        "iddpm": (0.002, 81.0, functools.partial(schedules.iddpm_grid, c_1=c_1, c_2=c_2, m=m)),
    }
    low, high, grid = choose("discretization", discretization, grids)
    precond = precond_of(denoise)
    low, high = precond.clip(
        low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    )
    sigmas = grid(num_steps, low, high)
    sigma_of_t = {
        "vp": schedules.vp_schedule(*schedules.vp_betas(low, high, epsilon_s)),
        "ve": schedules.VE_SCHEDULE,
        "linear": schedules.LINEAR_SCHEDULE,
    }
    chosen = choose("schedule", schedule, sigma_of_t)
    s_of_t = {"vp": schedules.vp_scaling(chosen), "none": schedules.NO_SCALING}
    plan = make_plan(
        sigmas,
        second_order=choose("solver", solver, {"euler": False, "heun": True}),
        schedule=chosen,
        scaling=choose("scaling", scaling, s_of_t),
        alpha=alpha,
        churn=Churn(s_churn, s_min, s_max, s_noise),
        precond=precond,
    )
    return run_plan(denoise, latents, plan, key=key, noise=noise)


def _ode_sampler(
    make: Callable[..., Plan],
    denoise: Denoise,
    latents: Images,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    grid: str = "rho",
    rho: float = 7.0,
    sigmas: Sequence[float] = (),
    to_zero: bool = True,
    afs: bool = False,
    key: Key | None = None,
    **settings: Any,
) -> Images:
    """A deterministic solver; `make(sigmas, to_zero=..., precond=..., **settings)` gives its plan.

    Args:
        make: one of the plans of `solvers`.
        denoise, latents, num_steps, sigma_min, sigma_max, rho: as in `edm_sampler`.
        grid: rho as `edm_sampler`; log_snr, equal steps of ln sigma; uniform, equal steps of VP's time
            from 1 to 0.001; searched, the levels of `sigmas`.
        sigmas: with grid=searched, noise levels as from `searched_grid`.
        to_zero: the last of the steps leads from sigma_min to 0. False: it leads to sigma_min, and no
            evaluation is spent on what is left.
        afs: analytic first step (Dockhorn et al. 2022): at sigma_max D is `gaussian_denoised`, which saves
            an evaluation.
        key: not used.
        settings: the solver's own.
    """
    precond = precond_of(denoise)
    low, high = precond.clip(sigma_min, sigma_max)
    if grid == "searched":  # among the levels that the network knows
        low, high = map(float, precond.round_sigma(np.array([low, high])))
    levels = noise_levels(grid, num_steps + (not to_zero), low, high, rho, sigmas)
    plan = make(levels, to_zero=to_zero, precond=precond, **settings)
    if afs:
        plan = plan._replace(analytic=np.arange(len(plan.sigma)) == 0)
    return run_plan(denoise, latents, plan)


def noise_levels(
    grid: str,
    count: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    sigmas: Sequence[float] = (),
) -> np.ndarray:
    """The levels of a grid by name, [count], decreasing; see `_ode_sampler`.

    Raises:
        UserError: there is no such grid, or it does not exist for these settings.
    """
    choose("grid", grid, GRIDS)
    if len(sigmas) and grid != "searched":
        raise UserError(f"sigmas are given beside grid={grid}; leave one of them out.")
    if grid != "searched":
        return GRIDS[grid](count, sigma_min, sigma_max, rho)
    if not len(sigmas):
        raise UserError(
            "grid=searched has no sigmas yet: main.py --mode=sample and eval_fid.py gen search them for a "
            "trained network, and `searched_grid` does from Python."
        )
    schedules.check_grid(count, sigma_min, sigma_max)
    levels = np.asarray(sigmas, np.float64)
    inside = (sigma_min * (1 - 1e-5) <= levels) & (levels <= sigma_max * (1 + 1e-5))
    if len(levels) != count or not (np.diff(levels) < 0).all() or not inside.all():
        raise UserError(
            f"sigmas has {len(levels)} values, {levels.max():g} to {levels.min():g}; expected {count} for "
            f"these steps, decreasing, within {sigma_max:g} and {sigma_min:g}."
        )
    return levels


GRIDS: dict[str, Callable[[int, float, float, float], np.ndarray]] = {
    "rho": schedules.edm_grid,
    "log_snr": lambda count, low, high, rho: schedules.ve_grid(count, low, high),
    "uniform": lambda count, low, high, rho: schedules.vp_grid(count, low, high, epsilon=1e-3),
    "searched": schedules.edm_grid,  # of the fine grid that it chooses from
}


def _ode(make: Callable[..., Plan], **settings: Any) -> Callable[..., Images]:
    """A sampler of `_ode_sampler` with its solver's own settings, by name and default, in its signature."""
    sampler = functools.partial(_ode_sampler, make, **settings)
    whole = inspect.signature(_ode_sampler).parameters
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in settings.items()
    ]
    shared = [p for name, p in whole.items() if name not in ("make", "settings")]
    sampler.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    return sampler


SAMPLERS: dict[str, Callable[..., Images]] = {
    "edm": edm_sampler,
    "ablation": ablation_sampler,
    "euler": _ode(functools.partial(make_plan, second_order=False)),
    "heun": _ode(make_plan, euler_steps=0),
    "dpmpp_2m": _ode(dpmpp_plan),
    "dpmpp_3m": _ode(functools.partial(dpmpp_plan, order=3)),
    "unipc": _ode(unipc_plan, order=3, variant="bh2"),
    "deis": _ode(deis_plan, order=3),
    "ipndm": _ode(ipndm_plan, order=4),
    "ddpm": ddpm_sampler,
    "ddim": ddim_sampler,
}


def to_uint8(images: Images) -> ImagesU8:
    """clip(127.5 x + 128, 0, 255), truncated: how the reference writes its samples."""
    return jnp.clip(images * 127.5 + 128, 0, 255).astype(jnp.uint8)
