"""Networks out and in again, and adapters trained on a frozen base."""

import re

import jax
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.factory.pretrained import load_workdir
from tests.modes.running import run, train


def test_export_and_import_keep_every_bit(workdir, tmp_path):
    """workdir -> safetensors -> workdir: the same samples; adapters alone go with their base."""
    out = tmp_path / "net.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={out}")
    run("--mode=import", f"--source={out}", f"--workdir={tmp_path / 'again'}")
    small = tmp_path / "adapters.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={small}", "--adapters_only")
    assert small.stat().st_size < out.stat().st_size
    joined = f"--workdir={tmp_path / 'joined'}"
    run("--mode=import", f"--source={small}", f"--base={out}", joined)
    images = []
    for name in (workdir, tmp_path / "again", tmp_path / "joined"):
        file = tmp_path / "x.npz"
        steps = "--config.sampler.num_steps=3"
        run("--mode=sample", f"--workdir={name}", "--seeds=0-7", f"--out={file}", steps)
        images.append(np.load(file)["images"])
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[0])


def test_adapters_train_alone_on_an_exported_base(workdir, data_dir, tmp_path):
    """A baseline run, then its base frozen under adapters: the base does not move."""
    base = tmp_path / "base"
    train(base, data_dir, 32, "--config.lora.mode=baseline")
    tuned = tmp_path / "tuned"
    freeze = "--config.train.freeze_base=True"
    text = train(tuned, data_dir, 32, freeze, f"--config.init_from={base}")
    counts = [int(n.replace(",", "")) for n in re.findall(r" parameters: ([\d,]+)", text)]
    assert counts[0] < counts[1]  # trained, frozen
    before = load_workdir(base).variables["params"]
    after = lora.split(load_workdir(tuned).variables["params"])[0]
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=import", "--source={run}/config.json", "--workdir={new}"], "config.json"),
        (["--mode=import", "--source=x", "--workdir={run}"], "already holds a run"),
        (["--mode=import", "--source=x"], "--mode=import needs --workdir"),
        (["--mode=import", "--source=x", "--workdir={new}", "--config.dtype=x"], "no config"),
        (["--mode=export", "--workdir={run}"], "--mode=export needs --out"),
    ],
)
def test_mistakes_are_plain_errors(workdir, tmp_path, arguments, words):
    arguments = [a.format(run=workdir, new=tmp_path / "new") for a in arguments]
    assert words in run(*arguments, status=2)
    assert not (tmp_path / "new").exists()
