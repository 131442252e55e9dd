"""DDPM++ and NCSN++ (Song et al. 2021), in the form that EDM trains (Karras et al. 2022)."""

import functools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.models.blocks import rematerialised, silu_dense
from lora_diffusion_jax.models.embeddings import (
    FourierEmbedding,
    positional_embedding,
    swap_halves,
)
from lora_diffusion_jax.models.layers import Init, dense
from lora_diffusion_jax.models.unet import Decoder, Encoder, check_input, level_settings

_INIT = Init("xavier_uniform")
_INIT_ZERO = Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = Init("xavier_uniform", weight=0.2**0.5)


class SongMapping(nn.Module):
    """Noise level, class and augmentation labels -> the embedding that conditions every block.

    Attributes:
        embedding: positional (DDPM++) or fourier (NCSN++).
        noise_channels: width of the noise embedding.
        emb_channels: width of the result.
        label_dim: classes; 0 has no label layer. Labels enter times sqrt(label_dim).
        augment_dim: width of the augmentation labels; 0 has no layer for them.
        label_dropout: probability of zeroing a sample's class label in training.
    """

    embedding: Literal["positional", "fourier"]
    noise_channels: int
    emb_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    label_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        noise_labels: Float[Array, " B"],
        class_labels: Float[Array, "B label_dim"] | None = None,
        augment_labels: Float[Array, "B augment_dim"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B emb_channels"]:
        if self.embedding == "positional":
            emb = positional_embedding(noise_labels, self.noise_channels, endpoint=True)
        else:
            emb = FourierEmbedding(self.noise_channels, name="noise")(noise_labels)
        emb = swap_halves(emb)
        if self.label_dim:
            labels = drop_labels(self, class_labels, self.label_dim, self.label_dropout, train)
            scaled = labels * np.sqrt(self.label_dim)
            emb = emb + dense(scaled, self.noise_channels, _INIT, name="label")
        if self.augment_dim and (augment_labels is not None or self.is_initializing()):
            if augment_labels is None:
                augment_labels = jnp.zeros((1, self.augment_dim))
            emb = emb + dense(
                augment_labels, self.noise_channels, _INIT, name="augment", use_bias=False
            )
        emb = silu_dense(emb, self.emb_channels, _INIT, name="layer0")
        return silu_dense(emb, self.emb_channels, _INIT, name="layer1")


def drop_labels(
    module: nn.Module,
    class_labels: Float[Array, "B label_dim"] | None,
    label_dim: int,
    rate: float,
    train: bool,
) -> Float[Array, "B label_dim"]:
    """Class labels as the label layer sees them: zeros for None, and zeroed at random in training.

    One uniform number per sample from the `dropout` stream decides for the whole label.
    """
    if class_labels is None:
        return jnp.zeros((1, label_dim))
    if not train or rate == 0:
        return class_labels
    # The mask has one column, and nn.Dropout's 1 / (1 - rate) is not wanted on labels.
    uniform = nn.Dropout(rate, deterministic=False, parent=module)
    mask = uniform(jnp.ones((class_labels.shape[0], 1))) > 0
    return class_labels * mask


class SongUNet(nn.Module):
    """The DDPM++ and NCSN++ U-Nets with EDM's block names, `enc/32x32_block0`.

    Attributes:
        resolution: height of the images.
        img_channels, out_channels: channels in and out.
        label_dim: classes, 0 for an unconditional network.
        augment_dim: width of the augmentation labels, 0 for none.
        model_channels, channel_mult, num_blocks, attn_resolutions: see `Encoder`.
        channel_mult_emb: width of the embedding over model_channels.
        channel_mult_noise: width of the noise embedding over model_channels (NCSN++: 2).
        embedding: positional (DDPM++) or fourier (NCSN++).
        encoder: standard (DDPM++) or residual (NCSN++).
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).
        dropout, label_dropout: rates in training.
        use_affine: False removes the scale-and-shift of all blocks (`only_lora`).
        remat: what the backward pass computes again, see `blocks.REMAT`.
        dtype: of the computation; parameters, embedding, norms and attention logits are float32.
    """

    resolution: int
    img_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder: Literal["standard", "residual"] = "standard"
    resample_filter: Sequence[float] = (1, 1)
    use_affine: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        noise_labels: Float[Array, " B"],
        class_labels: Float[Array, "B label_dim"] | None = None,
        augment_labels: Float[Array, "B augment_dim"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out_channels"]:
        check_input(x, self.channel_mult, self.img_channels, type(self).__name__)
        emb = SongMapping(
            self.embedding,
            self.model_channels * self.channel_mult_noise,
            self.model_channels * self.channel_mult_emb,
            self.label_dim,
            self.augment_dim,
            self.label_dropout,
            name="map",
        )(noise_labels, class_labels, augment_labels, train)
        levels = level_settings(self, self._block(), num_heads=lambda channels: 1)
        residual = self.resample_filter if self.encoder == "residual" else None
        skips = Encoder(**levels, init=_INIT, residual_filter=residual, name="enc")(x, emb, train)
        return Decoder(
            **levels,
            attn_last_only=True,
            out_channels=self.out_channels,
            init_zero=_INIT_ZERO,
            name="dec",
        )(skips, emb, train)

    def _block(self) -> functools.partial:
        return functools.partial(
            rematerialised(self.remat),
            dropout=self.dropout,
            skip_scale=0.5**0.5,
            epsilon=1e-6,
            resample_filter=tuple(self.resample_filter),
            resample_proj=True,
            adaptive_scale=False,
            use_affine=self.use_affine,
            init=_INIT,
            init_zero=_INIT_ZERO,
            init_attn=_INIT_ATTN,
            dtype=self.dtype,
        )
