"""ADM (Dhariwal & Nichol 2021), in the form that EDM trains (Karras et al. 2022)."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.models.blocks import rematerialised, silu_dense
from lora_diffusion_jax.models.embeddings import drop_labels, positional_embedding
from lora_diffusion_jax.models.layers import Init, conv3x3, dense
from lora_diffusion_jax.models.norm import GroupNorm
from lora_diffusion_jax.models.unet import Decoder, Encoder, UNet

INIT = Init("kaiming_uniform", weight=(1 / 3) ** 0.5, bias=(1 / 3) ** 0.5)
INIT_ZERO = Init("kaiming_uniform", weight=0.0)
CHANNELS_PER_HEAD = 64


class ADMMapping(nn.Module):
    """Noise level, augmentation and class -> embedding; the class joins before the last SiLU.

    Attributes as in `SongMapping`; the label layer has no bias and starts as N(0, 1).
    """

    noise_channels: int
    emb_channels: int
    num_classes: int = 0
    augment_dim: int = 0
    label_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        noise_labels: Float[Array, " B"],
        class_labels: Float[Array, "B num_classes"] | None = None,
        augment_labels: Float[Array, "B augment_dim"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B emb_channels"]:
        emb = positional_embedding(noise_labels, self.noise_channels)
        if self.augment_dim and (augment_labels is not None or self.is_initializing()):
            if augment_labels is None:
                augment_labels = jnp.zeros((1, self.augment_dim))
            emb = emb + dense(
                augment_labels, self.noise_channels, INIT_ZERO, name="augment", use_bias=False
            )
        emb = silu_dense(emb, self.emb_channels, INIT, name="layer0")
        emb = dense(emb, self.emb_channels, INIT, name="layer1")
        if self.num_classes:
            labels = drop_labels(class_labels, self.num_classes, self.label_dropout, train)
            init = Init("kaiming_normal", weight=self.num_classes**0.5)
            emb = emb + dense(labels, self.emb_channels, init, name="label", use_bias=False)
        return nn.silu(emb)


class ADMUNet(UNet):
    """The ADM U-Net with EDM's block names.

    A block narrower than 64 channels would have no head and, as in the reference, has no attention.
    """

    channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)

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
        block = functools.partial(
            rematerialised(self.remat),
            dropout=self.dropout,
            use_affine=self.use_affine,
            attention_fn=self.attention_fn,
            layer_init=INIT,
            zero_init=INIT_ZERO,
            dtype=self.dtype,
        )
        levels = self.levels(block, num_heads=lambda channels: channels // CHANNELS_PER_HEAD)
        skips = Encoder(levels, INIT, first_width_mult=True, name="enc")(x, emb, train)
        x = Decoder(levels, False, None, INIT_ZERO, name="dec")(skips, emb, train)
        x = nn.silu(GroupNorm(dtype=self.dtype, name="out_norm")(x))
        return conv3x3(x, self.out_channels, INIT_ZERO, name="out_conv", dtype=self.dtype)
