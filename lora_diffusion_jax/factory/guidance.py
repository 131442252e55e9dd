"""What samplers see of a network: D(x; sigma) with a config's guidance and its adapters' scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Images, Labels, Sigma, Variables
from lora_diffusion_jax.diffusion import guidance
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.diffusion.samplers import BoundDenoiser, bind
from lora_diffusion_jax.factory.checks import scales_adapters
from lora_diffusion_jax.factory.networks import fold_lora
from lora_diffusion_jax.generate import Bind


def build_bind(config: ConfigDict, weaker: Denoiser | None = None, *, fold: bool = False) -> Bind:
    """The function (denoiser, variables, labels) -> D(x; sigma) with the config's guidance.

    Args:
        config: with the groups `guidance` and `lora`.
        weaker: with guidance.name=autoguidance, the network that guides. The variables are then
            {'network', 'weaker'}.
        fold: for one label [1, num_classes] and scalar noise levels, without guidance: folds the adapters
            into the base at each noise level, once for all images.
    """
    name = config.guidance.name
    if name == "none" and not scales_adapters(config) and not fold:
        return bind

    def bind_guided(
        denoiser: Denoiser, variables: Variables, labels: Labels | None
    ) -> BoundDenoiser:
        others = variables.get("weaker", {})
        network = variables.get("network", variables)
        apply = functools.partial(_apply, config, denoiser, network, fold=fold)
        denoise = BoundDenoiser(
            lambda x, sigma: apply(x, sigma, labels),
            denoiser.precond,
            lambda x, sigma: apply(x, sigma, labels, with_raw=True),
        )
        if name == "none":
            return denoise

        def twice(x: Images, sigma: Sigma) -> tuple[Images, Images]:
            """D and D' of shared weights, in one call on pairs of rows, which stay on their device."""
            sigma = jnp.repeat(sigma, 2) if jnp.ndim(sigma) else sigma
            rows, factors = labels, None
            if name == "classifier_free":
                assert labels is not None  # `checks` sees to it
                rows = _pairs(labels, jnp.zeros_like(labels))
            else:
                rows = None if labels is None else jnp.repeat(labels, 2, axis=0)
                own = jnp.full(len(x), config.lora.scale)
                factors = _pairs(own, jnp.full(len(x), config.guidance.lora_scale))
            both = apply(jnp.repeat(x, 2, axis=0), sigma, rows, factors)
            return both[::2], both[1::2]

        def two(x: Images, sigma: Sigma) -> tuple[Images, Images]:
            assert weaker is not None
            return denoise(x, sigma), weaker.apply(others, x, sigma, labels)  # type: ignore[return-value]

        pair = two if name == "autoguidance" else twice
        interval = config.guidance.interval or guidance.ALL_SIGMA
        return guidance.guide(denoise, pair, config.guidance.scale, interval)

    return bind_guided


def _pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows of two arrays in turn."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def _apply(
    config: ConfigDict,
    denoiser: Denoiser,
    variables: Variables,
    x: Images,
    sigma: Sigma,
    labels: Labels | None,
    factors: jax.Array | None = None,
    *,
    with_raw: bool = False,
    fold: bool = False,
) -> Any:
    """D(x; sigma) with the adapters scaled: by `factors` [B], or None by lora.scale, in lora.interval."""
    if factors is not None or scales_adapters(config):
        scale = jnp.asarray(config.lora.scale if factors is None else factors, jnp.float32)
        if config.lora.interval:
            scale = jnp.where(guidance.is_inside(sigma, config.lora.interval), scale, 0.0)
        variables = lora.with_scale(variables, scale, config.lora.scaled)
    if fold:
        denoiser, variables = fold_lora(denoiser, variables, sigma, labels)
    return denoiser.apply(variables, x, sigma, labels, with_raw=with_raw)
