"""Attention that never writes its logits to memory, for TPUs (Dao et al. 2022, FlashAttention)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

# From this many pixels on the logits are what the network moves most through memory (docs/scaling.md).
MIN_PIXELS = 1024
MAX_HEAD = 128  # channels of a head
DTYPES = (jnp.float32, jnp.bfloat16)
# Rows and columns of the logits that the kernel holds on the chip, and rows that it loads at once: with
# more of either, wide heads do not fit into 16 MiB, all that a v4 has for a kernel.
BLOCK, LOADED = 512, 1024


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Called like `jax.nn.dot_product_attention`, which it equals up to rounding.

    Inputs that the kernel does not take, or for which it does not pay off, are left to that function. It
    has no derivative in forward mode. A class and no closure, so that equal meshes give equal networks.

    Attributes:
        mesh: the TPUs over which the batch is split, which the compiler cannot do for a kernel.
    """

    mesh: Mesh

    def __call__(
        self,
        q: Float[Array, "B pixels heads ch"],
        k: Float[Array, "B pixels heads ch"],
        v: Float[Array, "B pixels heads ch"],
    ) -> Float[Array, "B pixels heads ch"]:
        batch, pixels, _, ch = q.shape
        fits = pixels % BLOCK == 0 and ch <= MAX_HEAD and q.dtype in DTYPES
        if pixels < MIN_PIXELS or batch % self.mesh.size or not fits:
            return jax.nn.dot_product_attention(q, k, v)
        rows = P(self.mesh.axis_names)
        # Kernels do not say over which axes their results vary, which check_vma would check.
        call = jax.shard_map(
            _flash, mesh=self.mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
        )
        return call(q, k, v)


def _flash(q: Array, k: Array, v: Array) -> jax.Array:
    """Attention of one device's images, by JAX's kernel, whose axes are [B, heads, pixels, ch]."""
    pixels = q.shape[1]
    loaded = LOADED if pixels % LOADED == 0 else BLOCK
    sizes = BlockSizes(
        block_b=1,
        block_q=BLOCK,
        block_k_major=loaded,
        block_k=BLOCK,
        block_q_major_dkv=loaded,
        block_q_dkv=BLOCK,
        block_k_major_dkv=BLOCK,
        block_k_dkv=BLOCK,
        block_q_dq=BLOCK,
        block_k_major_dq=BLOCK,  # an array of that many columns, all equal, is written for it
        block_k_dq=BLOCK,
    )
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    out = flash_attention(q, k, v, sm_scale=1 / math.sqrt(q.shape[-1]), block_sizes=sizes)
    return out.swapaxes(1, 2)
