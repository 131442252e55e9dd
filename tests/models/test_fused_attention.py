"""The attention for TPUs beside JAX's own, with the kernel interpreted on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lora_diffusion_jax.factory import networks, pretrained, training
from lora_diffusion_jax.interop import sampler_export
from lora_diffusion_jax.models import NETWORKS, fused_attention, layers
from lora_diffusion_jax.models.fused_attention import FusedAttention
from lora_diffusion_jax.training.sharding import batch_sharding, make_mesh
from tests.small import ROOT, run_on_eight, small_config

PLAIN = jax.nn.dot_product_attention
ONE = FusedAttention(make_mesh(devices=jax.devices()[:1]))


def random_qkv(batch, height, width, channels, dtype="float32"):
    return jax.random.normal(jax.random.key(0), (batch, height, width, 3 * channels), dtype)


def is_fused(attention_fn, qkv) -> bool:
    def call(qkv):
        return layers.self_attention(qkv, 2, attention_fn=attention_fn)

    return "pallas_call" in str(jax.make_jaxpr(call)(qkv))


def value_and_gradient(attention_fn, qkv):
    def loss(qkv):
        out = layers.self_attention(qkv, 2, attention_fn=attention_fn).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, gradient.astype(jnp.float32)


def agree(fused, qkv, tolerance):
    assert is_fused(fused, qkv)
    wanted = value_and_gradient(PLAIN, qkv)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradient(fused, qkv)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("height", "dtype", "tolerance"),
    [(32, "float32", 2e-6), (32, "bfloat16", 2e-2), (48, "float32", 2e-6)],
)
def test_value_and_gradient(height, dtype, tolerance):
    """1,024 pixels, which are loaded at once, and 1,536, which are not."""
    agree(ONE, random_qkv(1, height, 32, 16, dtype), tolerance)


@pytest.mark.parametrize(("wrap", "kernels"), [(lambda f: f, 3), (jax.checkpoint, 4)])
def test_kernels_of_a_step(wrap, kernels):
    """The output and two for the gradients; the output again where it is recomputed (`train.remat`)."""

    @jax.grad
    def gradient(qkv):
        attend = wrap(lambda qkv: layers.self_attention(qkv, 2, attention_fn=ONE))
        return jnp.sum(jnp.sin(attend(qkv)))

    lowered = jax.jit(gradient).trace(random_qkv(1, 32, 32, 16)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == kernels


def on_eight():
    """Prints the shape of q in each device's kernel."""
    mesh = make_mesh(data=4, fsdp=2)
    fused = FusedAttention(mesh)
    qkv = jax.ShapeDtypeStruct((16, 32, 32, 3 * 16), "float32", sharding=batch_sharding(mesh))
    call = jax.jit(lambda qkv: layers.self_attention(qkv, 2, attention_fn=fused))
    text = call.trace(qkv).lower(lowering_platforms=("tpu",)).as_text()
    (kernel,) = (line for line in text.splitlines() if "@tpu_custom_call" in line)
    print(re.search(r"\(tensor<([\dx]+)xf32>", kernel)[1])
    assert not is_fused(fused, random_qkv(1, 32, 32, 16)), "one image cannot be split"


def test_a_batch_split_over_devices():
    """Sixteen images over eight devices are two each: [2, heads, pixels, channels of a head]."""
    program = "from tests.models import test_fused_attention as t; t.on_eight()"
    assert run_on_eight("-c", program, cwd=ROOT).strip() == "2x2x1024x8"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 16, 32, 16), "float32"),  # 512 pixels: too few to pay off
        ((1, 33, 32, 16), "float32"),  # no multiple of a block
        ((1, 32, 32, 2 * 144), "float32"),  # wide heads
        ((1, 32, 32, 16), "float16"),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_jax(shape, dtype):
    assert not is_fused(ONE, random_qkv(*shape, dtype))


class Tpu:
    """What `for_mesh` sees of a mesh of TPUs."""

    platform = "tpu"

    def __init__(self) -> None:
        self.devices = np.array([self])


@pytest.mark.parametrize("mode", [pytest.param("baseline", marks=pytest.mark.slow), "with_lora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_tpus_are_fused(name, mode, monkeypatch):
    """The whole network calls what `for_mesh` sets."""
    monkeypatch.setattr(fused_attention.FusedAttention, "__call__", refuse)
    denoiser = networks.build_denoiser(
        small_config(model__name=name, model__channels=64, lora__mode=mode)
    )
    fused = networks.for_mesh(denoiser, Tpu(), train=True)
    x = jnp.zeros((1, 8, 8, 1))

    def trace(denoiser):
        return jax.eval_shape(lambda: denoiser.init(jax.random.key(0), x, jnp.ones(1)))

    trace(denoiser)
    with pytest.raises(Refused):
        trace(fused)
    assert networks.for_mesh(denoiser, ONE.mesh, train=True) is denoiser
    assert networks.for_mesh(denoiser, ONE.mesh, train=False) is denoiser


class Refused(Exception):
    """Raised in place of fused attention."""


def refuse(*_):
    raise Refused


def test_training_and_sampling_are_for_their_mesh(monkeypatch):
    """Each builds its program from what `for_mesh` returns."""
    config = small_config()
    denoiser = networks.build_denoiser(config)
    fused = networks.for_mesh(denoiser, Tpu(), train=True)
    monkeypatch.setattr(training, "for_mesh", lambda *_, train: fused)
    assert training.build_generator(config, denoiser, ONE.mesh).denoiser is fused
    used = []
    monkeypatch.setattr(training, "build_objective", lambda _, network: used.append(network))
    monkeypatch.setattr(training.step, "make_train_step", lambda *_, **__: None)
    training.build_step(config, denoiser, ONE.mesh)
    assert used[0] is fused


@pytest.mark.slow
def test_an_exported_sampler_is_for_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(fused_attention.FusedAttention, "__call__", refuse)
    monkeypatch.setattr(
        training, "for_mesh", lambda d, _, train: networks.for_mesh(d, Tpu(), train)
    )
    config = small_config(sampler__num_steps=2, sampler__batch_size=1)
    denoiser = networks.build_denoiser(config)
    variables = networks.init_variables(config, denoiser, jax.random.key(0))
    run = pretrained.Pretrained(denoiser, variables, config)
    sampler_export.export_sampler(tmp_path / "sampler.jax", run, {})
    assert (tmp_path / "sampler.jax").stat().st_size > 1000
