"""DDPM++ and NCSN++ (Song et al. 2021), in the form that EDM trains (Karras et al. 2022)."""

import functools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.models.blocks import rematerialised, silu_dense
from lora_diffusion_jax.models.embeddings import (
    FourierEmbedding,
    drop_labels,
    positional_embedding,
    swap_halves,
)
from lora_diffusion_jax.models.layers import Init, dense
from lora_diffusion_jax.models.unet import Decoder, Encoder, UNet

_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=0.2**0.5)


class SongMapping(nn.Module):
    """Noise level, class and augmentation labels -> the embedding that conditions every block.

    Attributes:
        embedding: positional (DDPM++) or fourier (NCSN++).
        noise_channels: width of the noise embedding.
        emb_channels: width of the result.
        num_classes: width of the class labels; 0 has no label layer. Labels enter times
            sqrt(num_classes).
        augment_dim: width of the augmentation labels; 0 has no layer for them.
        label_dropout: probability of zeroing a sample's class label in training.
    """

    embedding: Literal["positional", "fourier"]
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
        if self.embedding == "positional":
            emb = positional_embedding(noise_labels, self.noise_channels, endpoint=True)
        else:
            emb = FourierEmbedding(self.noise_channels, name="noise")(noise_labels)
        emb = swap_halves(emb)
        if self.num_classes:
            labels = drop_labels(class_labels, self.num_classes, self.label_dropout, train)
            scaled = labels * np.sqrt(self.num_classes)
            emb = emb + dense(scaled, self.noise_channels, _INIT, name="label")
        if self.augment_dim and (augment_labels is not None or self.is_initializing()):
            if augment_labels is None:
                augment_labels = jnp.zeros((1, self.augment_dim))
            emb = emb + dense(
                augment_labels, self.noise_channels, _INIT, name="augment", use_bias=False
            )
        emb = silu_dense(emb, self.emb_channels, _INIT, name="layer0")
        return silu_dense(emb, self.emb_channels, _INIT, name="layer1")


class SongUNet(UNet):
    """The DDPM++ and NCSN++ U-Nets with EDM's block names, `enc/32x32_block0`.

    Attributes, besides those of `UNet`:
        embedding: of the noise level, positional (DDPM++) or fourier (NCSN++).
        channel_mult_noise: width of the noise embedding over `channels` (NCSN++: 2).
        encoder: standard (DDPM++) or residual (NCSN++).
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).
    """

    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder: Literal["standard", "residual"] = "standard"
    resample_filter: Sequence[float] = (1, 1)

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
        width = self.channels * self.channel_mult_noise
        mapping = functools.partial(SongMapping, self.embedding, width)
        emb = self.embed(mapping, noise_labels, class_labels, augment_labels, train)
        block = functools.partial(
            rematerialised(self.remat),
            dropout=self.dropout,
            skip_scale=0.5**0.5,
            epsilon=1e-6,
            resample_filter=tuple(self.resample_filter),
            resample_proj=True,
            adaptive_scale=False,
            use_affine=self.use_affine,
            attention_fn=self.attention_fn,
            layer_init=_INIT,
            zero_init=_INIT_ZERO,
            qkv_init=_INIT_ATTN,
            dtype=self.dtype,
        )
        levels = self.levels(block, num_heads=lambda channels: 1)
        residual = self.resample_filter if self.encoder == "residual" else None
        skips = Encoder(levels, _INIT, residual, name="enc")(x, emb, train)
        return Decoder(levels, True, self.out_channels, _INIT_ZERO, name="dec")(skips, emb, train)
