"""Attention, products and initialisation against flax, NumPy and the equations."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models import layers
from lora_diffusion_jax.models.layers import Init, conv3x3, dense, self_attention

FLOAT32 = 2e-6  # a few roundings of numbers of order 1


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_by_hand(qkv: np.ndarray, num_heads: int) -> np.ndarray:
    """Softmax attention in float64, one head, one query at a time; channels (head, c, {q, k, v})."""
    batch, height, width, channels = qkv.shape
    size = channels // (3 * num_heads)
    flat = np.float64(qkv).reshape(batch, height * width, channels)
    out = np.zeros((batch, height * width, channels // 3))
    for b in range(batch):
        for head in range(num_heads):
            first = head * size * 3
            q, k, v = (flat[b][:, first + i : first + 3 * size : 3] for i in range(3))
            for i in range(height * width):
                logits = k @ q[i] / np.sqrt(size)
                weights = np.exp(logits - logits.max())
                out[b, i, head * size : (head + 1) * size] = weights @ v / weights.sum()
    return out.reshape(batch, height, width, channels // 3)


@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("magnitude", [1.0, 10.0])
def test_attention_agrees_with_softmax_by_hand(num_heads: int, magnitude: float) -> None:
    qkv = magnitude * random(2, 3, 4, 3 * 4 * num_heads)
    found = jax.jit(lambda qkv: self_attention(qkv, num_heads))(qkv)
    expected = attention_by_hand(qkv, num_heads)
    # Logits of size 100 carry an absolute rounding of 1e-5 into the exponent.
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32 * magnitude**2)


def test_attention_of_equal_keys_is_the_mean_of_the_values() -> None:
    qkv = random(1, 2, 2, 12).reshape(1, 2, 2, 4, 3)
    qkv[..., 1] = 1.0
    mean = qkv[..., 2].mean((1, 2), keepdims=True)
    found = jax.jit(lambda qkv: self_attention(qkv, 1))(qkv.reshape(1, 2, 2, 12))
    np.testing.assert_allclose(found, np.broadcast_to(mean, (1, 2, 2, 4)), atol=FLOAT32)


# mode, limit of the uniform laws (None: normal), standard deviation, for fan_in 300 and fan_out 500
LAWS = [
    ("xavier_uniform", (6 / 800) ** 0.5, (2 / 800) ** 0.5),
    ("kaiming_uniform", (3 / 300) ** 0.5, (1 / 300) ** 0.5),
    ("kaiming_normal", None, (1 / 300) ** 0.5),
]


@pytest.mark.parametrize(("mode", "limit", "std"), LAWS)
@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_kernels_start_with_their_law(
    mode: str, limit: float | None, std: float, weight: float
) -> None:
    kernel = Init(mode, weight=weight).kernel_init()(jax.random.key(0), (300, 500))
    assert kernel.std() == pytest.approx(weight * std, rel=0.01)  # 150,000 draws: 0.2 %
    if limit is not None:
        assert 0.999 * weight * limit < jnp.abs(kernel).max() <= weight * limit * (1 + 1e-6)
    else:
        assert jnp.abs(kernel).max() > 3.5 * weight * std  # not truncated


def test_the_fan_of_a_convolution_counts_its_window() -> None:
    x = jnp.zeros((1, 4, 4, 20))
    init = Init("kaiming_uniform", weight=1.0, bias=0.5)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            conv3x3(x, 2000, init, name="conv")
            return dense(x, 2000, init, name="dense")

    params = jax.jit(Layers().init)(jax.random.key(0), x)["params"]
    for name, fan_in in (("conv", 180), ("dense", 20)):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        assert jnp.abs(kernel).max() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)
        assert jnp.abs(bias).max() == pytest.approx(0.5 * (3 / fan_in) ** 0.5, rel=0.01)
        assert bias.std() == pytest.approx(0.5 * (1 / fan_in) ** 0.5, rel=0.1)


def test_an_init_of_weight_zero_is_zero() -> None:
    init = Init("kaiming_uniform", weight=0.0)
    assert not init.kernel_init()(jax.random.key(0), (3, 4)).any()
    assert not init.bias_init(3)(jax.random.key(0), (4,)).any()


@pytest.mark.parametrize("widths", [(4, 4), (6, 2, 3)])
def test_parts_are_multiplied_like_their_concatenation(widths: tuple[int, ...]) -> None:
    """In value, and in derivatives of both modes."""
    parts = [random(2, 3, 3, width, seed=width) for width in widths]
    params = {"kernel": random(sum(widths), 5), "bias": random(5, seed=9)}

    def of_parts(params, parts):
        return Dense().apply({"params": {"dense": params}}, tuple(parts))

    def of_whole(params, parts):
        return np.concatenate(parts, -1) @ params["kernel"] + params["bias"]

    np.testing.assert_allclose(of_parts(params, parts), of_whole(params, parts), atol=5 * FLOAT32)
    whole = lambda p, xs: jnp.concatenate(xs, -1) @ p["kernel"] + p["bias"]  # noqa: E731
    ones = jax.tree.map(jnp.ones_like, (params, parts))
    (_, found), (_, expected) = (jax.jvp(f, (params, parts), ones) for f in (of_parts, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=FLOAT32)
    for f, g in zip(*(gradients(f, params, parts) for f in (of_parts, whole)), strict=True):
        np.testing.assert_allclose(f, g, rtol=1e-5, atol=1e-4)


class Dense(nn.Module):
    """A layer of `dense`."""

    @nn.compact
    def __call__(self, x):
        return dense(x, 5, Init("xavier_uniform"), name="dense")


def gradients(function, *args):
    return jax.tree.leaves(jax.grad(lambda args: jnp.sum(jnp.sin(function(*args))))(args))


def test_parts_are_multiplied_one_by_one_on_accelerators() -> None:
    """In half precision, each product and their sum are rounded."""
    x = jnp.asarray(random(16, 128), jnp.bfloat16)
    kernel = jnp.asarray(random(128, 8, seed=1), jnp.bfloat16)

    def product(x, kernel):
        return layers.dot_of_parts((96, 32), x, kernel, (((1,), (0,)), ((), ())))

    for platform, count in (("cuda", 2), ("tpu", 2), ("cpu", 1)):
        exported = jax.export.export(jax.jit(product), platforms=[platform])(x, kernel)
        assert exported.mlir_module().count("stablehlo.dot_general") == count
    # The tangent is linear in x, and computed from the parts everywhere.
    _, tangent = jax.jvp(lambda x: product(x, kernel), (x,), (x,))
    parts = [np.float64(x[:, s]) @ np.float64(kernel[s]) for s in (np.s_[:96], np.s_[96:])]
    bound = 2**-7 * sum(abs(p) for p in [*parts, sum(parts)]) + 1e-3
    assert tangent.dtype == jnp.bfloat16
    assert np.all(abs(np.float64(tangent) - sum(parts)) <= bound)
