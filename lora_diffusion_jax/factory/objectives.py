"""The training objective and the sampler of a config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import default_config
from lora_diffusion_jax.array_types import AugmentLabels, Images, PyTree
from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.diffusion.guidance import ALL_SIGMA, is_inside
from lora_diffusion_jax.diffusion.losses import check_loss
from lora_diffusion_jax.diffusion.objective import Augmentation, Objective
from lora_diffusion_jax.diffusion.precond import DDPM, Denoiser
from lora_diffusion_jax.diffusion.samplers import SAMPLERS, BoundDenoiser
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import CLASS_ADAPTERS, scales_adapters


def build_objective(config: ConfigDict, denoiser: Denoiser) -> Objective:
    """The loss of the network's preconditioning, with the config's augmentation.

    Raises:
        UserError: the hybrid loss for a network that does not learn variances, or label dropout that
            ClassLoRA would not see.
    """
    precond = denoiser.precond
    if isinstance(precond, DDPM) and config.model.get("learn_sigma") is False:
        check_loss(precond, learned=False)
    class_pairs = config.lora.mode != "baseline" and config.lora.adapter in CLASS_ADAPTERS
    if config.model.label_dropout and class_pairs:
        raise UserError(
            f"model.label_dropout is {config.model.label_dropout}, which drops labels in the class embedding "
            f"alone, and lora.adapter={config.lora.adapter} would still see them; set it to 0, or choose "
            "lora.adapter=uc or time."
        )
    augment = build_augmentation(config) if config.augment.p > 0 else None
    # Dropout would disturb a frozen base, whose activations the adapters rely on.
    return Objective(denoiser, augment, dropout=not config.train.freeze_base)


def build_augmentation(config: ConfigDict) -> Augmentation:
    """EDM's augmentation; its labels reach the network if that has a layer for them."""

    def apply(images: Images, draws: PyTree) -> tuple[Images, AugmentLabels | None]:
        images, labels = augmentation.augment(images, draws)
        return images, labels if config.model.augment_dim else None

    return Augmentation(functools.partial(augmentation.draw, p=config.augment.p), apply)


def build_sampler(config: ConfigDict, denoiser: Denoiser) -> Callable[..., Images]:
    """The sampler (denoise, latents, *, key) -> images of `config.sampler`.

    Raises:
        UserError: settings that the sampler does not have, or that define no grid within the noise
            levels of the network; before anything is compiled.
    """
    name, known = config.sampler.name, default_config.sampler(config.sampler.name)
    unknown = [f"sampler.{field}" for field in config.sampler if field not in known]
    if unknown:
        raise UserError(
            f"sampler.name={name} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known))}. Write config.sampler = default_config.sampler({name!r}) "
            "in a config file to choose a sampler with its settings."
        )
    settings = {
        k: v for k, v in config.sampler.items() if k not in ("name", *default_config.EXECUTION)
    }
    sampler = functools.partial(SAMPLERS[name], **settings)
    evaluations(sampler, denoiser)
    return sampler


def sampler_settings(config: ConfigDict) -> dict[str, Any]:
    """The settings that decide what the samples are: of the sampler, and of guidance and adapters if set."""
    settings = {k: v for k, v in config.sampler.items() if k not in default_config.EXECUTION}
    if config.guidance.name != "none":
        settings["guidance"] = config.guidance.to_dict()
    if scales_adapters(config):
        settings["adapters"] = {k: config.lora[k] for k in ("scale", "interval", "scaled")}
    return settings


def refuse_changes(config: ConfigDict, who: str) -> None:
    """Raises UserError if the config changes the network in sampling: guidance, scaled adapters."""
    if sampler_settings(config).keys() & {"guidance", "adapters"}:
        raise UserError(
            f"{who} measures the network as it was trained; leave out guidance.*, lora.scale and "
            "lora.interval."
        )


def count_evaluations(
    config: ConfigDict, sampler: Callable[..., Images], denoiser: Denoiser
) -> int:
    """How many evaluations of a network an image takes, those of guidance included."""
    if config.guidance.name == "none" or config.guidance.scale == 1:
        return evaluations(sampler, denoiser)
    interval = config.guidance.interval or ALL_SIGMA
    levels = visited_levels(sampler, denoiser)
    return len(levels) + sum(bool(is_inside(level, interval)) for level in levels)


def visited_levels(sampler: Callable[..., Images], denoiser: Denoiser) -> list[np.float32]:
    """The noise levels of a sampling run's evaluations, in no certain order; runs it on a single number."""
    levels: list[np.float32] = []

    def denoise(x: Images, sigma: jax.Array) -> Images:
        jax.debug.callback(lambda level: levels.append(np.float32(level)), sigma)
        return x

    bound = BoundDenoiser(denoise, denoiser.precond)
    latents = np.zeros((1, 1, 1, 1), np.float32)
    jax.block_until_ready(jax.jit(lambda x: sampler(bound, x, key=jax.random.key(0)))(latents))
    jax.effects_barrier()
    return levels


def evaluations(sampler: Callable[..., Images], denoiser: Denoiser) -> int:
    """How often a sampling run evaluates the network; nothing is compiled.

    Raises:
        UserError: the sampler does not suit the network.
    """

    @jax.jit
    def denoise(x: Images, sigma: jax.Array) -> Images:
        return x

    bound = BoundDenoiser(lambda x, sigma: denoise(x, sigma), denoiser.precond)
    latents = jax.ShapeDtypeStruct((1, 1, 1, 1), "float32")
    traced = jax.make_jaxpr(lambda x, key: sampler(bound, x, key=key))(latents, jax.random.key(0))

    def count(jaxpr: jax.extend.core.Jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                total += equation.params["length"] * count(equation.params["jaxpr"].jaxpr)
            total += equation.params.get("name") == "denoise"  # the function above
        return total

    return count(traced.jaxpr)
