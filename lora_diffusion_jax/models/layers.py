"""Initialisers, dense and convolution layers, and attention of the U-Nets."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lora_diffusion_jax.models.convolution import conv, conv_for_training


@dataclasses.dataclass(frozen=True)
class Init:
    """Initialisation of a layer's weights and biases, scaled from a standard one.

    Attributes:
        mode: xavier_uniform U(-1, 1) sqrt(6 / (fan_in + fan_out)); kaiming_uniform
            U(-1, 1) sqrt(3 / fan_in); kaiming_normal N(0, 1 / fan_in).
        weight: factor on the weights.
        bias: factor on the biases, which follow the same law; 0 gives zeros.
    """

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]
    weight: float = 1.0
    bias: float = 0.0

    def kernel_init(self) -> nn.initializers.Initializer:
        """Returns the initialiser of a kernel [..., in, out]."""
        if self.weight == 0:
            return nn.initializers.zeros
        fan: Literal["fan_avg", "fan_in"] = "fan_avg" if self.mode == "xavier_uniform" else "fan_in"
        law: Literal["normal", "uniform"] = "normal" if self.mode == "kaiming_normal" else "uniform"
        return nn.initializers.variance_scaling(self.weight**2, fan, law)

    def bias_init(self, fan_in: int) -> nn.initializers.Initializer:
        """Returns the initialiser of a bias [out] of a layer with `fan_in` inputs per output."""
        if self.bias == 0:
            return nn.initializers.zeros
        if self.mode != "kaiming_uniform":
            raise NotImplementedError(
                f"Random biases are defined for kaiming_uniform, not {self.mode}."
            )
        limit = self.bias * (3.0 / fan_in) ** 0.5
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
            key, shape, dtype, -limit, limit
        )


def dense(
    x: Float[Array, "... c_in"] | Sequence[Float[Array, "... _"]],
    features: int,
    init: Init,
    *,
    name: str,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... features"]:
    """A linear layer, or a 1x1 convolution: the same product over the channels.

    Args:
        x: may be in parts, whose channels follow one another. On accelerators they are multiplied one by
            one, so that the array of all need not be written to memory.
    """
    parts = tuple(x) if isinstance(x, tuple | list) else (x,)
    x = jnp.concatenate(parts, axis=-1)
    widths = tuple(part.shape[-1] for part in parts)
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=init.kernel_init(),
        bias_init=init.bias_init(x.shape[-1]),
        dot_general=functools.partial(dot_of_parts, widths) if len(parts) > 1 else flat_dot_general,
        name=name,
    )(x)


def flat_dot_general(x: Array, kernel: Array, dimension_numbers: Any, **rest: Any) -> Array:
    """`jax.lax.dot_general` as `nn.Dense` calls it, with all leading axes of x as one.

    XLA on CPU transposes the operands of a product over several axes, such as that of the kernel's
    gradient, which then takes three times as long.
    """
    ((axes, first), batch) = dimension_numbers
    if x.ndim < 3 or tuple(axes) != (x.ndim - 1,) or any(batch):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **rest)
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, kernel, (((1,), first), ((), ())), **rest)
    return out.reshape(*x.shape[:-1], *out.shape[1:])


def dot_of_parts(
    widths: Sequence[int], x: Array, kernel: Array, dimension_numbers: Any, **rest: Any
) -> Array:
    """`flat_dot_general` of x, the concatenation of parts of these widths: the sum of their products.

    XLA takes the parts themselves for the slices of their concatenation. On CPU, one product of all is
    faster. In half precision each product is rounded before the sum; kept in float32, they would take more
    memory traffic than the concatenation.
    """
    ends = np.cumsum(widths)[:-1].tolist()

    def together(x: Array, kernel: Array) -> Array:
        return flat_dot_general(x, kernel, dimension_numbers, **rest)

    def separately(x: Array, kernel: Array) -> Array:
        pairs = zip(jnp.split(x, ends, axis=-1), jnp.split(kernel, ends), strict=True)
        products = (flat_dot_general(*pair, dimension_numbers, **rest) for pair in pairs)
        return functools.reduce(jnp.add, products)

    @jax.custom_jvp
    def product(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=together, default=separately)

    @product.defjvp
    def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        return product(*primals), jax.jvp(separately, primals, tangents)[1]

    return product(x, kernel)


def conv3x3(
    x: Float[Array, "B H W c_in"],
    features: int,
    init: Init,
    *,
    name: str,
    stride: int = 1,
    padding: int = 1,
    dtype: DTypeLike = jnp.float32,
    train: bool = False,
) -> Float[Array, "B H2 W2 features"]:
    """A 3x3 convolution with zero padding, computed by `models.convolution`."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=init.kernel_init(),
        bias_init=init.bias_init(9 * x.shape[-1]),
        conv_general_dilated=conv_for_training if train else conv,
        name=name,
    )(x)


AttentionFn = Callable[[Array, Array, Array], Array]  # q, k, v, all [B, pixels, heads, ch]


def self_attention(
    qkv: Float[Array, "B H W 3C"],
    num_heads: int,
    *,
    qkv_last: bool = True,
    attention_fn: AttentionFn = jax.nn.dot_product_attention,
) -> Float[Array, "B H W C"]:
    """Softmax attention between all pixels; logits and softmax in float32, scaled by 1/sqrt(ch).

    Args:
        qkv: its channels are ordered (head, c, {q, k, v}), as in the EDM networks.
        num_heads: divides C.
        qkv_last: False: the channels are ordered (head, {q, k, v}, c), as in improved-diffusion.
        attention_fn: computes the attention from q, k and v.
    """
    batch, height, width, channels = qkv.shape
    inner = (-1, 3) if qkv_last else (3, -1)
    split = qkv.reshape(batch, height * width, num_heads, *inner)
    q, k, v = jnp.unstack(split, axis=-1 if qkv_last else -2)  # [B, HW, heads, ch]
    return attention_fn(q, k, v).reshape(batch, height, width, channels // 3)
