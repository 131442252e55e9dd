"""Conditions in between and beyond: through the adapters, through scale-and-shift, or through both.

A condition at weight w between a and b is the class label (1 - w) a + w b, or the noise level sigma f^w in
place of the true sigma. Weights outside [0, 1] extrapolate. The route that is not taken stays at a.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Images, Labels, Sigma, Variables
from lora_diffusion_jax.diffusion.precond import Coefficients, Denoiser, Precond
from lora_diffusion_jax.factory.networks import fold_lora

ROUTES = ("adapters", "scale_and_shift", "both")


@dataclasses.dataclass(frozen=True)
class Told(Precond):
    """A preconditioning whose network is told another noise level than the image has.

    Attributes:
        true: gives all coefficients but c_noise.
        factor: c_noise is that of factor times sigma.
    """

    true: Precond
    factor: Any

    def coefficients(self, sigma: Sigma) -> Coefficients:
        """Those of sigma, with the c_noise of factor times sigma."""
        told = self.true.coefficients(self.factor * sigma).noise
        return self.true.coefficients(sigma)._replace(noise=told)

    def draw_sigma(self, key: jax.Array, n: int) -> jax.Array:
        """As the true one."""
        return self.true.draw_sigma(key, n)

    def time(self, c_noise: jax.Array) -> jax.Array:
        """As the true one."""
        return self.true.time(c_noise)


@dataclasses.dataclass(frozen=True)
class TwoConditions:
    """A denoiser whose adapters and whose scale-and-shift have conditions of their own.

    Called as `Denoiser.apply` is. Its labels are rows from `condition_rows`, of which the adapters' half
    must be the same for all images: at every noise level the adapters are folded into the base for it.

    Attributes:
        denoiser: with LoRA attached.
    """

    denoiser: Denoiser

    @property
    def precond(self) -> Precond:
        """The denoiser's."""
        return self.denoiser.precond

    @property
    def num_classes(self) -> int:
        """Width of the rows."""
        return 2 * (self.denoiser.num_classes + 1)

    def apply(
        self, variables: Variables, x: Images, sigma: Sigma, rows: Labels, **more: Any
    ) -> Any:
        """D(x; sigma), and the raw output if asked for, under the rows [B, num_classes]."""
        of_adapters, of_affine = jnp.split(rows[:1], 2, axis=-1)
        (label, log_factor), (affine_label, affine_log_factor) = (
            (half[:, :-1] if self.denoiser.num_classes else None, half[0, -1])
            for half in (of_adapters, of_affine)
        )
        told = jnp.exp(log_factor) * sigma
        base, folded = fold_lora(self.denoiser, variables, told, label)
        base = base.clone(precond=Told(base.precond, jnp.exp(affine_log_factor)))
        return base.apply(folded, x, sigma, affine_label, **more)


def condition_rows(
    route: str,
    weights: np.ndarray,
    start: np.ndarray | None = None,
    end: np.ndarray | None = None,
    factor: float = 1.0,
) -> np.ndarray:
    """Conditions between two along a route, float32 [W, 2 (num_classes + 1)], for `TwoConditions`.

    Args:
        route: one of ROUTES.
        weights: w, 0 at the first condition and 1 at the second.
        start, end: their class labels [num_classes]; None for a network without classes.
        factor: times which the second condition's noise level is the true one.
    """
    first, second = (
        np.append(np.zeros(0) if label is None else label, log)
        for label, log in ((start, 0.0), (end, np.log(factor)))
    )
    mixed = first + np.asarray(weights)[:, None] * (second - first)
    fixed = np.broadcast_to(first, mixed.shape)
    of_adapters = fixed if route == "scale_and_shift" else mixed
    of_affine = fixed if route == "adapters" else mixed
    return np.concatenate([of_adapters, of_affine], axis=1).astype(np.float32)


def guided_rows(route: str, weights: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Conditions w c + (1 - w) 0 of a class's label c and that of no class, [W, 2 (num_classes + 1)].

    Classifier-free guidance extrapolates what the network returns for the two labels, this the condition
    itself. The route that is not taken has c, and so have all at weight 1.

    Args:
        route: one of ROUTES.
        weights: w.
        label: c, [num_classes].
    """
    # From the class, 1 - w of the way to no class: beyond 1 in the other direction.
    return condition_rows(route, 1 - np.asarray(weights), label, np.zeros_like(label))


def smoothness(points: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    """How evenly samples change along a path of conditions.

    Args:
        points: pixels or features [W, N, ...] of N samples, each from one seed, at W ascending weights.
        weights: [W], among them 0 and 1.

    Returns:
        `ends`: Euclidean distance between weight 0 and 1, mean over samples. `step`: mean distance
        between neighbouring weights in [0, 1], relative to `ends`. `path`: the sum of these distances
        relative to `ends`, 1 for a straight line. `largest`: the largest of them relative to their mean,
        1 for an even path. All but `ends` are None if that is 0.
    """
    inside = (weights >= 0) & (weights <= 1)
    points = np.asarray(points, np.float64).reshape(*points.shape[:2], -1)[inside]
    ends = np.linalg.norm(points[-1] - points[0], axis=-1).mean()
    steps = np.linalg.norm(np.diff(points, axis=0), axis=-1).mean(axis=1)
    if ends == 0:
        return {"ends": 0.0, "step": None, "path": None, "largest": None}
    found = {"ends": ends, "step": steps.mean() / ends, "path": steps.sum() / ends}
    return {k: float(v) for k, v in (found | {"largest": steps.max() / steps.mean()}).items()}
