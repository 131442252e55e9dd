"""A whole network with its adapters folded in, on the reference's LoRA weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import factory, lora
from lora_diffusion_jax.errors import UserError
from tests.models.test_reference import WITH_LORA, error, load, nhwc


@pytest.mark.parametrize("case", WITH_LORA)
def test_folded_network_equals_the_adapted_one_at_its_condition(case):
    reference = load(case)
    x, labels = nhwc(reference.arrays["in:x"]), jnp.eye(4)[2:3]
    denoiser, variables = reference.denoiser, reference.variables
    sigma = jnp.float32(1.3)
    folded, base = factory.fold_lora(denoiser, variables, sigma, labels)
    assert lora.list_sites(base["params"]) == []
    expected = jax.jit(denoiser.apply)(variables, x, sigma, labels)
    evaluate = jax.jit(folded.apply)
    assert error(evaluate(base, x, sigma, labels), expected) < 5e-6  # float32 sums in another order
    elsewhere = jax.jit(denoiser.apply)(variables, x, jnp.float32(0.1), labels)
    assert error(evaluate(base, x, jnp.float32(0.1), labels), elsewhere) > 1e-4
    with pytest.raises(UserError, match="no adapters"):
        factory.fold_lora(folded, base, sigma, labels)


def test_iddpm_uses_the_checkpoints_own_levels():
    reference = load("net_iddpm_ddpmpp_cond")
    denoiser = factory.denoiser_from_architecture(reference.architecture, reference.variables)
    levels = np.asarray(reference.variables["buffers"]["u"], np.float64)
    np.testing.assert_array_equal(denoiser.round_sigma(levels * 1.0001), levels)
    assert denoiser.sigma_max == levels[0]
