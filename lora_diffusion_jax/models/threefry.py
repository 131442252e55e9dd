"""JAX's random bits, computed on CPU in one kernel instead of a loop over rounds."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, UInt, UInt32

from lora_diffusion_jax.array_types import Key

# Threefry-2x32 with 20 rounds (Salmon et al. 2011): rotations of four rounds each, and the parity.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def unrolled(key: Key) -> Key:
    """The same key, for a generator that draws the same bits, on CPU in one kernel.

    On CPU JAX loops over the rounds, each of which goes through memory; docs/scaling.md has what one
    kernel saves. Other platforms get JAX's program. A key of a generator other than Threefry, or of
    JAX's older layout of its bits, is returned as it is.
    """
    partitionable = getattr(jax.config, "jax_threefry_partitionable", False)
    if str(jax.random.key_impl(key)) != "threefry2x32" or not partitionable:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


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


def _jaxs(key: UInt32[Array, "2"]) -> Key:
    return jax.random.wrap_key_data(key, impl="threefry2x32")


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that each shape is traced once
def _random_bits(
    key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]
) -> UInt[Array, "..."]:
    """Random words of `bit_width` bits: number i, counted by rows, is the encrypted i."""
    by_jax = functools.partial(_bits_by_jax, bit_width, shape)
    if bit_width != 32 or math.prod(shape) >= 2**32:
        return by_jax(key)

    def by_rounds(key: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
        index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        first, second = threefry(key, jnp.zeros_like(index), index)
        return first ^ second

    return jax.lax.platform_dependent(key, cpu=by_rounds, default=by_jax)


def _bits_by_jax(
    bit_width: int, shape: tuple[int, ...], key: UInt32[Array, "2"]
) -> UInt[Array, "..."]:
    return jax.random.bits(_jaxs(key), shape, jnp.dtype(f"uint{bit_width}"))


_UNROLLED = define_prng_impl(
    name="unrolled_threefry2x32",
    tag="utf",
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
    split=lambda key, shape: jax.random.key_data(jax.random.split(_jaxs(key), shape)),
    fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(_jaxs(key), data)),
    random_bits=_random_bits,
)
