"""Embeddings of the noise level, sinusoids of fixed frequencies; class labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import UserError


def positional_embedding(
    t: Float[Array, " B"], channels: int, *, endpoint: bool = False, max_positions: float = 10000.0
) -> Float[Array, "B channels"]:
    """[cos(t f), sin(t f)] with f_i = max_positions^(-i / (n - endpoint)), n = channels / 2.

    Vaswani et al. 2017, as DDPM++ (endpoint included) and ADM (not included) use it.
    """
    half = channels // 2
    if channels % 2 or half <= endpoint:
        raise UserError(
            f"A noise embedding of {channels} channels has no frequencies to spread; "
            "choose an even model.channels of at least 4."
        )
    exponent = np.arange(half, dtype=np.float32) / np.float32(half - endpoint)
    frequencies = np.power(np.float32(1 / max_positions), exponent)
    phase = t[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class FourierEmbedding(nn.Module):
    """[cos(2 pi t f), sin(2 pi t f)] with fixed f ~ N(0, scale^2) (Tancik et al. 2020; NCSN++).

    The frequencies lie in the collection `buffers`: they are drawn once and never trained.
    """

    channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B channels"]:
        frequencies = self.variable(
            "buffers",
            "freqs",
            lambda: self.scale * jax.random.normal(self.make_rng("params"), (self.channels // 2,)),
        ).value
        phase = t[:, None].astype(jnp.float32) * (2 * np.pi * frequencies)
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def swap_halves(embedding: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """[cos, sin] -> [sin, cos], the order in which DDPM++ and NCSN++ feed it on."""
    return jnp.concatenate(jnp.split(embedding, 2, axis=-1)[::-1], axis=-1)


def drop_labels(
    class_labels: Float[Array, "B num_classes"] | None, num_classes: int, rate: float, train: bool
) -> Float[Array, "B num_classes"]:
    """Class labels as the label layer sees them: zeros for None, and zeroed at random in training.

    To be called inside a module: one uniform number per sample from its `dropout` stream decides for
    the whole label.
    """
    if class_labels is None:
        return jnp.zeros((1, num_classes))
    if not train or rate == 0:
        return class_labels
    # The mask has one column per sample, and labels are not scaled up as nn.Dropout's inputs are.
    kept = nn.Dropout(rate, deterministic=False)(jnp.ones((class_labels.shape[0], 1))) > 0
    return class_labels * kept
