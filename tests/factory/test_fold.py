"""A whole network with its adapters folded in, on the reference's LoRA weights."""

import jax.numpy as jnp
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import fold_lora
from tests.models.test_reference import WITH_LORA, error, load, nhwc
from tests.small import fast_jit


@pytest.mark.parametrize(
    "case",
    [WITH_LORA[0], *(pytest.param(case, marks=pytest.mark.slow) for case in WITH_LORA[1:])],
)
def test_folded_network_equals_the_adapted_one_at_its_condition(case):
    reference = load(case)
    x, labels = nhwc(reference.arrays["in:x"]), jnp.eye(4)[2:3]
    denoiser, variables = reference.denoiser, reference.variables
    sigma = jnp.float32(1.3)
    folded, base = fold_lora(denoiser, variables, sigma, labels)
    assert lora.list_sites(base["params"]) == []
    expected = fast_jit(denoiser.apply)(variables, x, sigma, labels)
    evaluate = fast_jit(folded.apply)
    assert error(evaluate(base, x, sigma, labels), expected) < 5e-6  # float32 sums in another order
    elsewhere = fast_jit(denoiser.apply)(variables, x, jnp.float32(0.1), labels)
    assert error(evaluate(base, x, jnp.float32(0.1), labels), elsewhere) > 1e-4
    with pytest.raises(UserError, match="no adapters"):
        fold_lora(folded, base, sigma, labels)
