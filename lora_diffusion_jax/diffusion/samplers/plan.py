"""A sampling run as a table with one row per evaluation of the network, and the scan that executes it.

The table is written on the host in float64. One `lax.scan` over its rows traces the network once, though
Heun's method calls it at two places, and gives it a scalar noise level shared by all images.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, Key, Labels, Sigma, Variables
from lora_diffusion_jax.diffusion.precond import ALL_LEVELS, Denoiser, Precond
from lora_diffusion_jax.errors import UserError

Table = TypeVar("Table")  # a tuple of columns


class BoundDenoiser(NamedTuple):
    """denoise(x, sigma) with the preconditioning of its network.

    Samplers take any function of x and sigma. If it has an attribute `precond`, they stay within the range
    of noise levels that it supports and round each level to one that it knows. `raw` gives (D, the whole
    output of the network), which holds the variances that networks of a discrete process learn.
    """

    function: Denoise
    precond: Precond
    raw: Callable[[Images, Sigma], tuple[Images, jax.Array]] | None = None

    def __call__(self, x: Images, sigma: Sigma) -> Images:
        return self.function(x, sigma)


def bind(
    denoiser: Denoiser, variables: Variables, class_labels: Labels | None = None
) -> BoundDenoiser:
    """D(x; sigma) of a network with its weights and labels, for a sampler."""
    apply: Callable[..., Any] = denoiser.apply
    return BoundDenoiser(
        lambda x, sigma: apply(variables, x, sigma, class_labels),
        denoiser.precond,
        lambda x, sigma: apply(variables, x, sigma, class_labels, with_raw=True),
    )


def precond_of(denoise: Denoise) -> Precond:
    """The preconditioning whose noise levels a sampler keeps to."""
    return getattr(denoise, "precond", ALL_LEVELS)


class Plan(NamedTuple):
    """The rows of a run, each field [E] for E evaluations (or one row, of scalars).

    With y the state entering a row (unit normal latents at the first), z unit normal noise, d0 the slope of
    the previous row and y0 the state at the last row that was a step's first:
        y  <- carry y + churn z
        d  =  drift y - pull D(y / scale; sigma)
        y  <- base + dt (now d + before d0)             base = y in a step's first row, else y0
    """

    sigma: Any  # noise level that the network is given
    scale: Any  # s: the state is s times a noisy image
    drift: Any
    pull: Any
    dt: Any
    carry: Any = 1.0
    churn: Any = 0.0
    now: Any = 1.0
    before: Any = 0.0
    first: Any = True
    step: Any = 0  # number of the step, of which each draws noise of its own


def stack(rows: Sequence[Plan]) -> Plan:
    """Rows of scalars as a plan of columns."""
    return Plan(*(np.asarray(column) for column in zip(*rows, strict=True)))


def run_plan(
    denoise: Denoise,
    latents: Images,
    plan: Plan,
    *,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """Executes a plan in one scan, with a float32 state.

    Args:
        denoise: D(x; sigma), called with a scalar sigma.
        latents: unit normal noise [B, H, W, C].
        plan: from `make_plan`, `dpmpp_2m_plan` or written by hand.
        key: one key, or one per image [B]; step i draws its noise with fold_in(key, i).
        noise: unit normal noise [num_steps, B, H, W, C] to use instead.

    Returns:
        Images [B, H, W, C], approximately in [-1, 1].

    Raises:
        UserError: a plan that adds noise, without key and noise; noise of the wrong shape; or a plan
            that float32 cannot hold.
    """
    table = to_float32(plan)
    if not all(np.isfinite(column).all() for column in table):
        raise UserError(
            "These settings of the sampler give noise levels or coefficients that float32 cannot hold; "
            "choose sigma_min and sigma_max nearer to 0.002 and 80, and the others nearer to their defaults."
        )
    latents = jnp.asarray(latents, jnp.float32)
    stochastic = bool(np.any(plan.churn > 0))
    who = "A sampler with s_churn > 0" if stochastic else ""
    draw = noise_source(who, key, noise, (int(plan.step[-1]) + 1, *latents.shape))

    def body(carry: tuple, row: Plan) -> tuple[tuple, None]:
        y, base, d_before = carry
        y = row.carry * y
        if stochastic:  # a plan without noise draws none
            y += row.churn * draw(row.step)
        d = row.drift * y - row.pull * denoise(y / row.scale, row.sigma)
        base = jnp.where(row.first, y, base)
        y = base + row.dt * (row.now * d + row.before * d_before)
        return (y, base, d), None

    (y, _, _), _ = jax.lax.scan(body, (latents, latents, jnp.zeros_like(latents)), table)
    return y


def to_float32(table: Table) -> Table:
    """A table written in float64 as the scan runs it."""
    with np.errstate(over="ignore"):  # what becomes infinite is for the caller to see
        return jax.tree.map(lambda c: c.astype(np.float32) if c.dtype == np.float64 else c, table)


def noise_source(
    who: str, key: Key | None, noise: jax.Array | None, shape: tuple[int, ...]
) -> Callable[[jax.Array], Images]:
    """The unit normal noise of a step [B, H, W, C], by its number: drawn with the key, or replayed.

    Args:
        who: what needs the noise, for the error; "" if nothing does, and there may be neither.
        key: one key, or one per image [B]; step i draws with fold_in(key, i).
        noise: replaces the draws.
        shape: what `noise` must have: [steps, B, H, W, C].

    Raises:
        UserError: there is neither key nor noise, or noise has another shape.
    """
    if who and key is None and noise is None:
        raise UserError(f"{who} draws noise: pass key=jax.random.key(seed) or noise.")

    def draw(step: jax.Array) -> Images:
        assert key is not None
        return step_noise(key, step, shape[1:])

    if noise is None:
        return draw
    if noise.shape != shape:
        raise UserError(
            f"noise has shape {noise.shape}; this run takes {shape}: [num_steps, *latents]."
        )
    return lambda step: jnp.asarray(noise, jnp.float32)[step]


def step_noise(key: Key, step: jax.Array | int, shape: tuple[int, ...]) -> Images:
    """Unit normal noise of one step [B, H, W, C]; with a key per image, image by image."""
    if key.shape:
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, step)
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
    return jax.random.normal(jax.random.fold_in(key, step), shape)
