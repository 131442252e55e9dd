"""The same few networks serve many tests here: each is traced once."""

import json

import pytest

from lora_diffusion_jax.factory.networks import variable_shapes
from lora_diffusion_jax.factory.pretrained import network_fields


@pytest.fixture(autouse=True, scope="session")
def traced_once():
    known = {}

    def remembered(config, denoiser):
        key = json.dumps(network_fields(config))
        if key not in known:
            known[key] = variable_shapes(config, denoiser)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_diffusion_jax.interop.names.variable_shapes", remembered)
        yield
