"""Composition weights omega: how much each basis contributes under a condition."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_diffusion_jax.errors import UserError


def norm_groups(width: int) -> int:
    """Groups of the group norm of a hidden layer."""
    return max(1, min(32, width // 4))


class ConditionMLP(nn.Module):
    """UC-LoRA's weights: emb -> (Linear, GroupNorm, SiLU) per hidden width -> Linear.

    There is no softmax. The Linears are initialised kaiming-normal with std sqrt(1 / fan_in) and zero
    bias; the norms have min(32, width // 4) groups and epsilon 1e-5.

    Attributes:
        bases: number of weights.
        widths: hidden widths.
    """

    bases: int
    widths: Sequence[int] = (128, 64)

    @nn.compact
    def __call__(self, condition: Float[Array, "B E"]) -> Float[Array, "B bases"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        h = condition.astype(jnp.float32)
        for i, width in enumerate(self.widths):
            h = nn.Dense(width, kernel_init=init, name=f"dense_{i}")(h)
            norm = nn.GroupNorm(
                norm_groups(width), epsilon=1e-5, use_fast_variance=False, name=f"norm_{i}"
            )
            h = nn.silu(norm(h))
        return nn.Dense(self.bases, kernel_init=init, name="dense_out")(h)


def hat_functions(num_timesteps: int, bases: int) -> np.ndarray:
    """Linear interpolation between `bases` equally spaced anchor times 0, ..., T: [T + 1, bases].

    Row t holds the weights max(0, 1 - |t - a_i| (m - 1) / T) for the anchors a_i = i T / (m - 1).
    """
    if bases == 1:
        return np.ones((num_timesteps + 1, 1), np.float32)
    position = np.arange(num_timesteps + 1)[:, None] * (bases - 1) / num_timesteps
    return np.maximum(0.0, 1.0 - np.abs(position - np.arange(bases))).astype(np.float32)


class TimeTable(nn.Module):
    """TimeLoRA's weights: a learned table [T + 1, bases], one row per discrete time.

    It is initialised to `hat_functions`. Times between two rows are interpolated linearly.

    Attributes:
        bases: number of weights.
        num_timesteps: T; times lie in [0, T].
    """

    bases: int
    num_timesteps: int

    @nn.compact
    def __call__(
        self, time: Float[Array, "*leading"] | Int[Array, "*leading"]
    ) -> Float[Array, "*leading bases"]:
        table = self.param(
            "table", lambda key: jnp.asarray(hat_functions(self.num_timesteps, self.bases))
        )
        time = jnp.clip(jnp.atleast_1d(time).astype(jnp.float32), 0, self.num_timesteps)
        low = jnp.clip(jnp.floor(time).astype(jnp.int32), 0, self.num_timesteps - 1)
        part = (time - low)[..., None]
        return (1 - part) * table[low] + part * table[low + 1]


def class_weights(labels: jax.Array, num_classes: int) -> Float[Array, "*leading num_classes"]:
    """ClassLoRA's weights: the label itself, one-hot or a mixture; integer ids become one-hot.

    Raises:
        UserError: labels of another number of classes.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(jnp.atleast_1d(labels), num_classes)
    labels = jnp.atleast_2d(labels)  # a single input has [num_classes]
    if labels.shape[-1] != num_classes:
        raise UserError(
            f"ClassLoRA for {num_classes} classes got labels of shape {labels.shape}; give one-hot "
            f"labels or mixtures [B, {num_classes}], or integer ids [B]."
        )
    return labels.astype(jnp.float32)
