"""The U-Net of improved-diffusion (Nichol & Dhariwal 2021)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.adm_unet import INIT, INIT_ZERO, ADMMapping
from lora_diffusion_jax.models.blocks import UNetBlock, rematerialised
from lora_diffusion_jax.models.layers import conv3x3
from lora_diffusion_jax.models.norm import GroupNorm
from lora_diffusion_jax.models.resample import upsample
from lora_diffusion_jax.models.unet import Decoder, Encoder, UNet

GROUPS = 32  # of every group norm


class ResampleConv(nn.Module):
    """Resampling by two: a convolution with stride 2, or each pixel repeated and then a convolution.

    Called like a block; the embedding is not used.

    Attributes:
        features: output channels.
        up: whether to double the size, or else to halve it.
        dtype: of the computation.
    """

    features: int
    up: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], emb: Any, train: bool = False
    ) -> Float[Array, "B H2 W2 features"]:
        stride = 1 if self.up else 2
        x = upsample(x) if self.up else x
        return conv3x3(x, self.features, INIT, name="conv", stride=stride, dtype=self.dtype)


class ImprovedUNet(UNet):
    """improved-diffusion's U-Net under the block names of the EDM networks.

    The mapping network is ADM's, which descends from it; levels are changed by convolutions, without a
    residual block around them; all blocks at the attention resolutions attend, in encoder and decoder.

    Attributes, besides those of `UNet`:
        num_heads: heads of the attention.
        num_heads_upsample: the same in the decoder, behind the middle blocks; -1: num_heads.
        use_scale_shift_norm: whether the embedding scales and shifts behind the second norm of a block,
            or else is added before it.
    """

    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (16, 8)
    dropout: float = 0.0
    num_heads: int = 4
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        noise_labels: Float[Array, " B"],
        class_labels: Float[Array, "B num_classes"] | None = None,
        augment_labels: Float[Array, "B augment_dim"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out_channels"]:
        self.check_input(x)
        mapping = functools.partial(ADMMapping, self.channels)
        emb = self.embed(mapping, noise_labels, class_labels, augment_labels, train)
        residual = functools.partial(
            rematerialised(self.remat),
            dropout=self.dropout,
            groups=GROUPS,
            adaptive_scale=self.use_scale_shift_norm,
            use_affine=self.use_affine,
            attention_fn=self.attention_fn,
            qkv_last=False,
            layer_init=INIT,
            zero_init=INIT_ZERO,
            dtype=self.dtype,
        )
        block = functools.partial(_residual_or_resample, residual, self.dtype)
        levels = self.levels(block, functools.partial(_shared_by, self.num_heads))
        skips = Encoder(levels, INIT, name="enc")(x, emb, train)
        heads = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        heads = functools.partial(_shared_by, heads)
        x = Decoder(levels, False, None, INIT_ZERO, heads, name="dec")(skips, emb, train)
        x = nn.silu(GroupNorm(dtype=self.dtype, groups=GROUPS, name="out_norm")(x))
        return conv3x3(x, self.out_channels, INIT_ZERO, name="out_conv", dtype=self.dtype)


def _residual_or_resample(
    residual: Callable[..., UNetBlock],
    dtype: DTypeLike,
    features: int,
    *,
    up: bool = False,
    down: bool = False,
    **more: Any,
) -> nn.Module:
    """A residual block; where the size changes, the convolution that stands there alone."""
    if up or down:
        return ResampleConv(features, up, dtype, **more)
    return residual(features, **more)


def _shared_by(num_heads: int, channels: int) -> int:
    """The number of heads, which must divide the channels of a block that attends."""
    if num_heads < 1 or channels % num_heads:
        raise UserError(
            f"{num_heads} attention heads cannot share {channels} channels; choose model.num_heads and "
            "model.num_heads_upsample that divide every width."
        )
    return num_heads
