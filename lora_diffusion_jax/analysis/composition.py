"""Composition weights over noise levels and classes: tables, similarity, principal components."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Labels, Variables
from lora_diffusion_jax.diffusion.precond import Denoiser, Precond

# The noise levels of EDM's sampler, for networks that support every one.
LOWEST, HIGHEST = 0.002, 80.0
_FINE = 20_001  # noise levels that are chosen from


def noise_levels(precond: Precond, count: int) -> np.ndarray:
    """Noise levels that a network knows, equally spaced in its own time, ascending, float64.

    A discrete process of fewer steps than `count` gives fewer.
    """
    low = precond.sigma_min or LOWEST
    high = precond.sigma_max if np.isfinite(precond.sigma_max) else HIGHEST
    fine = np.unique(precond.round_sigma(np.geomspace(low, high, _FINE)))
    time = np.asarray(precond.time(precond.coefficients(jnp.asarray(fine, jnp.float32)).noise))
    wanted = np.linspace(time[0], time[-1], count)
    return fine[np.unique(np.abs(time - wanted[:, None]).argmin(axis=1))]


def by_adapter(weights: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """`lora.composition_weights` by adapter: name, '' for a single one -> site -> omega [B or 1, m]."""
    found: dict[str, dict[str, Array]] = {}
    for site in sorted(weights):
        parts = weights[site] if isinstance(weights[site], Mapping) else {(): weights[site]}
        for name, omega in parts.items():
            found.setdefault("/".join(name), {})[site] = omega
    return found


def composition_table(
    denoiser: Denoiser, variables: Variables, sigmas: np.ndarray, labels: Labels | None = None
) -> dict[str, Any]:
    """Composition weights of every site at every noise level and class label.

    The network itself is not run: XLA leaves out what the weights do not depend on.

    Args:
        denoiser: with LoRA attached.
        variables: its variables.
        sigmas: noise levels [N].
        labels: class labels [K, num_classes]; None: none, and K = 1.

    Returns:
        What `lora.composition_weights` does, with omega [N, K, m].
    """
    unet = denoiser.model.module
    shape = (len(sigmas), unet.image_size, unet.image_size, unet.in_channels)

    @jax.jit
    def weights(variables: Variables, label: Labels | None) -> Any:
        sigma = jnp.asarray(sigmas, jnp.float32)
        found = lora.composition_weights(denoiser, variables, jnp.zeros(shape), sigma, label)
        return jax.tree.map(lambda w: jnp.broadcast_to(w, (shape[0], w.shape[-1])), found)

    rows = [None] if labels is None else [labels[k : k + 1] for k in range(len(labels))]
    tables = [jax.tree.map(np.asarray, weights(variables, row)) for row in rows]
    return jax.tree.map(lambda *parts: np.stack(parts, axis=1), *tables)


def cosine_similarity(omega: Float[Any, "*any N m"]) -> Float[Any, "*any N N"]:
    """Cosine similarity between the composition weights of every two conditions.

    A condition whose weights are all zero is similar to none: 0.
    """
    omega = np.asarray(omega, np.float64)
    length = np.linalg.norm(omega, axis=-1, keepdims=True)
    unit = omega / np.where(length > 0, length, 1)
    return unit @ np.swapaxes(unit, -1, -2)


def principal_components(omega: Float[Any, "N m"]) -> tuple[np.ndarray, np.ndarray]:
    """The two directions in which the weights vary most.

    Returns:
        Coordinates [N, 2], and the share of the variance that each explains [2]. The sign of a component
        is such that the last condition's coordinate is not negative.
    """
    centred = np.asarray(omega, np.float64) - np.mean(omega, axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    scores, variance = np.zeros((len(centred), 2)), np.zeros(2)
    count = min(2, len(values))
    scores[:, :count], variance[:count] = left[:, :count] * values[:count], values[:count] ** 2
    scores *= np.where(scores[-1] < 0, -1, 1)
    return scores, variance / max(np.sum(values**2), np.finfo(float).tiny)
