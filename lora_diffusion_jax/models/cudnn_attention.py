"""Attention that never writes its logits to memory, for NVIDIA GPUs (Dao et al. 2022, FlashAttention)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = (jnp.bfloat16, jnp.float16)  # cuDNN has no kernel for float32
MIN_PIXELS = 64  # below, the logits are no larger than q, k and v


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """Called like `jax.nn.dot_product_attention`, which it equals up to rounding.

    Inputs that cuDNN does not take are left to XLA. It has no derivative in forward mode.

    Attributes:
        max_head: the most channels of a head: 128 on Ampere, 256 from Hopper on.
    """

    max_head: int

    def __call__(
        self,
        q: Float[Array, "B pixels heads ch"],
        k: Float[Array, "B pixels heads ch"],
        v: Float[Array, "B pixels heads ch"],
    ) -> Float[Array, "B pixels heads ch"]:
        _, pixels, _, ch = q.shape
        fits = pixels >= MIN_PIXELS and ch % 8 == 0 and ch <= self.max_head and q.dtype in DTYPES
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fits else "xla")


def for_device(device: jax.Device) -> CudnnAttention | None:
    """The attention for a GPU; None if cuDNN has none for it (AMD's, and NVIDIA's before Ampere)."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return None
    capability = float(device.compute_capability)
    if capability < 8:
        return None
    attention = CudnnAttention(256 if capability >= 9 else 128)
    q = jax.ShapeDtypeStruct((1, MIN_PIXELS, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(attention, q, q, q)
    except (NotImplementedError, RuntimeError):  # cuDNN is missing or too old for this GPU
        return None
    return attention
