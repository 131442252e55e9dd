"""Runs on arrays: latents of four channels in, values of the same kind out."""

import json

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.modes import evaluate
from lora_diffusion_jax.sweeps import state
from tests.modes.running import TINY, run
from tests.small import config_flags

LATENTS = np.random.default_rng(0).normal(100, 0.04, (32, 8, 8, 4)).astype(np.float32)
SCALE = config_flags(data__mean="(100.0,)", data__std="(0.08,)")
DATA = {
    "data__name": "",
    "data__channels": 0,
    "data__num_classes": 0,
    "class_conditional": True,
    "augment__p": 0.0,
    "model__augment_dim": 0,
    "train__total_images": 16,
    "eval__num_samples": 10,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, and what the training printed."""
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "latents.npz", images=LATENTS, labels=np.arange(32) % 3)
    path = config_flags(data__path=folder / "latents.npz")
    command = ["--mode=train", *TINY, *config_flags(**DATA), *path, f"--workdir={folder / 'run'}"]
    return folder / "run", run(*command, *SCALE), command


def test_samples_are_values_like_those_of_the_data(trained, tmp_path):
    directory, text, _ = trained
    assert "no evaluation: distances are of images" in text
    assert "standard deviation" not in text  # 0.5, as sigma_data
    assert state.is_done(directory, json.loads((directory / "config.json").read_text()))
    out = tmp_path / "samples.npz"
    sample = ["--mode=sample", f"--workdir={directory}", "--seeds=0-5"]
    run(*sample, f"--out={out}")
    with np.load(out) as found:
        images = found["images"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 4), np.float32)
    # In units of the network they are near unit variance: 100 +- some 0.08.
    assert abs(images.mean() - 100) < 0.1
    assert 0.005 < images.std() < 0.3
    again = open_source(path=str(out), mean=(100.0,), std=(0.08,))
    assert (len(again), again.image_shape) == (6, (8, 8, 4))
    run(*sample, f"--out={tmp_path / 'folder'}")
    names = sorted(path.name for path in (tmp_path / "folder").glob("*.npy"))
    assert names == [f"{seed:06d}.npy" for seed in range(6)]
    np.testing.assert_array_equal(np.load(tmp_path / "folder" / "000004.npy"), images[4])


def test_the_grid_of_a_training_shows_channels_side_by_side(trained):
    (grid,) = (trained[0] / "samples").glob("*.png")
    with Image.open(grid) as picture:
        assert picture.mode == "L"
        assert picture.width > 8 * 4 * 48  # 8 columns of 4 channels, enlarged to 48 pixels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=sample", "--seeds=0-3", "--out={new}/a.png"], "Give {new}/a.npz"),
        (["--mode=likelihood"], "8-bit images"),
        (["--mode=analyze", "--out={new}/x", "--classes=0,1"], "--guidance compare pictures"),
        (
            ["--mode=sample", "--out={new}/x", *SCALE[:1], "--config.data.std=(1.0,)"],
            "another network",
        ),
    ],
)
def test_what_needs_images_says_so(trained, tmp_path, arguments, words):
    given = [a.format(new=tmp_path) for a in (*arguments, f"--workdir={trained[0]}")]
    assert words.format(new=tmp_path) in run(*given, status=2)


def test_metrics_of_images_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="run .* holds arrays of floats; FID and"):
        evaluate.SavedRun(str(trained[0]), "ema").open(1)
    np.save(tmp_path / "a.npy", LATENTS)
    command = ["ref", f"--data={tmp_path / 'a.npy'}", f"--dest={tmp_path / 'ref.npz'}"]
    assert "a.npy holds arrays of floats; FID" in run(*command, status=2, program=evaluate.main)


def test_an_export_keeps_what_the_values_are(trained, tmp_path):
    out, again = tmp_path / "a.safetensors", tmp_path / "again"
    run("--mode=export", f"--workdir={trained[0]}", f"--out={out}")
    run("--mode=import", f"--source={out}", f"--workdir={again}")
    data = load_workdir(again).config.data
    assert (data.floats, data.mean, data.std) == (True, (100.0,), (0.08,))


def test_a_scale_that_the_network_does_not_expect_is_noticed(trained, tmp_path):
    _, _, command = trained
    text = run(
        *command[:-1], f"--workdir={tmp_path / 'run'}", "--config.eval.reference=x", status=2
    )
    assert "warning: the values have a standard deviation of 0.04 (mean 100)" in text
    assert "eval.reference=x compares images" in text
