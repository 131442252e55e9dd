"""Settings found on trajectories of the network: a grid of noise levels, and where Heun's method pays."""

import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images
from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.samplers.plan import precond_of, trace_plan
from lora_diffusion_jax.diffusion.samplers.solvers import make_plan
from lora_diffusion_jax.errors import UserError

DISCOUNT = 1.15  # of later steps, as in GITS: their errors had no time to shrink


def searched_grid(
    denoise: Denoise,
    latents: Images,
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    to_zero: bool = True,
    fine_steps: int = 60,
) -> np.ndarray:
    """Noise levels chosen out of a fine grid by dynamic programming (GITS, Chen et al. 2024).

    The fine grid is solved by Heun's method. The cost of a step from level i to j is how much farther
    Euler's step leads from the chord of the trajectory than the trajectory itself is, at j; the levels
    minimise the costs' sum, with DISCOUNT for each step that is still to come.

    Args:
        denoise: D(x; sigma), as of `bind`.
        latents: unit normal noise [B, H, W, C] of the trajectories to choose on.
        num_steps, sigma_min, sigma_max, rho, to_zero: of the sampler that the levels are for.
        fine_steps: of the fine grid.

    Returns:
        Noise levels, float64 [num_steps] or, without to_zero, [num_steps + 1]; for `sigmas` of a sampler
        with grid=searched.

    Raises:
        UserError: the fine grid has fewer levels, or the settings define no grid.
    """
    precond = precond_of(denoise)
    ends = precond.clip(sigma_min, sigma_max)
    count = num_steps + (not to_zero)
    schedules.check_grid(count, *ends)
    fine = np.unique(precond.round_sigma(schedules.edm_grid(fine_steps + 1, *ends, rho)))[::-1]
    if count > len(fine):
        raise UserError(
            f"A grid of {count} levels cannot be chosen out of {len(fine)}; take fewer steps, or more "
            "fine_steps."
        )
    plan = make_plan(fine, precond=precond)
    states, slopes = trace_plan(denoise, latents, plan)
    first = np.flatnonzero(plan.first)
    costs = _step_costs(fine, np.asarray(states[first]), np.asarray(slopes[first]))
    return fine[cheapest_path(costs, count - 1, DISCOUNT)]


def _step_costs(levels: np.ndarray, states: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The cost of Euler's step from each level to each later one, [N, N]; infinite to earlier ones."""
    n, batch = states.shape[:2]
    states, slopes = states.reshape(n, batch, -1), slopes.reshape(n, batch, -1)
    chord = states[-1] - states[0]
    chord = chord / np.linalg.norm(chord, axis=-1, keepdims=True)

    def deviation(x: np.ndarray) -> np.ndarray:
        """Mean distance from the chord, over the batch."""
        x = x - states[0]
        along = np.sum(x * chord, axis=-1, keepdims=True) * chord
        return np.linalg.norm(x - along, axis=-1).mean(axis=-1)

    own = deviation(states)
    costs = np.full((n, n), np.inf)
    for i in range(n - 1):
        h = (levels[i + 1 :] - levels[i])[:, None, None]
        costs[i, i + 1 :] = deviation(states[i] + h * slopes[i]) - own[i + 1 :]
    return costs


def cheapest_path(costs: np.ndarray, num_steps: int, discount: float = 1.0) -> np.ndarray:
    """The cheapest path of so many steps from the first to the last place: its places, [num_steps + 1].

    Args:
        costs: [N, N]; only steps to later places are taken.
        num_steps: 1 to N - 1.
        discount: factor of the costs of all later steps, at each step.
    """
    n = len(costs)
    costs = np.where(np.triu(np.ones((n, n), bool), 1), costs, np.inf)
    rest, choices = costs[:, -1], []  # cheapest cost from each place to the last
    for _ in range(num_steps - 1):
        total = costs + discount * rest
        choices.append(total.argmin(axis=1))
        rest = total.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return np.array([*path, n - 1])


def find_euler_steps(
    denoise: Denoise, latents: Images, sigmas: np.ndarray, tolerance: float = 0.05
) -> int:
    """How many of the first steps Heun's method does not need, for `euler_steps` of the sampler heun.

    On a trajectory of Heun's method: the steps before the first in which the slope turns or grows by
    more than the tolerance, |d' - d| > tolerance |d| in the root mean square over the batch.

    Args:
        denoise: D(x; sigma), as of `bind`.
        latents: unit normal noise [B, H, W, C] of the trajectory.
        sigmas: noise levels [N], decreasing; a final 0 is added.
        tolerance: relative change of the slope.
    """
    plan = make_plan(sigmas, precond=precond_of(denoise))
    _, slopes = trace_plan(denoise, latents, plan)
    size = np.asarray(jnp.sqrt(jnp.mean(slopes**2, axis=(1, 2, 3, 4))))
    change = np.asarray(jnp.sqrt(jnp.mean(jnp.diff(slopes, axis=0) ** 2, axis=(1, 2, 3, 4))))
    first = np.flatnonzero(plan.first)[:-1]  # the last step has a single slope
    turns = change[first] > tolerance * size[first]
    return int(turns.argmax()) if turns.any() else len(first)
