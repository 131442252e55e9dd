"""The group `sampler` holds the settings of one sampler, whichever way it comes about."""

import pytest

from lora_diffusion_jax.default_config import base, migrate_sampler, sampler
from lora_diffusion_jax.diffusion.samplers import SAMPLERS
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import config_from_dict

COMMON = {"name", "num_steps", "sigma_min", "sigma_max", "batch_size", "fold"}
GRID = {"grid", "rho", "sigmas", "to_zero", "afs"}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("edm", {"rho", "s_churn", "s_min", "s_max", "s_noise"}),
        (
            "ablation",
            {"rho", "s_churn", "s_min", "s_max", "s_noise", "solver", "discretization"}
            | {"schedule", "scaling", "alpha", "epsilon_s", "c_1", "c_2", "m"},
        ),
        ("euler", GRID),
        ("heun", GRID | {"euler_steps"}),
        ("dpmpp_2m", GRID),
        ("dpmpp_3m", GRID),
        ("unipc", GRID | {"order", "variant"}),
        ("deis", GRID | {"order"}),
        ("ipndm", GRID | {"order"}),
        ("ddpm", {"respacing", "clip_denoised"}),
        ("ddim", {"respacing", "clip_denoised", "eta"}),
    ],
)
def test_each_sampler_has_its_own_fields(name, own):
    assert set(sampler(name)) == COMMON | own


def test_settings_of_another_sampler_do_not_exist():
    config = base().lock()
    with pytest.raises(AttributeError, match="solver"):
        config.sampler.solver = "euler"
    config.sampler = sampler("ablation", config.sampler)
    config.sampler.solver = "euler"
    with pytest.raises(UserError, match="sampler.name is 'rk4'; it must be one of edm"):
        sampler("rk4")


def test_changed_fields_survive_a_change_of_sampler():
    old = sampler("edm")
    old.num_steps, old.s_churn, old.batch_size, old.sigma_max = 40, 30.0, 8, 50.0
    new = sampler("ablation", old)
    assert (new.num_steps, new.s_churn, new.batch_size, new.sigma_max) == (40, 30.0, 8, 50.0)
    assert new.name == "ablation"
    assert new.sigma_min is None  # the default of edm, which was not chosen, is not carried over
    assert "s_churn" not in sampler("heun", old)
    assert sampler("edm", new).to_dict() == old.to_dict()


@pytest.mark.parametrize("name", SAMPLERS)
def test_configs_of_old_runs_are_read(name):
    """They held the fields of all samplers that there were, flat."""
    flat = {**sampler("ablation").to_dict(), "num_steps": 7, "rho": 5.0, "solver": "euler"}
    flat |= {"sigma_min": None, "sigma_max": None, "name": name}
    config = config_from_dict({"sampler": flat})
    usual = sampler(name)
    assert set(config.sampler) == set(usual)
    assert config.sampler.num_steps == 7
    assert config.sampler.get("rho") == (5.0 if "rho" in usual else None)
    assert config.sampler.sigma_max == usual.sigma_max
    assert migrate_sampler(config.sampler.to_dict()).keys() <= set(usual)


def test_unknown_fields_of_a_saved_sampler_are_still_errors():
    with pytest.raises(UserError, match=r"sampler\.tau"):
        config_from_dict({"sampler": {"name": "edm", "tau": 1.0}})
