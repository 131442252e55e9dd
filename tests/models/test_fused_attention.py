"""The attention for TPUs beside JAX's own, with the kernel interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from small import small_config

from lora_diffusion_jax.factory import networks
from lora_diffusion_jax.models import layers
from lora_diffusion_jax.models.fused_attention import FusedAttention
from lora_diffusion_jax.training.sharding import make_mesh

MESH = make_mesh()


def random_qkv(batch: int, side: int, channels: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, side, side, 3 * channels), dtype)


def value_and_gradient(attention_fn, qkv):
    def loss(qkv):
        out = layers.self_attention(qkv, 2, attention_fn=attention_fn).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, gradient.astype(jnp.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_value_and_gradient(dtype, tolerance):
    qkv = random_qkv(1, 32, 16, dtype)
    wanted = value_and_gradient(jax.nn.dot_product_attention, qkv)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradient(FusedAttention(MESH), qkv)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 48, 16), (1, 32, 2 * 144)])
def test_what_the_kernel_does_not_take_is_left_to_jax(shape):
    """Few pixels, a number of pixels that no block divides, and heads of 144 channels."""
    qkv = random_qkv(*shape)
    wanted, found = (
        jax.make_jaxpr(functools.partial(layers.self_attention, num_heads=2, attention_fn=f))(qkv)
        for f in (jax.nn.dot_product_attention, FusedAttention(MESH))
    )
    assert str(found) == str(wanted)


class Tpu:
    """What `for_mesh` sees of a mesh of TPUs."""

    def __init__(self, platform: str = "tpu") -> None:
        self.devices = np.array([self])
        self.platform = platform


@pytest.mark.parametrize("mode", ["baseline", "with_lora"])
def test_networks_on_tpus_are_fused(mode):
    denoiser = networks.build_denoiser(small_config(lora__mode=mode))
    mesh = Tpu()
    fused = networks.for_mesh(denoiser, mesh)
    unet = fused.model if mode == "baseline" else fused.model.module
    assert unet.attention_fn == FusedAttention(mesh)
    assert networks.for_mesh(denoiser, Tpu("gpu")) is denoiser
    assert networks.for_mesh(denoiser, MESH) is denoiser
