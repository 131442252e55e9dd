"""The residual block shared by all U-Nets."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import choose
from lora_diffusion_jax.models.dropout import Dropout
from lora_diffusion_jax.models.layers import (
    AttentionFn,
    Init,
    conv3x3,
    dense,
    self_attention,
)
from lora_diffusion_jax.models.norm import GroupNorm
from lora_diffusion_jax.models.resample import downsample, upsample

# What the backward pass keeps in memory and what it recomputes, `train.remat`:
#   none    keeps everything
#   norms   recomputes norms, SiLU, dropout and attention weights from the outputs of the convolutions
#           and of qkv, which it keeps: no convolution runs twice
#   blocks  keeps only each block's input; a third more FLOP
# Try norms first: ImageNet-64 ADM compiled for v5e with 16 images per chip, with XLA's attention, has 2.76
# GiB of temporaries instead of 5.43, for 1.2 % more FLOP and 18 % more memory traffic (docs/scaling.md).
REMAT = ("none", "norms", "blocks")
KEPT = ("conv0", "residual", "qkv", "attention")  # by `norms`, besides each block's input


class UNetBlock(nn.Module):
    """norm, SiLU, conv (resampled), conditioned norm, SiLU, dropout, conv, skip; then attention.

    The union of the features that DDPM++, NCSN++ and ADM need (Karras et al. 2022, table 7), and
    improved-diffusion's U-Net.

    Attributes:
        features: output channels.
        num_heads: heads of the self-attention after the residual part; 0 leaves it out.
        up, down: resample by two, before the first convolution and in the skip.
        dropout: rate, applied once, before the second convolution.
        skip_scale: factor after each residual sum.
        epsilon, groups: of the group norms; None: min(32, C // 4) groups.
        resample_filter: taps of the resampling filter along each axis.
        resample_proj: whether the skip of a resampling block has a 1x1 convolution of its own.
        adaptive_scale: scale and shift by the embedding (ADM) rather than shift alone.
        use_affine: whether the embedding enters by scale and shift at all (`only_lora` has none).
        qkv_last: order of the channels of `qkv`, see `self_attention`.
        attention_fn: computes the attention.
        layer_init, zero_init, qkv_init: initialisation of most layers, of those that end a residual
            branch, and of `qkv` (None: as most layers).
        dtype: of the computation; norms and attention logits stay in float32.
    """

    features: int
    num_heads: int = 0
    up: bool = False
    down: bool = False
    dropout: float = 0.0
    skip_scale: float = 1.0
    epsilon: float = 1e-5
    groups: int | None = None
    resample_filter: Sequence[float] = (1, 1)
    resample_proj: bool = False
    adaptive_scale: bool = True
    use_affine: bool = True
    qkv_last: bool = True
    attention_fn: AttentionFn = jax.nn.dot_product_attention
    layer_init: Init = Init("kaiming_uniform")
    zero_init: Init = Init("kaiming_uniform", weight=0.0)
    qkv_init: Init | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        emb: Float[Array, "B E"] | None,
        train: bool = False,
        joined: Float[Array, "B H W C2"] | None = None,
    ) -> Float[Array, "B H2 W2 features"]:
        """Applies the block to x, or to the channels of x and of `joined`."""
        parts = (x,) if joined is None else (x, joined)
        skip = self._skip(parts)
        x = nn.silu(self._norm("norm0")(*parts))
        x = conv3x3(
            self._resample(x),
            self.features,
            self.layer_init,
            name="conv0",
            dtype=self.dtype,
            train=train,
        )
        x = checkpoint_name(x, "conv0")
        x = self._conditioned_norm(x, emb)
        x = Dropout(self.dropout)(x, train)
        x = conv3x3(x, self.features, self.zero_init, name="conv1", dtype=self.dtype, train=train)
        x = (x + skip) * self.skip_scale
        return self._attend(x) if self.num_heads else x

    def _norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.epsilon, self.dtype, self.groups, name=name)

    def _resample(self, x: Array) -> Array:
        if self.up:
            return upsample(x, self.resample_filter)
        return downsample(x, self.resample_filter) if self.down else x

    def _skip(self, parts: Sequence[Array]) -> Array:
        changes_width = sum(part.shape[-1] for part in parts) != self.features
        resampled = [self._resample(part) for part in parts]
        if changes_width or (self.resample_proj and (self.up or self.down)):
            return dense(resampled, self.features, self.layer_init, name="skip", dtype=self.dtype)
        return jnp.concatenate(resampled, axis=-1)

    def _conditioned_norm(self, x: Array, emb: Array | None) -> Array:
        norm = self._norm("norm1")
        if not self.use_affine:
            return nn.silu(norm(x))
        assert emb is not None  # with use_affine there is a mapping network
        width = self.features * (2 if self.adaptive_scale else 1)
        params = dense(emb, width, self.layer_init, name="affine", dtype=self.dtype)
        if self.adaptive_scale:
            scale, shift = jnp.split(params, 2, axis=-1)
            return nn.silu(norm(x, after=(scale, shift)))
        return nn.silu(norm(x, before=params))

    def _attend(self, x: Array) -> Array:
        x = checkpoint_name(x, "residual")
        y = self._norm("norm2")(x)
        init = self.qkv_init or self.layer_init
        qkv = dense(y, 3 * self.features, init, name="qkv", dtype=self.dtype)
        qkv = checkpoint_name(qkv, "qkv")
        y = self_attention(
            qkv, self.num_heads, qkv_last=self.qkv_last, attention_fn=self.attention_fn
        ).astype(self.dtype)
        y = checkpoint_name(y, "attention")
        y = dense(y, self.features, self.zero_init, name="proj", dtype=self.dtype)
        return (y + x) * self.skip_scale


def rematerialised(remat: str) -> type[UNetBlock]:
    """UNetBlock that keeps less for the backward pass; parameters, values and gradients stay the same.

    Args:
        remat: one of REMAT.

    Raises:
        UserError: for any other value.
    """
    if choose("train.remat", remat, REMAT) == "none":
        return UNetBlock
    policy = None
    if remat == "norms":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return nn.remat(UNetBlock, policy=policy, static_argnums=(3,))  # train, after self, x, emb


def fused_downsample_conv(
    x: Float[Array, "B H W C"],
    features: int,
    init: Init,
    taps: Sequence[float],
    *,
    name: str,
    dtype: DTypeLike,
) -> Float[Array, "B H/2 W/2 features"]:
    """3x3 convolution at full resolution, then the filter; padded once for both."""
    filter_pad = (len(taps) - 1) // 2
    x = conv3x3(x, features, init, name=name, padding=1 + filter_pad, dtype=dtype)
    return downsample(x, taps, pad=0)


def silu_dense(x: Array, features: int, init: Init, *, name: str) -> jax.Array:
    """Dense followed by SiLU."""
    return nn.silu(dense(x, features, init, name=name))
