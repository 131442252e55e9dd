"""Exponential moving average of the weights, its memory stated as a half-life in images."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ema:
    """EDM's average (Karras et al. 2022, appendix F.2; half-lives from Karras et al. 2020).

    After every step of B images, ema <- net + beta (ema - net) with beta = 0.5 ** (B / h) and
    h = min(halflife, rampup_ratio * images seen before the step). The first step has h = 0 and so
    beta = 0: the average starts as the network after it, and quickly discounts early iterates.
    """

    halflife_images: float  # > 0
    rampup_ratio: float | None = 0.05  # None: the half-life is constant from the start

    def __post_init__(self):
        if not self.halflife_images > 0:
            raise UserError(f"ema half-life {self.halflife_images} images; it must be above 0.")
        if self.rampup_ratio is not None and not self.rampup_ratio > 0:
            raise UserError(
                f"train.ema_rampup_ratio is {self.rampup_ratio}; it must be above 0, or 0 for none."
            )

    def beta(self, images_seen: Float[Array, ""], batch_size: int) -> Float[Array, ""]:
        """Share of the old average that a step of `batch_size` images keeps, in [0, 1)."""
        halflife = jnp.float32(self.halflife_images)
        if self.rampup_ratio is not None:
            halflife = jnp.minimum(halflife, self.rampup_ratio * images_seen)
        return jnp.exp2(-batch_size / jnp.maximum(halflife, 1e-8))

    def update(
        self, ema: PyTree, params: PyTree, images_seen: Float[Array, ""], batch_size: int
    ) -> PyTree:
        """The average after a step that led to `params`; images_seen counts those before it."""
        beta = self.beta(images_seen, batch_size)
        return jax.tree.map(lambda e, p: p + beta.astype(p.dtype) * (e - p), ema, params)
