"""The encoder and the decoder that DDPM++, NCSN++ and ADM share."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.blocks import UNetBlock, fused_downsample_conv
from lora_diffusion_jax.models.layers import GroupNorm, Init, conv3x3

BlockFactory = Callable[..., UNetBlock]  # (features, *, num_heads, up, down, name) -> block


class Encoder(nn.Module):
    """From the image to the coarsest level; returns the output of every stage for the skips.

    Attributes:
        block: makes a UNetBlock with the network's settings.
        resolution: height of the images, which names the levels and places the attention.
        model_channels: width of the first convolution.
        channel_mult: width of each level over `model_channels`.
        num_blocks: residual blocks a level.
        attn_resolutions: heights at which every block has attention.
        num_heads: (channels) -> heads of the attention of a block of that width.
        init: of the first convolution and of the residual branch.
        residual_filter: taps of NCSN++'s residual input branch; None leaves the branch out.
        first_width_mult: whether the first convolution already has the first level's width (ADM).
        dtype: of the computation.
    """

    block: BlockFactory
    resolution: int
    model_channels: int
    channel_mult: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    num_heads: Callable[[int], int]
    init: Init
    residual_filter: Sequence[float] | None = None
    first_width_mult: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"], train: bool = False
    ) -> list[Array]:
        skips, aux = [], x
        for level, mult in enumerate(self.channel_mult):
            res = self.resolution >> level
            width = self.model_channels * mult
            if level == 0:
                first = width if self.first_width_mult else self.model_channels
                x = conv3x3(x, first, self.init, name=f"{res}x{res}_conv", dtype=self.dtype)
                skips.append(x)
            else:
                x = self.block(x.shape[-1], down=True, name=f"{res}x{res}_down")(x, emb, train)
                skips.append(x)
                if self.residual_filter is not None:
                    name = f"{res}x{res}_aux_residual"
                    branch = fused_downsample_conv(
                        aux,
                        x.shape[-1],
                        self.init,
                        self.residual_filter,
                        name=name,
                        dtype=self.dtype,
                    )
                    x = skips[-1] = aux = (x + branch) / 2**0.5
            heads = self.num_heads(width) if res in self.attn_resolutions else 0
            for i in range(self.num_blocks):
                name = f"{res}x{res}_block{i}"
                x = self.block(width, num_heads=heads, name=name)(x, emb, train)
                skips.append(x)
        return skips


class Decoder(nn.Module):
    """From the coarsest level back to full resolution, one skip concatenated per block.

    Attributes are those of `Encoder`, and
        attn_last_only: attention only in a level's last block (DDPM++, NCSN++), or in all (ADM).
            The first middle block `in0` always has it.
        out_channels: with it, the level-0 output norm and convolution `aux_norm`, `aux_conv` are
            applied here (DDPM++, NCSN++); None returns the features.
        init_zero: of `aux_conv`.
    """

    block: BlockFactory
    resolution: int
    model_channels: int
    channel_mult: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    num_heads: Callable[[int], int]
    attn_last_only: bool
    out_channels: int | None
    init_zero: Init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, skips: Sequence[Array], emb: Float[Array, "B E"], train: bool = False
    ) -> Array:
        skips = list(skips)
        x = skips[-1]
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            res = self.resolution >> level
            width = self.model_channels * mult
            if level == len(self.channel_mult) - 1:
                heads = self.num_heads(x.shape[-1])
                name = f"{res}x{res}_in"
                x = self.block(x.shape[-1], num_heads=heads, name=f"{name}0")(x, emb, train)
                x = self.block(x.shape[-1], name=f"{name}1")(x, emb, train)
            else:
                x = self.block(x.shape[-1], up=True, name=f"{res}x{res}_up")(x, emb, train)
            for i in range(self.num_blocks + 1):
                attends = res in self.attn_resolutions and (
                    i == self.num_blocks or not self.attn_last_only
                )
                heads = self.num_heads(width) if attends else 0
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                name = f"{res}x{res}_block{i}"
                x = self.block(width, num_heads=heads, name=name)(x, emb, train)
        if self.out_channels is None:
            return x
        prefix = f"{self.resolution}x{self.resolution}_aux"
        x = nn.silu(GroupNorm(1e-6, self.dtype, name=f"{prefix}_norm")(x))
        return conv3x3(
            x, self.out_channels, self.init_zero, name=f"{prefix}_conv", dtype=self.dtype
        )


def level_settings(
    network: nn.Module, block: BlockFactory, num_heads: Callable[[int], int]
) -> dict[str, Any]:
    """What a network's encoder and decoder have in common, from the network's own fields."""
    return {
        "block": block,
        "num_heads": num_heads,
        "channel_mult": tuple(network.channel_mult),
        "attn_resolutions": tuple(network.attn_resolutions),
        **{
            field: getattr(network, field)
            for field in ("resolution", "model_channels", "num_blocks", "dtype")
        },
    }


def check_input(
    x: Float[Array, "B H W C"], channel_mult: Sequence[int], img_channels: int, network: str
) -> None:
    """Raises UserError unless the U-Net can take images of x's size and channels."""
    factor = 2 ** (len(channel_mult) - 1)
    if x.ndim != 4:
        raise UserError(
            f"{network} got an array of shape {x.shape}; it takes images [B, height, width, channels]."
        )
    if x.shape[1] % factor or x.shape[2] % factor:
        raise UserError(
            f"{network} with {len(channel_mult)} levels halves the image {len(channel_mult) - 1} "
            f"times: height and width must be multiples of {factor}, but the images are "
            f"{x.shape[1]}x{x.shape[2]}. Resize them or use fewer levels (model.channel_mult)."
        )
    if x.shape[3] != img_channels:
        raise UserError(
            f"{network} was built for {img_channels} channels, but the images have {x.shape[3]}."
        )
