"""The training objective of one step: draw noise, augment, denoise, weight the error."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lora_diffusion_jax.array_types import AugmentLabels, Images, Key, Labels, PyTree, Variables
from lora_diffusion_jax.diffusion.losses import ddpm_terms, weighted_loss
from lora_diffusion_jax.diffusion.precond import DDPM, Denoiser


class Augmentation(NamedTuple):
    """Random changes of the training images.

    Attributes:
        draw: (key, batch) -> random numbers, arrays with one row per image.
        apply: (images, draws) -> changed images and labels for the network, or None.
    """

    draw: Callable[[Key, int], PyTree]
    apply: Callable[[Images, PyTree], tuple[Images, AugmentLabels | None]]


class Objective(NamedTuple):
    """A training loss in two parts: what it draws at random, and its value given the draws.

    Attributes:
        denoiser: the network; its preconditioning gives noise levels and weights.
        augmentation: None leaves the images alone.
        dropout: False keeps the network in evaluation mode, as a frozen base wants it.
    """

    denoiser: Denoiser
    augmentation: Augmentation | None = None
    dropout: bool = True

    def draw(self, key: Key, shape: tuple[int, ...]) -> PyTree:
        """Random numbers of a batch of this shape [B, H, W, C], each kind from a key of its own.

        Returns:
            {'sigma' [B], 'noise' [B, H, W, C], 'dropout' (a key), 'augment'; for a discrete process
            'quartile' [B], that of the timestep}.
        """
        precond = self.denoiser.precond
        k_sigma, k_augment, k_noise, k_dropout = jax.random.split(key, 4)
        draws = {
            "sigma": precond.draw_sigma(k_sigma, shape[0]),
            "noise": jax.random.normal(k_noise, shape),
            "dropout": k_dropout,
        }
        if isinstance(precond, DDPM):
            draws["quartile"] = 4 * precond.nearest(draws["sigma"]) // precond.num_steps
        if self.augmentation:
            draws["augment"] = self.augmentation.draw(k_augment, shape[0])
        return draws

    def loss(
        self,
        variables: Variables,
        images: Images,
        labels: Labels | None,
        draws: PyTree,
        train: bool,
    ) -> dict[str, Images]:
        """The loss per pixel [B, H, W, C], by the terms that it is the sum of: {'loss'}, or {'mse', 'vb'}.

        Args:
            variables: of the denoiser.
            images: clean images [B, H, W, C] in [-1, 1].
            labels: class labels [B, num_classes], or None.
            draws: from `draw`.
            train: dropout on.
        """
        augment_labels = None
        if self.augmentation:
            images, augment_labels = self.augmentation.apply(images, draws["augment"])
        precond, sigma, noise = self.denoiser.precond, draws["sigma"], draws["noise"]
        denoise: Any = functools.partial(
            self.denoiser.apply,
            variables,
            class_labels=labels,
            augment_labels=augment_labels,
            train=train and self.dropout,
            rngs={"dropout": draws["dropout"]},
        )
        if isinstance(precond, DDPM):
            denoise = functools.partial(denoise, with_raw=True)
            return ddpm_terms(precond, denoise, images, sigma, noise)
        return {"loss": weighted_loss(precond, denoise, images, sigma, noise)}
