"""--mode=sample with a searched grid, guidance and scaled adapters, as a user types it."""

import json

import numpy as np
import pytest

from tests.modes.running import run
from tests.small import config_flags


@pytest.fixture(scope="module")
def sample(workdir, tmp_path_factory):
    """A function of settings -> (uint8 images of seeds 0-3, the line that was printed)."""
    folder = tmp_path_factory.mktemp("guided")
    calls = iter(range(100))

    def sample(**settings):
        out = folder / f"{next(calls)}.npz"
        flags = config_flags(**{"sampler__num_steps": 4, **settings})
        printed = run(
            "--mode=sample", f"--workdir={workdir}", "--seeds=0-3", f"--out={out}", *flags
        )
        return np.load(out)["images"].astype(int), json.loads(printed.splitlines()[-1])

    return sample


@pytest.mark.slow
def test_a_searched_grid_is_printed_and_can_be_given(sample):
    settings = {"sampler__name": "ipndm", "sampler__to_zero": False, "sampler__grid": "searched"}
    images, line = sample(**settings)
    sigmas = line["sampler"]["sigmas"]
    assert line["nfe"] == 4
    assert len(sigmas) == 5
    assert (sigmas[0], sigmas[-1]) == (80.0, 0.002)
    again, _ = sample(**settings, sampler__sigmas=tuple(sigmas))
    np.testing.assert_array_equal(images, again)
    usual, _ = sample(**{**settings, "sampler__grid": "rho"})
    assert (images != usual).any()


def test_guidance_by_adapters_and_by_a_checkpoint(sample, workdir):
    plain, line = sample()
    assert line["nfe"] == 7
    assert not {"guidance", "adapters"} & line["sampler"].keys()
    # So young a run's adapters add about 1e-4 of the little that the network adds to c_skip x.
    guidance = {"guidance__scale": 1000.0, "guidance__lora_scale": 1e4}
    guided, line = sample(guidance__name="adapters", **guidance)
    assert line["nfe"] == 14
    assert line["sampler"]["guidance"]["scale"] == 1000.0
    assert np.abs(guided - plain).max() > 1
    auto = {"guidance__name": "autoguidance", "guidance__workdir": workdir}
    same, _ = sample(**auto, guidance__scale=3.0)  # by itself
    assert np.abs(same - plain).max() <= 1
    weaker, _ = sample(**auto, guidance__scale=1000.0, guidance__step=3)
    assert np.abs(weaker - plain).max() > 1
    off, line = sample(lora__scale=0.0)
    baseline, _ = sample(lora__mode="baseline")
    assert np.abs(off - baseline).max() <= 1
    assert line["sampler"]["adapters"]["scale"] == 0.0


def test_mistakes_are_one_sentence(workdir, tmp_path):
    def refused(*flags, mode="sample"):
        out = [f"--out={tmp_path / 'x.npz'}"] if mode == "sample" else []
        return run(f"--mode={mode}", f"--workdir={workdir}", *out, *flags, status=2)

    words = refused("--config.guidance.name=classifier_free", "--config.guidance.scale=2")
    assert "was trained with and without class labels" in words
    words = refused("--config.guidance.name=autoguidance", "--config.guidance.workdir=/nowhere")
    assert "/nowhere" in words
    words = refused("--config.lora.scale=0.5", "--config.lora.scaled=nothing")
    assert "matches none of the adapters" in words
    words = refused("--config.lora.scale=0.5", mode="likelihood")
    assert "measures the network as it was trained" in words
    words = refused(
        "--config.guidance.name=autoguidance", f"--config.guidance.workdir={workdir}", mode="train"
    )
    assert "is for finished runs" in words
