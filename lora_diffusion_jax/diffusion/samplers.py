"""Deterministic and stochastic samplers of EDM (Karras et al. 2022, algorithms 1 and 2).

A run is first written down on the host, in float64, as a table with one row per evaluation of the
network (`Plan`), and then executed by one `lax.scan` over the rows. The network is therefore traced
once, though Heun's method calls it at two places, and its noise level is a scalar shared by all images.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, ImagesU8, Key
from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.schedules import Scaling, Schedule
from lora_diffusion_jax.errors import UserError

Round = Callable[[np.ndarray], np.ndarray]
CHOICES = {  # of `ablation_sampler`
    "solver": ("euler", "heun"),
    "discretization": ("vp", "ve", "iddpm", "edm"),
    "schedule": ("vp", "ve", "linear"),
    "scaling": ("vp", "none"),
}


class Plan(NamedTuple):
    """One row per network evaluation, [E] each; a step has one row (Euler) or two (Heun).

    With y the state entering the row, z unit noise and (y0, d0) kept from the step's first row:
        y  <- carry y + churn z                            first rows only (carry 1, churn 0 else)
        d  =  drift y - pull D(y / scale; sigma)           the ODE's slope
        y  <- base + dt (now d + before d0)                base = y in first rows, y0 in second ones
    """

    sigma: np.ndarray
    scale: np.ndarray
    drift: np.ndarray
    pull: np.ndarray
    carry: np.ndarray
    churn: np.ndarray
    dt: np.ndarray
    now: np.ndarray
    before: np.ndarray
    first: np.ndarray  # bool
    step: np.ndarray  # int


class Churn(NamedTuple):
    """Stochasticity (EDM algorithm 2): noise added in steps whose level lies in [s_min, s_max]."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = float("inf")
    s_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level at sigma: min(S_churn / N, sqrt(2) - 1)."""
        if not self.s_min <= sigma <= self.s_max:
            return 0.0
        return min(self.s_churn / num_steps, np.sqrt(2) - 1)


def make_plan(
    sigmas: np.ndarray,
    *,
    solver: Literal["euler", "heun"] = "heun",
    schedule: Schedule = schedules.LINEAR_SCHEDULE,
    scaling: Scaling = schedules.NO_SCALING,
    alpha: float = 1.0,
    churn: Churn | None = None,
    round_sigma: Round = lambda sigma: sigma,
) -> tuple[Plan, float]:
    """Writes a sampling run down as a table of its network evaluations.

    Args:
        sigmas: noise levels [N], decreasing; a final 0 is added.
        solver: euler, or heun (a second-order step of parameter alpha).
        schedule, scaling: sigma(t) and s(t) of the ODE dx = [(s'/s + sigma'/sigma) x
            - (sigma' s / sigma) D(x / s; sigma)] dt (EDM eq. 81).
        alpha: where the second evaluation lies: t + alpha h; 1 is Heun's method, 1/2 the midpoint's.
        churn: stochasticity; None or s_churn = 0 gives the deterministic sampler.
        round_sigma: the noise level nearest to one that the network knows.

    Returns:
        (plan, initial): `initial` is the standard deviation of the first state.
    """
    churn = churn or Churn()
    times = np.append(schedule.time(round_sigma(sigmas)), 0.0)
    rows = []
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        sigma = float(schedule.sigma(t))
        gamma = churn.gamma(sigma, len(sigmas))
        t_hat = float(schedule.time(round_sigma(np.asarray(sigma + gamma * sigma)))) if gamma else t
        sigma_hat = float(schedule.sigma(t_hat))
        added = np.sqrt(max(sigma_hat**2 - sigma**2, 0.0)) * scaling.scale(t_hat) * churn.s_noise
        carry = scaling.scale(t_hat) / scaling.scale(t)
        h = t_next - t_hat
        slope = _slope(t_hat, schedule, scaling)
        if solver == "euler" or i == len(sigmas) - 1:
            rows.append((*slope, carry, added, h, 1.0, 0.0, True, i))
        else:
            rows.append((*slope, carry, added, alpha * h, 1.0, 0.0, True, i))
            second = _slope(t_hat + alpha * h, schedule, scaling)
            weight = 1 / (2 * alpha)
            rows.append((*second, 1.0, 0.0, h, weight, 1 - weight, False, i))
    columns = [np.asarray(column) for column in zip(*rows, strict=True)]
    return Plan(*columns), float(schedule.sigma(times[0]) * scaling.scale(times[0]))


def _slope(t: float, schedule: Schedule, scaling: Scaling) -> tuple[float, float, float, float]:
    """(sigma, s, factor of x, factor of D) of the ODE's right-hand side at time t."""
    sigma, scale = float(schedule.sigma(t)), float(scaling.scale(t))
    relative = float(schedule.derivative(t)) / sigma
    return sigma, scale, relative + float(scaling.derivative(t)) / scale, relative * scale


def run_plan(
    denoise: Denoise,
    latents: Images,
    plan: Plan,
    initial: float,
    *,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """Executes a plan in one scan: float32 state, one trace of the network.

    Args:
        denoise: D(x; sigma), called with a scalar sigma.
        latents: unit normal noise [B, H, W, C].
        plan, initial: from `make_plan`.
        key: one key, or one per image [B], from which the churn's noise is drawn (per step).
        noise: unit normal noise [num_steps, B, H, W, C] to use instead.

    Returns:
        Images [B, H, W, C], about within [-1, 1].

    Raises:
        UserError: a plan that adds noise, without key and noise; or noise of the wrong shape.
    """
    latents = jnp.asarray(latents, jnp.float32)
    stochastic = bool(np.any(plan.churn > 0))
    num_steps = int(plan.step[-1]) + 1
    _check_noise(stochastic, key, noise, (num_steps, *latents.shape))

    def draw(step: jax.Array) -> Images:
        if noise is not None:
            return jnp.asarray(noise, jnp.float32)[step]
        return step_noise(key, step, latents.shape)

    def body(carry: tuple, row: Plan) -> tuple[tuple, None]:
        y, base, d_before = carry
        if stochastic:
            y = row.carry * y + row.churn * draw(row.step)
        d = row.drift * y - row.pull * denoise(y / row.scale, row.sigma)
        base = jnp.where(row.first, y, base)
        y = base + row.dt * (row.now * d + row.before * d_before)
        return (y, base, d), None

    table = jax.tree.map(lambda c: c.astype(np.float32) if c.dtype == np.float64 else c, plan)
    start = latents * np.float32(initial)
    (y, _, _), _ = jax.lax.scan(body, (start, start, jnp.zeros_like(start)), table)
    return y


def _check_noise(
    stochastic: bool, key: Key | None, noise: jax.Array | None, shape: tuple[int, ...]
) -> None:
    if stochastic and key is None and noise is None:
        raise UserError(
            "A sampler with s_churn > 0 draws noise: pass key=jax.random.key(seed) or noise."
        )
    if noise is not None and noise.shape != shape:
        raise UserError(
            f"noise has shape {noise.shape}; this run takes {shape}: [num_steps, *latents]."
        )


def step_noise(key: Key, step: jax.Array | int, shape: tuple[int, ...]) -> Images:
    """Unit normal noise of one step [B, H, W, C]; with a key per image, image by image."""
    if key.shape:
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, step)
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
    return jax.random.normal(jax.random.fold_in(key, step), shape)


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
    round_sigma: Round = lambda sigma: sigma,
) -> Images:
    """EDM's sampler: Heun's method with optional churn (algorithm 2), 2 N - 1 evaluations.

    sigma_i = (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho, sigma_N = 0; the last
    step is Euler's.

    Args:
        denoise: D(x; sigma).
        latents: unit normal noise [B, H, W, C].
        num_steps: N, at least 2.
        sigma_min, sigma_max: range of noise levels, within what the network supports
            (`Denoiser.sigma_min`, `Denoiser.sigma_max`).
        rho: exponent of the grid.
        s_churn, s_min, s_max, s_noise: stochasticity, see `Churn`.
        key: one key, or one per image [B]; needed when s_churn > 0.
        noise: [num_steps, B, H, W, C] unit normal noise that replaces the draws.
        round_sigma: `Denoiser.round_sigma` for networks of discrete noise levels.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: settings that define no grid, or noise that is missing or misshapen.
    """
    schedules.check_steps(num_steps, sigma_min, sigma_max, rho)
    sigmas = schedules.edm_grid(num_steps, sigma_min, sigma_max, rho)
    churn = Churn(s_churn, s_min, s_max, s_noise)
    plan, initial = make_plan(sigmas, churn=churn, round_sigma=round_sigma)
    return run_plan(denoise, latents, plan, initial, key=key, noise=noise)


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
    round_sigma: Round = lambda sigma: sigma,
) -> Images:
    """The sampler of EDM's ablations: any solver, discretization, schedule and scaling (table 1).

    Args:
        denoise, latents, num_steps, rho, key, noise, round_sigma: as in `edm_sampler`.
        solver: euler or heun.
        discretization: where the noise levels lie.
        schedule: sigma(t); vp has the betas that reach sigma_min at epsilon_s and sigma_max at 1.
        scaling: s(t): vp 1 / sqrt(1 + sigma^2), or none.
        sigma_min, sigma_max: None takes the discretization's own (vp: those of beta_d 19.1,
            beta_min 0.1; ve 0.02, 100; iddpm 0.002, 81; edm 0.002, 80).
        epsilon_s: VP's least time.
        c_1, c_2, m: iDDPM's constants and its number of levels.
        alpha: second evaluation at t + alpha h, 0 < alpha <= 1.
        s_churn, s_min, s_max, s_noise: stochasticity, see `Churn`.

    Returns:
        Images [B, H, W, C] float32.

    Raises:
        UserError: an unknown choice, or settings that define no grid.
    """
    for (name, known), value in zip(
        CHOICES.items(), (solver, discretization, schedule, scaling), strict=True
    ):
        if value not in known:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
    if not 0 < alpha <= 1:
        raise UserError(f"alpha is {alpha:g}; it must lie in (0, 1].")
    sigma_min, sigma_max = default_range(discretization, epsilon_s, sigma_min, sigma_max)
    schedules.check_steps(num_steps, sigma_min, sigma_max, rho)
    sigmas = {
        "edm": lambda: schedules.edm_grid(num_steps, sigma_min, sigma_max, rho),
        "vp": lambda: schedules.vp_grid(num_steps, sigma_min, sigma_max, epsilon_s),
        "ve": lambda: schedules.ve_grid(num_steps, sigma_min, sigma_max),
        "iddpm": lambda: schedules.iddpm_grid(
            num_steps, sigma_min, sigma_max, schedules.iddpm_levels(c_1, c_2, m)
        ),
    }[discretization]()
    vp = schedules.vp_schedule(*schedules.vp_betas(sigma_min, sigma_max, epsilon_s))
    chosen = {"vp": vp, "ve": schedules.VE_SCHEDULE, "linear": schedules.LINEAR_SCHEDULE}[schedule]
    plan, initial = make_plan(
        sigmas,
        solver=solver,
        schedule=chosen,
        scaling=schedules.vp_scaling(chosen) if scaling == "vp" else schedules.NO_SCALING,
        alpha=alpha,
        churn=Churn(s_churn, s_min, s_max, s_noise),
        round_sigma=round_sigma,
    )
    return run_plan(denoise, latents, plan, initial, key=key, noise=noise)


def default_range(
    discretization: str, epsilon_s: float, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The discretization's own (sigma_min, sigma_max) where they are None."""
    vp = schedules.vp_schedule(19.1, 0.1)
    low, high = {
        "vp": (float(vp.sigma(epsilon_s)), float(vp.sigma(1.0))),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[discretization]
    return low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max


def to_uint8(images: Images) -> ImagesU8:
    """clip(127.5 x + 128, 0, 255), truncated: how the reference writes its samples."""
    return jnp.clip(images * 127.5 + 128, 0, 255).astype(jnp.uint8)
