"""Adapters: m low-rank pairs beside a layer, mixed by composition weights (arXiv 2405.03958).

    y = W x + b + sum_i omega_i(condition) (B_i A_i x + sum_r bias_{i r})

with A_i: r x d_in ~ N(0, 1/r^2), and B_i: d_out x r and bias zero at initialisation, so that the layer
starts unchanged. There is no alpha / r factor: the scale is 1, unless an adapter has another.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lora.composition import (
    ConditionMLP,
    TimeTable,
    class_weights,
    norm_groups,
)

SCALES = "scales"  # collection of the factors of what adapters add
LAYER_TYPES = (nn.Dense, nn.DenseGeneral, nn.Conv)


def _down(layer: nn.Module, width: int, rank: int) -> nn.Module:
    """The map d_in -> m * r, which sees the same inputs as the layer: same axes, window, stride."""
    common = {
        "use_bias": False,
        "kernel_init": nn.initializers.normal(1 / rank),
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "precision": layer.precision,
        "name": "down",
    }
    if isinstance(layer, nn.Dense):
        return nn.Dense(width, **common)
    if isinstance(layer, nn.DenseGeneral):
        return nn.DenseGeneral(width, axis=layer.axis, **common)
    window = ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation")
    return nn.Conv(width, **{k: getattr(layer, k) for k in window}, **common)


def _up(layer: nn.Module) -> nn.Module:
    """The map m * r -> d_out, zero at initialisation."""
    return nn.DenseGeneral(
        layer.features,
        use_bias=False,
        kernel_init=nn.initializers.zeros,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        precision=layer.precision,
        name="up",
    )


def _by_rows(layer: nn.Module, x: Array) -> Array:
    """A layer that works on the last axis, given a matrix.

    XLA on CPU transposes the operands of products over several axes, such as the kernel's gradient.
    """
    y = layer(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def check_layer(layer: nn.Module, path: str) -> None:
    """Raises UserError for a layer that cannot have a low-rank pair beside it."""
    if not isinstance(layer, LAYER_TYPES):
        raise UserError(
            f"LoRA site '{path}' is a {type(layer).__name__}; adapters go beside Dense, DenseGeneral "
            "and Conv layers. Narrow the site pattern."
        )
    grouped = isinstance(layer, nn.Conv) and layer.feature_group_count != 1
    batched = isinstance(layer, nn.DenseGeneral) and layer.batch_dims != ()
    masked = isinstance(layer, nn.Conv) and layer.mask is not None
    if grouped or batched or masked:
        raise UserError(
            f"LoRA site '{path}' is a {type(layer).__name__} with "
            f"{'feature groups' if grouped else 'batch_dims' if batched else 'a mask'}, for which a "
            "shared low-rank pair is not defined. Exclude it from the site pattern."
        )


class LowRankAdapter(nn.Module):
    """Base class of adapters: a down/up pair of m * r channels, scaled by the composition weights.

    Inputs may lack their batch axis, as under jax.vmap: then the condition lacks it too.

    Called as adapter(layer, x, condition) -> what to add to the layer's output. The inner channel is
    basis * rank + r. A subclass defines `compose(condition) -> omega [*leading, m]`, which also fixes
    the number m of bases. The leading axes are those of the layer's input, or 1: [B, m] has one row per
    sample, [B, tokens, m] one per token, [1, m] one for all. The weights, times the scale, are sown as
    ('intermediates', 'omega').

    Attributes:
        rank: r of each basis.
        use_bias: whether a bias per inner channel, [m * r, d_out], is mixed in with the same weights.
        scale: factor of all that the adapter adds.
    """

    rank: int = 4
    use_bias: bool = False
    scale: float = dataclasses.field(default=1.0, kw_only=True)

    def compose(self, condition: Any) -> Float[Array, "*leading bases"]:
        """Composition weights for a condition."""
        raise NotImplementedError

    def example(self, width: int | None) -> Any:
        """A condition for initialisation: None if it takes the width E, and that is not known."""
        return None if width is None else jnp.zeros((1, width))

    def validate(self) -> None:
        """Raises UserError unless all sizes are positive integers, and the scale a finite number."""
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise UserError(f"LoRA scale is {self.scale!r}; it must be a number.")
        if not np.isfinite(self.scale):
            raise UserError(f"LoRA scale is {self.scale!r}; it must be finite.")
        for name in ("rank", "bases", "num_timesteps", "num_classes"):
            value = getattr(self, name, 1)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"LoRA {name} is {value!r}; it must be a positive integer "
                    "(use lora.mode=baseline for a network without LoRA)."
                )

    @nn.compact
    def __call__(self, layer: nn.Module, x: Array, condition: Any) -> Array:
        omega = self.compose(condition)  # [*leading, m]
        if self.scale != 1:
            omega = self.scale * omega
        if self.has_variable(SCALES, "scale"):  # of `params.with_scale`
            scale: Array = self.get_variable(SCALES, "scale")
            omega = scale.reshape(-1, *[1] * (omega.ndim - 1)) * omega
        if omega.ndim < 2:
            raise UserError(
                f"compose returned weights of shape {omega.shape} at '{'/'.join(self.path)}'; it must "
                "return [B, m], or [1, m] for all samples."
            )
        self.sow("intermediates", "omega", omega)
        weights = jnp.repeat(omega, self.rank, axis=-1)  # [*leading, m * r]
        width = weights.shape[-1]
        down = _down(layer, width, self.rank)
        hidden = _by_rows(down, x) if isinstance(down, nn.Dense) else down(x)  # [B, ..., m * r]
        leading = self._leading(omega.shape[:-1], hidden.shape[:-1])
        scaled = hidden * weights.reshape(*leading, width).astype(hidden.dtype)
        delta = _by_rows(_up(layer), scaled)
        if self.use_bias:
            features = delta.shape[hidden.ndim - 1 :]
            shape = (width, int(np.prod(features)))
            mixed = weights @ self.param("bias", nn.initializers.zeros, shape)
            delta = delta + mixed.astype(delta.dtype).reshape(*leading, *features)
        return delta

    def _leading(self, axes: tuple[int, ...], positions: tuple[int, ...]) -> tuple[int, ...]:
        """The weights' axes before the channels, with an axis of 1 for each position that they lack.

        No axes if they are all 1: such weights serve any input, also one without a batch axis. Weights per
        sample get them for height and width, or for the sequence.
        """
        if all(size == 1 for size in axes):
            return ()
        while axes[-1] == 1:
            axes = axes[:-1]
        fits = len(axes) <= len(positions) and all(
            size in (1, position) for size, position in zip(axes, positions, strict=False)
        )
        if not fits:
            raise UserError(
                f"The LoRA condition at '{'/'.join(self.path)}' has the leading shape {axes}, the layer's "
                f"input {positions}; they must agree from the left, or be 1: [1, E] for all, [B, E] for "
                "one row per sample, [B, tokens, E] for one per token."
            )
        return (*axes, *[1] * (len(positions) - len(axes)))


class UCLoRA(LowRankAdapter):
    """UC-LoRA: weights from an MLP per site on the network's condition embedding.

    Attributes:
        bases: number m of low-rank pairs.
        widths: hidden widths of the MLP.
    """

    use_bias: bool = True
    bases: int = 18
    widths: Sequence[int] = (128, 64)

    def compose(self, condition: Float[Array, "*leading E"]) -> Float[Array, "*leading bases"]:
        """The MLP's output for the embedding [B, E] or [B, tokens, E], or [E] for a single input."""
        if jnp.ndim(condition) < 1:
            raise UserError(
                f"The LoRA condition at '{'/'.join(self.path)}' is one number; UC-LoRA needs an embedding "
                "[B, E], one vector per sample."
            )
        condition = jnp.atleast_2d(condition)
        rows = condition.reshape(-1, condition.shape[-1])  # group norm is of each vector
        omega = ConditionMLP(self.bases, tuple(self.widths), name="composition")(rows)
        return omega.reshape(*condition.shape[:-1], self.bases)

    def validate(self) -> None:
        """Raises UserError unless all sizes are positive integers that a group norm can split."""
        super().validate()
        if not isinstance(self.widths, Sequence) or isinstance(self.widths, str):
            raise UserError(
                f"LoRA widths are {self.widths!r}; expected a tuple of hidden widths, such as (128, 64)."
            )
        if any(not isinstance(w, int) or w < 1 for w in self.widths):
            raise UserError(
                f"LoRA widths are {tuple(self.widths)}; hidden widths must be positive integers."
            )
        for width in self.widths:
            if width % norm_groups(width):
                raise UserError(
                    f"LoRA widths are {tuple(self.widths)}; group norm cannot split {width} into "
                    f"{norm_groups(width)} equal groups. Use multiples of 4 (of 32 above 128)."
                )


