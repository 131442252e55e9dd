"""Which attention goes to cuDNN. No GPU is needed: JAX's function is replaced by one that records."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.factory import networks
from lora_diffusion_jax.models.cudnn_attention import CudnnAttention
from tests.small import small_config

XLA = jax.nn.dot_product_attention


def gpu(capability: str, client: str = "PJRT C API\ncuda 13000"):
    """What `for_mesh` sees of a mesh of GPUs."""
    device = types.SimpleNamespace(
        platform="gpu",
        compute_capability=capability,
        client=types.SimpleNamespace(platform_version=client),
    )
    return types.SimpleNamespace(devices=np.array([device]))


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The implementations that were asked for; XLA's answers."""
    names = []

    def attention(q, k, v, *, implementation):
        names.append(implementation)
        return XLA(q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return names


@pytest.mark.parametrize(
    ("pixels", "ch", "dtype", "expected"),
    [
        (64, 128, "bfloat16", "cudnn"),
        (1024, 8, "float16", "cudnn"),
        (64, 136, "bfloat16", "xla"),
        (64, 12, "bfloat16", "xla"),
        (16, 128, "bfloat16", "xla"),
        (64, 128, "float32", "xla"),
    ],
)
def test_what_cudnn_does_not_take_is_left_to_xla(asked, pixels, ch, dtype, expected) -> None:
    q = jnp.ones((1, pixels, 2, ch), dtype)
    assert CudnnAttention(128)(q, q, q).shape == q.shape
    assert asked == [expected]


@pytest.mark.parametrize(
    ("capability", "heads"), [("8.0", 128), ("8.9", 128), ("9.0", 256), ("12.1", 256)]
)
def test_wide_heads_from_hopper_on(asked, capability, heads) -> None:
    denoiser = networks.build_denoiser(small_config(lora__mode="baseline"))
    fused = networks.for_mesh(denoiser, gpu(capability), train=False)
    assert fused.model.attention_fn == CudnnAttention(heads)


def test_without_cudnn_xla_attends() -> None:
    """As here: JAX's own function refuses, for there is no cuDNN."""
    denoiser = networks.build_denoiser(small_config())
    assert networks.for_mesh(denoiser, gpu("9.0"), train=False) is denoiser


@pytest.mark.parametrize("mesh", [gpu("7.5"), gpu("gfx90a", "rocm 60000")])
def test_other_gpus_have_none(mesh) -> None:
    denoiser = networks.build_denoiser(small_config())
    assert networks.for_mesh(denoiser, mesh, train=False) is denoiser


def test_training_keeps_xlas() -> None:
    denoiser = networks.build_denoiser(small_config())
    assert networks.for_mesh(denoiser, gpu("9.0"), train=True) is denoiser


def test_sampling_in_half_precision_calls_it(asked) -> None:
    """The whole network, with adapters, at 8 x 8 pixels."""
    config = small_config(model__channels=32, model__attn_resolutions=(8,), dtype="bfloat16")
    denoiser = networks.for_mesh(networks.build_denoiser(config), gpu("9.0"), train=False)
    x = jnp.zeros((1, 8, 8, 1))
    jax.eval_shape(lambda: denoiser.init(jax.random.key(0), x, jnp.ones(1)))
    assert "cudnn" in asked
