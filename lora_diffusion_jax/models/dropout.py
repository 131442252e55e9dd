"""Dropout that draws the same entries as `nn.Dropout`, on CPU in one kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.models.threefry import unrolled


class Dropout(nn.Module):
    """Zeroes entries at random and scales the others by 1 / (1 - rate).

    Attributes:
        rate: probability of a zero, 0 to 1.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], train: bool) -> Float[Array, "..."]:
        """The entries are drawn with the generator 'dropout'; without `train` x is returned."""
        if not train or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        kept = 1 - self.rate
        key = unrolled(self.make_rng("dropout"))
        return jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept, 0)
