"""What the U-Nets share: their settings, the encoder and the decoder."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.blocks import fused_downsample_conv
from lora_diffusion_jax.models.layers import AttentionFn, Init, conv3x3
from lora_diffusion_jax.models.norm import GroupNorm

BlockFactory = Callable[..., nn.Module]  # (features, *, num_heads, up, down, name) -> block


class UNet(nn.Module):
    """The settings of a U-Net, called as (x, noise_labels, class_labels, augment_labels, train).

    The defaults are those of the official code, which snapshots rely on.

    Attributes:
        image_size: height of the images, which names the levels and places the attention.
        in_channels, out_channels: channels of the images, and of the output.
        num_classes: width of the class labels; 0 for an unconditional network.
        augment_dim: width of the augmentation labels; 0 for none.
        channels: width of the first convolution.
        channel_mult: width of each level over `channels`, finest level first.
        channel_mult_emb: width of the embedding over `channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: heights of the levels that have attention.
        dropout, label_dropout: rates in training.
        use_affine: False removes the scale-and-shift of all blocks (`only_lora`).
        use_map: False removes the mapping network, which without scale-and-shift serves UC-LoRA alone.
        remat: what the backward pass recomputes, see `blocks.REMAT`.
        attention_fn: computes the attention, see `self_attention`.
        dtype: of the computation; parameters, embedding, norms and attention logits are float32.
    """

    image_size: int
    in_channels: int
    out_channels: int
    num_classes: int = 0
    augment_dim: int = 0
    channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    use_affine: bool = True
    use_map: bool = True
    remat: str = "none"
    attention_fn: AttentionFn = jax.nn.dot_product_attention
    dtype: DTypeLike = jnp.float32

    def check_input(self, x: Float[Array, "B H W C"]) -> None:
        """Raises UserError unless the network can take images of x's size and channels."""
        name = type(self).__name__
        if x.ndim != 4:
            raise UserError(
                f"{name} got an array of shape {x.shape}; expected images [B, height, width, channels]."
            )
        if x.shape[3] != self.in_channels:
            raise UserError(
                f"{name} was built for {self.in_channels} channels, but the images have {x.shape[3]}."
            )
        check_image_size(x.shape[1], x.shape[2], len(self.channel_mult))

    def embed(
        self, mapping: Callable[..., nn.Module], *inputs: Any
    ) -> Float[Array, "B emb_channels"] | None:
        """The output of the mapping network `map`, or None without one.

        Args:
            mapping: makes it from emb_channels, num_classes, augment_dim and label_dropout.
            inputs: noise, class and augmentation labels, and whether the network trains.
        """
        if not self.use_map:
            return None
        return mapping(
            emb_channels=self.channels * self.channel_mult_emb,
            num_classes=self.num_classes,
            augment_dim=self.augment_dim,
            label_dropout=self.label_dropout,
            name="map",
        )(*inputs)

    def levels(self, block: BlockFactory, num_heads: Callable[[int], int]) -> "Levels":
        """The plan of the network's levels, for its encoder and its decoder."""
        return Levels(
            block=block,
            num_heads=num_heads,
            image_size=self.image_size,
            channels=self.channels,
            channel_mult=tuple(self.channel_mult),
            num_blocks=self.num_blocks,
            attn_resolutions=tuple(self.attn_resolutions),
            dtype=self.dtype,
        )


def check_image_size(height: int, width: int, num_levels: int) -> None:
    """Raises UserError unless a U-Net of that many levels can halve the images once per level."""
    factor = 2 ** (num_levels - 1)
    if height % factor == 0 and width % factor == 0 and min(height, width) > 0:
        return
    possible = {size // factor * factor + more for size in (height, width) for more in (0, factor)}
    raise UserError(
        f"The images are {height}x{width} (height x width), but a U-Net with {num_levels} levels halves "
        f"them {num_levels - 1} times: both must be multiples of {factor}, such as "
        f"{' or '.join(str(size) for size in sorted(possible - {0}))}. Resize the images or use fewer "
        "levels (model.channel_mult)."
    )


@dataclasses.dataclass(frozen=True)
class Levels:
    """The levels that an encoder descends and a decoder climbs.

    Iterating yields (name, width, heads) of each level, finest first: '32x32', its channels, and
    the heads of its attention, 0 where it has none.

    Attributes:
        block: makes a block with the network's settings, called as (x, emb, train), or (x, emb, train, skip).
        num_heads: (channels) -> heads of the attention of a block of that width.
        image_size, channels, channel_mult, num_blocks, attn_resolutions, dtype: see `UNet`.
    """

    block: BlockFactory
    num_heads: Callable[[int], int]
    image_size: int
    channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dtype: DTypeLike

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        for level, mult in enumerate(self.channel_mult):
            size, width = self.image_size >> level, self.channels * mult
            heads = self.num_heads(width) if size in self.attn_resolutions else 0
            yield f"{size}x{size}", width, heads


class Encoder(nn.Module):
    """From the image to the coarsest level; returns the output of every stage for the skips.

    Attributes:
        levels: of the network.
        layer_init: initialisation of the first convolution and of the residual branch.
        residual_filter: taps of NCSN++'s residual input branch; None leaves the branch out.
        first_width_mult: whether the first convolution already has the first level's width (ADM).
    """

    levels: Levels
    layer_init: Init
    residual_filter: Sequence[float] | None = None
    first_width_mult: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"] | None, train: bool = False
    ) -> list[Array]:
        block, dtype = self.levels.block, self.levels.dtype
        skips: list[Array] = []
        image = x
        for name, width, heads in self.levels:
            if not skips:
                first = width if self.first_width_mult else self.levels.channels
                x = conv3x3(x, first, self.layer_init, name=f"{name}_conv", dtype=dtype)
            else:
                x = block(x.shape[-1], down=True, name=f"{name}_down")(x, emb, train)
                if self.residual_filter is not None:
                    branch = fused_downsample_conv(
                        image,
                        x.shape[-1],
                        self.layer_init,
                        self.residual_filter,
                        name=f"{name}_aux_residual",
                        dtype=dtype,
                    )
                    # Keeps the variance of a sum of two; the next level's branch starts from it.
                    x = image = (x + branch) / 2**0.5
            skips.append(x)
            for i in range(self.levels.num_blocks):
                x = block(width, num_heads=heads, name=f"{name}_block{i}")(x, emb, train)
                skips.append(x)
        return skips


class Decoder(nn.Module):
    """From the coarsest level back to full resolution, one skip joined to each block's input.

    The first middle block `in0` always has attention.

    Attributes:
        levels: of the network.
        attn_last_only: attention only in a level's last block (DDPM++, NCSN++), or in all (ADM).
        out_channels: if given, the output norm and convolution `aux_norm`, `aux_conv` of the finest
            level are applied here (DDPM++, NCSN++); None returns the features.
        zero_init: initialisation of `aux_conv`.
        num_heads: like that of `levels`, for the blocks beside the middle ones; None: the same.
    """

    levels: Levels
    attn_last_only: bool
    out_channels: int | None
    zero_init: Init
    num_heads: Callable[[int], int] | None = None

    @nn.compact
    def __call__(
        self, skips: Sequence[Array], emb: Float[Array, "B E"] | None, train: bool = False
    ) -> Array:
        block, num_blocks, skips = self.levels.block, self.levels.num_blocks, list(skips)
        x = skips[-1]
        num_heads = self.num_heads or self.levels.num_heads
        coarsest, *finer = reversed(list(dataclasses.replace(self.levels, num_heads=num_heads)))
        for name, width, heads in (coarsest, *finer):
            inner = x.shape[-1]
            if name == coarsest[0]:
                middle = self.levels.num_heads(inner)  # the encoder's, not num_heads_upsample
                x = block(inner, num_heads=middle, name=f"{name}_in0")(x, emb, train)
                x = block(inner, name=f"{name}_in1")(x, emb, train)
            else:
                x = block(inner, up=True, name=f"{name}_up")(x, emb, train)
            # One more than in the encoder, where each level also begins with a skip.
            for i in range(num_blocks + 1):
                attends = i == num_blocks or not self.attn_last_only
                x = block(width, num_heads=heads if attends else 0, name=f"{name}_block{i}")(
                    x, emb, train, skips.pop()
                )
        if self.out_channels is None:
            return x
        dtype = self.levels.dtype
        # `name` is that of the finest level now.
        x = nn.silu(GroupNorm(1e-6, dtype, name=f"{name}_aux_norm")(x))
        return conv3x3(x, self.out_channels, self.zero_init, name=f"{name}_aux_conv", dtype=dtype)
