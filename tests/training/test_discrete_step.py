"""Training steps of a discrete process: one device and eight, the mean over pixels, the plain average."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lora_diffusion_jax import lora
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.diffusion.precond import DDPM, Denoiser
from lora_diffusion_jax.factory.networks import Condition
from lora_diffusion_jax.factory.training import metrics_type
from lora_diffusion_jax.training import sharding
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.metrics import DiscreteMetrics, HybridMetrics, to_scalars
from lora_diffusion_jax.training.optimizer import Optimizer
from lora_diffusion_jax.training.state import create_state
from lora_diffusion_jax.training.step import make_train_step
from tests.diffusion.toy import PixelNet
from tests.small import fast_jit, run_on_eight

PROCESS = DDPM(num_steps=2047)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)
SGD = Optimizer(optax.identity(), lambda seen: jnp.float32(0.1))  # Adam would enlarge rounding


def objective(loss="hybrid"):
    """Of a network with TimeLoRA, whose table [2048, 8] is large enough to be split."""
    adapter = lora.TimeLoRA(rank=2, bases=8, num_timesteps=2047)
    condition = Condition(("time",), PROCESS, 2047, 0)
    network = lora.attach(PixelNet(), sites="qkv|proj", adapter=adapter, condition=condition)
    return Objective(Denoiser(network, dataclasses.replace(PROCESS, loss=loss)))


def initial_state():
    variables = objective().denoiser.init(jax.random.key(0), IMAGES[:1], jnp.ones(1))
    # Every parameter counts from the start.
    moved = jax.tree.map(
        lambda v: v + 0.05 * jnp.cos(jnp.arange(v.size)).reshape(v.shape), variables
    )
    return create_state(moved, SGD)


def step_on(mesh, **options):
    """The state after one step, and what it measured."""
    options = {"ema": Ema(100.0, None), "batch_size": 16, "mean_over_pixels": True} | options
    step = make_train_step(objective(), SGD, mesh=mesh, **options)
    layout = sharding.tree_sharding(jax.eval_shape(initial_state), mesh)
    state = jax.jit(initial_state, out_shardings=layout)()
    batch = {"image": jax.device_put(IMAGES, sharding.batch_sharding(mesh))}
    run = fast_jit(step, out_shardings=(layout, None))
    state, measured = run(state, batch, jax.random.key(1))
    return state, to_scalars(jax.device_get(measured))


def main():
    one, of_one = step_on(sharding.make_mesh(1, 1, jax.devices()[:1]))
    eight, of_eight = step_on(sharding.make_mesh(4, 2))
    gaps = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one.params, eight.params
    )
    leaves = jax.tree_util.tree_leaves_with_path(eight.params)
    layouts = [str(leaf.sharding.spec) for path, leaf in leaves if "table" in str(path)]
    print(json.dumps([of_one, of_eight, max(jax.tree.leaves(gaps)), layouts]))


@pytest.mark.slow
def test_eight_devices_train_like_one():
    printed = run_on_eight("-c", "from tests.training import test_discrete_step as t; t.main()")
    of_one, of_eight, gap, layouts = json.loads(printed.splitlines()[-1])
    assert {"train/loss_q0", "train/vb_q3", "train/mse", "train/lora_grad_norm"} <= set(of_one)
    assert of_one == pytest.approx(of_eight, rel=1e-5)
    assert of_one["train/update_norm"] > 1e-3
    assert gap < 1e-6
    assert layouts == [str(P("fsdp"))] * 2
    # The paper's table has an odd number of rows, and stays whole.
    assert sharding.leaf_spec((4001, 11), jax.sharding.AbstractMesh((4, 2), sharding.AXES)) == P()


def test_loss_is_averaged_over_pixels():
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    mean, _ = step_on(mesh)
    total, _ = step_on(mesh, mean_over_pixels=False)
    before = jax.device_get(initial_state().params)
    jax.tree.map(
        lambda p, a, b: np.testing.assert_allclose(16 * (a - p), b - p, rtol=1e-3, atol=1e-5),
        *(before, jax.device_get(mean.params), jax.device_get(total.params)),
    )


@pytest.mark.parametrize("microbatch", [None, 4])
def test_the_loss_and_its_terms_are_logged_by_quarter(microbatch):
    """mse is the loss `simple`, vb a thousandth of the loss `vlb`, whose weight is T."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    _, scalars = step_on(mesh, microbatch=microbatch)
    draws = objective().draw(jax.random.key(1), IMAGES.shape)
    images = IMAGES / np.float32(127.5) - 1

    def losses(name):
        function = functools.partial(objective(name).loss, train=False)
        variables = {"params": initial_state().params}
        return fast_jit(function)(variables, images, None, draws)["loss"].mean(axis=(1, 2, 3))

    mse, vb = losses("simple"), losses("vlb") / 1000
    levels = PROCESS.process.sigmas.astype(np.float32)
    quarter = 4 * np.searchsorted(levels, draws["sigma"]) // 2047
    for name, value in {"mse": mse, "vb": vb, "loss": mse + vb}.items():
        assert scalars[f"train/{name}"] == pytest.approx(float(value.mean()), rel=1e-5)
        for q in range(4):
            expected = pytest.approx(float(value[quarter == q].mean()), rel=1e-5)
            assert scalars[f"train/{name}_q{q}"] == expected


def test_a_loss_of_one_term_is_logged_once():
    step = make_train_step(
        objective("vlb"),
        SGD,
        ema=Ema(100.0, None),
        batch_size=16,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
    )
    batch = {"image": IMAGES}
    measured = jax.eval_shape(step, initial_state(), batch, jax.random.key(1))[1]
    assert isinstance(measured, DiscreteMetrics)
    assert metrics_type(objective("vlb").denoiser) is DiscreteMetrics
    assert metrics_type(objective().denoiser) is HybridMetrics


def test_average_without_ramp_up_is_that_of_every_step():
    """0.9999 a step of 128 images is a half-life of 128 ln 0.5 / ln 0.9999 images."""
    halflife = 128 * np.log(0.5) / np.log(0.9999)
    for seen in (0.0, 128.0, 1e9):
        kept = Ema(halflife, None).beta(jnp.float32(seen), 128)
        np.testing.assert_allclose(kept, 0.9999, rtol=1e-6)
