"""The training objective and the sampler of a config."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from lora_diffusion_jax import default_config
from lora_diffusion_jax.array_types import Images, Key, Labels, PyTree, Variables
from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.diffusion import losses, precond, samplers, schedules
from lora_diffusion_jax.errors import UserError


class Objective(NamedTuple):
    """A training loss in two parts: what it draws at random, and its value given the draws."""

    draw: Callable[[Key, tuple[int, ...]], PyTree]
    loss: Callable[..., Images]


def build_objective(config: ConfigDict, denoiser: precond.Denoiser) -> Objective:
    """The training objective of a config.

    `draw(key, shape)` gives sigma [B], the augmentation's draws, unit noise and the key of the dropout,
    each from a key of its own; `loss(variables, images, labels, draws, train)` gives the loss per
    pixel [B, H, W, C].
    """
    draw_sigma, weighted = _loss_parts(config, denoiser.precond)
    augment_p = config.augment.p
    feed_augment_labels = augment_p > 0 and config.model.augment_dim > 0
    base_frozen = config.train.freeze_base

    def draw(key: Key, shape: tuple[int, ...]) -> PyTree:
        k_sigma, k_augment, k_noise, k_dropout = jax.random.split(key, 4)
        return {
            "sigma": draw_sigma(k_sigma, shape[0]),
            "augment": augmentation.draw(k_augment, shape[0], p=augment_p),
            "noise": jax.random.normal(k_noise, shape),
            "dropout": k_dropout,
        }

    def loss(
        variables: Variables, images: Images, labels: Labels | None, draws: PyTree, train: bool
    ) -> Images:
        augment_labels = None
        if augment_p > 0:
            images, augment_labels = augmentation.augment(images, draws["augment"])

        def denoise(x: Images, sigma: jax.Array) -> Images:
            return denoiser.apply(
                variables,
                x,
                sigma,
                labels,
                augment_labels if feed_augment_labels else None,
                train and not base_frozen,  # a frozen base stays in evaluation mode
                rngs={"dropout": draws["dropout"]},
            )

        return weighted(denoise, images, draws["sigma"], draws["noise"])

    return Objective(draw, loss)


def _loss_parts(config: ConfigDict, pre: precond.Precond) -> tuple[Callable, Callable]:
    """(draw of sigma, loss) that belong to a preconditioning."""
    if config.precond.name == "vp":
        draw = functools.partial(
            losses.vp_sigma, beta_d=pre.beta_d, beta_min=pre.beta_min, epsilon_t=pre.epsilon_t
        )
        return draw, losses.vp_loss
    if config.precond.name == "ve":
        draw = functools.partial(losses.ve_sigma, sigma_min=pre.sigma_min, sigma_max=pre.sigma_max)
        return draw, losses.ve_loss
    if config.precond.name == "iddpm":
        levels = pre.levels()[:-1]
        return functools.partial(losses.iddpm_sigma, levels=levels), losses.vp_loss
    return losses.edm_sigma, functools.partial(losses.edm_loss, sigma_data=pre.sigma_data)


def build_sampler(config: ConfigDict, denoiser: precond.Denoiser) -> Callable[..., Images]:
    """The sampler of `config.sampler`, within the range of noise levels the network supports.

    Raises:
        UserError: settings that define no grid, before anything is compiled.
    """
    s = config.sampler
    ablation = s.name == "ablation"
    discretization = s.discretization if ablation else "edm"
    low, high = samplers.default_range(discretization, s.epsilon_s, s.sigma_min, s.sigma_max)
    schedules.check_steps(s.num_steps, low, high, s.rho)
    same = ("num_steps", "rho", "s_churn", "s_min", "s_max", "s_noise")
    settings = {
        **{field: s[field] for field in same},
        "sigma_min": max(low, denoiser.sigma_min),
        "sigma_max": min(high, denoiser.sigma_max),
        "round_sigma": denoiser.round_sigma,
    }
    own = (
        "solver",
        "discretization",
        "schedule",
        "scaling",
        "alpha",
        "epsilon_s",
        "c_1",
        "c_2",
        "m",
    )
    if not ablation:
        usual = default_config.base().sampler
        unused = [f"sampler.{field}={s[field]}" for field in own if s[field] != usual[field]]
        if unused:
            raise UserError(
                f"{', '.join(unused)} would be without effect: sampler.name=edm has no such choice. "
                "Set sampler.name=ablation, or leave it out."
            )
        return functools.partial(samplers.edm_sampler, **settings)
    return functools.partial(samplers.ablation_sampler, **settings, **{f: s[f] for f in own})
