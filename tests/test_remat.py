"""train.remat: less memory, the same parameters, values, dropout and gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables
from lora_diffusion_jax.factory.objectives import build_objective
from lora_diffusion_jax.models.blocks import REMAT
from tests.small import fast_jit, small_config


def small(remat: str, *, network: str = "ddpmpp", mode: str = "with_lora") -> ConfigDict:
    return small_config(
        class_conditional=True,
        data__channels=3,
        data__num_classes=4,
        model__name=network,
        # ADM has no attention, and so no LoRA, below 64 channels; improved's norms have 32 groups.
        model__channels=16 if network == "ddpmpp" else 64,
        model__channel_mult=(1,),
        model__attn_resolutions=(8,),
        model__dropout=0.5,
        model__augment_dim=0,
        augment__p=0.0,
        lora__widths=(8,),
        lora__mode=mode,
        train__remat=remat,
    )


def training_loss(config: ConfigDict, batch: int = 2) -> tuple[Callable, Any]:
    """The loss as a function of the variables, and variables in which nothing is zero."""
    denoiser = build_denoiser(config)
    objective = build_objective(config, denoiser)
    shapes = jax.eval_shape(lambda: init_variables(config, denoiser, jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), shapes
    )
    images = rng.standard_normal((batch, 8, 8, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[np.arange(batch) % 4]

    def loss(variables: Any) -> jax.Array:
        draws = objective.draw(jax.random.key(7), images.shape)
        return objective.loss(variables, images, labels, draws, True)["loss"].sum()

    return loss, variables


@pytest.mark.parametrize(
    ("network", "mode", "remats"),
    [
        ("ddpmpp", "with_lora", ("blocks",)),
        pytest.param("ddpmpp", "with_lora", ("norms",), marks=pytest.mark.slow),
        pytest.param("ddpmpp", "only_lora", ("blocks",), marks=pytest.mark.slow),
        pytest.param("adm", "with_lora", ("blocks",), marks=pytest.mark.slow),
        pytest.param("improved", "with_lora", ("norms", "blocks"), marks=pytest.mark.slow),
    ],
)
def test_gradients_parameters_and_dropout_stay(network, mode, remats):
    results = []
    for remat in ("none", *remats):
        loss, variables = training_loss(small(remat, network=network, mode=mode))
        results.append(fast_jit(jax.value_and_grad(loss))(variables))
    (value, plain), *others = results
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    for again, grads in others:
        np.testing.assert_allclose(again, value, rtol=1e-5)  # another dropout would show at once
        # Paths and shapes too. float32 sums in another order, on one scale: the gradient of the
        # key's bias is truly zero.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale),
            grads,
            plain,
        )


def test_less_is_kept_in_the_order_of_the_options():
    """Bytes that wait for the backward pass; XLA's own count is docs/aot.jsonl's, for TPU: on CPU it
    undoes rematerialisation."""

    def kept(remat: str) -> int:
        loss, variables = training_loss(small(remat), batch=32)
        backward = jax.eval_shape(lambda v: jax.vjp(loss, v)[1], variables)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    used = [kept(remat) for remat in REMAT]
    assert used[1] < 0.5 * used[0]
    assert used[2] < 0.5 * used[1]


def test_unknown_policy_is_a_plain_error():
    with pytest.raises(UserError, match=r"train.remat is 'some'.*none, norms, blocks"):
        check(small("some"))