class TimeLoRA(LowRankAdapter):
    """TimeLoRA: weights from a learned table per site over discrete times; the condition is the time [B].

    A time per token is [B, tokens].

    Attributes:
        bases: number m of low-rank pairs, anchored at equally spaced times.
        num_timesteps: T; times lie in [0, T].
    """

    bases: int = 11
    num_timesteps: int = 4000

    def compose(self, condition: Float[Array, "*leading"]) -> Float[Array, "*leading bases"]:
        """The table's rows at the times, interpolated between two."""
        return TimeTable(self.bases, self.num_timesteps, name="composition")(condition)

    def example(self, width: int | None) -> Any:
        """The time 0."""
        return jnp.zeros(1)


class ClassLoRA(LowRankAdapter):
    """ClassLoRA: one pair per class, weighted by the label (ids [B] or one-hot [B, num_classes]).

    Attributes:
        num_classes: number of classes, and of pairs.
    """

    num_classes: int = 10

    def compose(self, condition: jax.Array) -> Float[Array, "*leading num_classes"]:
        """The label itself."""
        return class_weights(condition, self.num_classes)

    def example(self, width: int | None) -> Any:
        """The class 0."""
        return jnp.zeros(1, jnp.int32)


class StaticLoRA(LowRankAdapter):
    """LoRA without a condition: all weights are 1. It shows, by comparison, what the condition contributes.

    Its m pairs of rank r are one of rank m r, whose A has the spread that those of the other adapters have.

    Attributes:
        bases: number m of low-rank pairs.
    """

    bases: int = 18

    def compose(self, condition: Any) -> Float[Array, "1 bases"]:
        """Ones, for all samples."""
        return jnp.ones((1, self.bases))

    def example(self, width: int | None) -> Any:
        """Any condition will do."""
        return ()


