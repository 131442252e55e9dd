"""What a run shows on its way."""

import numpy as np
import pytest

from lora_diffusion_jax.default_config import sampler
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.objectives import build_sampler, evaluations
from lora_diffusion_jax.modes import train
from tests.small import small_config


@pytest.mark.parametrize(("quick", "nfe"), [(0, 10), (4, 4)])
def test_grids_are_drawn_with_the_sampler_of_training(quick, nfe, tmp_path, monkeypatch):
    config = small_config(precond__name="ddpm", precond__num_steps=30, eval__num_samples=0)
    config.sampler, config.eval.num_steps = sampler("ddpm"), quick
    config.sampler.respacing = "10"
    denoiser = build_denoiser(config)
    used, shown = [], []

    def grid(generator, variables, names):
        used.append(evaluations(generator.sampler, denoiser))
        return np.zeros((8, 8, 1), np.uint8)

    monkeypatch.setattr(train, "sample_grid", grid)
    monkeypatch.setattr(train.state, "ema_variables", lambda now: now)
    mesh = train.build_mesh(config)
    train.callbacks(config, tmp_path, denoiser, mesh, None, shown.append)["samples"]({}, 1)
    assert used == [nfe]
    assert shown == ["running"]  # with the new grid
    assert evaluations(build_sampler(config, denoiser), denoiser) == 10  # at the end
