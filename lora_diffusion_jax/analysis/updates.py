"""How large the adapters' updates are beside the weights, and what is lost without them."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Images, Labels, PyTree, Variables
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.keys import ANALYSIS, purpose_key
from lora_diffusion_jax.paths import ADAPTER


def update_norms(params: PyTree, weights: Mapping[str, Any]) -> dict[str, Float[Array, " B"]]:
    """||sum_i omega_i B_i A_i||_F at every site, for one condition per row of the weights.

    The biases of adapters do not count.

    Args:
        params: parameters with adapters.
        weights: site -> omega [B or 1, m], or a dictionary of these: `lora.composition_weights`.
    """
    pairs = {k: v for k, v in flatten_dict(params).items() if ADAPTER in k}
    pairs = {k: v for k, v in pairs.items() if k[-2:] in (("down", "kernel"), ("up", "kernel"))}
    kernels = {(*site.split("/"), "kernel"): kernel for site, kernel in _kernels(params).items()}
    # On a base of zeros, what `lora.fold` gives is the update alone.
    zeros = {path: jnp.zeros(kernel.shape) for path, kernel in kernels.items()}
    adapted = unflatten_dict({**zeros, **pairs})

    def norms(adapted: PyTree, omegas: Any) -> dict[str, Array]:
        folded = flatten_dict(lora.fold(adapted, omegas))
        return {"/".join(path[:-1]): jnp.linalg.norm(folded[path].ravel()) for path in kernels}

    rows = max(len(omega) for omega in jax.tree.leaves(weights))
    whole = jax.tree.map(lambda w: jnp.broadcast_to(w, (rows, w.shape[-1])), dict(weights))
    rows_of = jax.jit(lambda tree, omegas: jax.lax.map(functools.partial(norms, tree), omegas))
    return rows_of(adapted, whole)


def base_norms(params: PyTree) -> dict[str, float]:
    """||W||_F at every site."""
    return {site: float(np.linalg.norm(kernel)) for site, kernel in _kernels(params).items()}


def _kernels(params: PyTree) -> dict[str, Any]:
    flat = flatten_dict(params, sep="/")
    return {site: flat[f"{site}/kernel"] for site in lora.list_sites(params)}


def without_adapters(params: PyTree, site: str | None = None) -> PyTree:
    """The parameters with those of one site's adapters all zero, or of all sites: they add nothing."""
    start = () if site is None else (*site.split("/"), ADAPTER)

    def off(path: tuple[str, ...]) -> bool:
        return ADAPTER in path and path[: len(start)] == start

    flat = flatten_dict(params)
    return unflatten_dict({k: np.zeros_like(v) if off(k) else v for k, v in flat.items()})


def ablate(
    loss: Callable[[Variables], np.ndarray],
    variables: Variables,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A loss as it is, without each site's adapters, and without all.

    Args:
        loss: of some variables; the same images, noise levels and noise in every call.
        variables: with adapters.
        between: called ahead of every evaluation; it may raise to stop.

    Returns:
        The loss's value; one per site [S, ...], in the order of `lora.list_sites`; one without any.
    """

    def without(site: str | None) -> np.ndarray:
        between()
        return loss({**variables, "params": without_adapters(variables["params"], site)})

    between()
    whole = loss(variables)
    sites = lora.list_sites(variables["params"])
    return whole, np.stack([without(site) for site in sites]), without(None)


def loss_by_level(
    objective: Objective,
    images: Images,
    labels: Labels | None,
    noise: Images,
    sigmas: np.ndarray,
) -> Callable[[Variables], np.ndarray]:
    """A function of a network's variables: its training loss [N, B] per noise level and image.

    It is the mean over pixels, in evaluation mode. Every level and every call adds the same noise.

    Args:
        objective: the network and its loss.
        images: clean images [B, H, W, C] in [-1, 1].
        labels: class labels [B, num_classes], or None.
        noise: unit normal noise of the images' shape.
        sigmas: noise levels [N] that the network knows.
    """
    losses = jax.jit(functools.partial(level_losses, objective))
    levels = jnp.asarray(sigmas, jnp.float32)
    return lambda variables: np.asarray(losses(variables, images, labels, noise, levels))


def noise_of(numbers: np.ndarray, shape: tuple[int, ...]) -> Images:
    """Unit normal noise [N, H, W, C] of images [H, W, C]: a function of each one's number in the data set."""

    def draw(number: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(purpose_key(0, ANALYSIS), number), shape)

    return jax.vmap(draw)(jnp.asarray(numbers, jnp.uint32))


def level_losses(
    objective: Objective,
    variables: Variables,
    images: Images,
    labels: Labels | None,
    noise: Images,
    sigmas: Float[Array, " N"],
) -> Float[Array, "N B"]:
    """The training loss per noise level and image that `loss_by_level` describes."""

    def level(sigma: Array) -> Array:
        draws = {"sigma": jnp.full(len(images), sigma), "noise": noise}
        draws["dropout"] = jax.random.key(0)  # off
        terms = objective.loss(variables, images, labels, draws, False)
        return jax.tree.reduce(operator.add, terms).mean(axis=(1, 2, 3))

    return jax.lax.map(level, sigmas)
