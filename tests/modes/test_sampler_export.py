"""Samplers as programs, run by the script of docs/checkpoints.md in a process without this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.modes.running import run

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
FEW = ("--config.sampler.num_steps=3", "--config.sampler.batch_size=6")


def script() -> str:
    return re.search(r"```python\n(import sys\n.*?)```", DOCS.read_text(), re.DOTALL)[1]


def test_it_runs_without_this_package(workdir, tmp_path):
    """The documented script gives the images of --mode=sample; nothing of ours is imported."""
    out = tmp_path / "sampler.jax"
    run("--mode=export", f"--workdir={workdir}", f"--out={out}", "--what=sampler", *FEW)
    alone = "sys.modules['lora_diffusion_jax'] = None  # an import of it would fail\n"
    program = script().replace("import sys\n", "import sys\n" + alone, 1)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [sys.executable, "-c", program, out, tmp_path / "images.npy"],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    images = np.load(tmp_path / "images.npy")
    for seed in range(2):  # classes in turn
        there = tmp_path / f"{seed}.npz"
        which = (f"--seeds={seed}", f"--class_id={seed}", f"--out={there}")
        run("--mode=sample", f"--workdir={workdir}", *which, *FEW)
        expected = np.load(there)["images"][0]
        assert np.ptp(expected) > 20
        assert np.abs(images[seed].astype(int) - expected).max() <= 1
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["images"] == list(images.shape)
    assert facts["sampler"]["num_steps"] == 3
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out={}/net.safetensors",), "must end in .jax"),
        (("--out={}/sampler.jax", "--adapters_only"), "needs the whole network"),
    ],
)
def test_mistakes(workdir, tmp_path, flags, words):
    given = [flag.format(tmp_path) for flag in flags]
    said = run("--mode=export", f"--workdir={workdir}", "--what=sampler", *given, status=2)
    assert words in said
    assert not list(tmp_path.iterdir())
