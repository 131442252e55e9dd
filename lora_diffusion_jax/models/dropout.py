"""Dropout that draws the same entries as `nn.Dropout`, on CPU in a tenth of the time."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from lora_diffusion_jax.array_types import Key

# Threefry-2x32 with 20 rounds (Salmon et al. 2011): rotations of four rounds each, and the parity.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
MANTISSA = 23  # bits of a uniform float32


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
        return jnp.where(bernoulli(self.make_rng("dropout"), kept, x.shape), x / kept, 0)


def bernoulli(key: Key, p: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """`jax.random.bernoulli`, bit for bit; platforms other than CPU compute it in JAX's way.

    On CPU JAX generates its bits in a loop over rounds that goes through memory in each of them. Written
    out, the rounds become one kernel.
    """
    partitionable = getattr(jax.config, "jax_threefry_partitionable", False)
    known = str(jax.random.key_impl(key)) == "threefry2x32" and partitionable
    if not known or math.prod(shape) >= 2**32:
        return jax.random.bernoulli(key, p, shape)

    def by_jax(key: Key) -> Bool[Array, "..."]:
        return jax.random.bernoulli(key, p, shape)

    def unrolled(key: Key) -> Bool[Array, "..."]:
        index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        first, second = threefry(jax.random.key_data(key), jnp.zeros_like(index), index)
        uniform = (first ^ second) >> (32 - MANTISSA)  # times 2**-23
        return uniform.astype(jnp.float32) < jnp.float32(p) * 2**MANTISSA

    return jax.lax.platform_dependent(key, cpu=unrolled, default=by_jax)


def threefry(
    key: UInt32[Array, "2"], x0: UInt32[Array, "*s"], x1: UInt32[Array, "*s"]
) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Encrypts pairs of words (x0, x1) by Threefry-2x32 (Salmon et al. 2011, section 4.2)."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