class SumOfAdapters(nn.Module):
    """Several adapters on the same sites, each with its own condition (TimeLoRA and ClassLoRA, say).

    Attributes:
        adapters: name -> adapter; the condition is a mapping with the same names.
    """

    adapters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.adapters, Mapping):  # `validate` refuses the rest
            object.__setattr__(self, "adapters", FrozenDict(self.adapters))  # which has a hash
        super().__post_init__()

    def validate(self) -> None:
        """Raises UserError for other things than adapters by name, or invalid sizes."""
        given = self.adapters.values() if isinstance(self.adapters, Mapping) else [None]
        if not given or not all(isinstance(adapter, LowRankAdapter) for adapter in given):
            raise UserError(
                "SumOfAdapters has other things than adapters by name; expected such as "
                "{'time': TimeLoRA(), 'class': ClassLoRA()}."
            )
        for adapter in given:
            adapter.validate()

    def example(self, width: int | None) -> Any:
        """A condition for each adapter, None if one of them has none."""
        parts = {name: adapter.example(width) for name, adapter in self.adapters.items()}
        return None if any(part is None for part in parts.values()) else parts

    @nn.compact
    def __call__(self, layer: nn.Module, x: Array, condition: Mapping[str, Any]) -> Array:
        if set(condition) != set(self.adapters):
            raise UserError(
                f"The LoRA condition has the parts {sorted(condition)}, the adapters are "
                f"{sorted(self.adapters)}; give one condition per adapter."
            )
        return sum(
            adapter.clone(parent=self, name=name)(layer, x, condition[name])
            for name, adapter in self.adapters.items()
        )


def time_class_lora(
    rank: int = 4, bases: int = 11, num_timesteps: int = 4000, num_classes: int = 10
) -> SumOfAdapters:
    """W + sum_i omega_i(t) B_i A_i + B'_c A'_c: TimeLoRA `time` and ClassLoRA `class` of one rank."""
    return SumOfAdapters(
        {
            "time": TimeLoRA(rank=rank, bases=bases, num_timesteps=num_timesteps),
            "class": ClassLoRA(rank=rank, num_classes=num_classes),
        }
    )


# lora.adapter -> the adapter from its sizes
ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    "uc": UCLoRA,
    "time": TimeLoRA,
    "class": ClassLoRA,
    "time_class": time_class_lora,
    "static": StaticLoRA,
}
# lora.adapter -> what a config's network gives it as its condition: the output of the mapping network
# (`map`, alone), the time, or the class; otherwise a mapping by these names, empty for none
CONDITIONS: dict[str, tuple[str, ...]] = {
    "uc": ("map",),
    "time": ("time",),
    "class": ("class",),
    "time_class": ("time", "class"),
    "static": (),
}
