"""The command line as a user meets it: real processes, small networks, the digits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--config=configs/digits.py",
    "--config.model.channels=8",
    "--config.model.channel_mult=(1,)",
    "--config.model.attn_resolutions=(8,)",
    "--config.lora.rank=2",
    "--config.lora.bases=3",
    "--config.lora.widths=(16, 8)",
    "--config.train.batch_size=16",
    "--config.train.log_every=32",
    "--config.train.checkpoint_every=48",
    "--config.sampler.num_steps=3",
    "--config.eval.num_samples=0",
]


def run(*arguments, ok=True):
    """Runs main.py; returns (status, everything it printed)."""
    done = subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, text
    return done.returncode, text


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    """A run of 6 steps."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(path, data_dir, 96)
    return path


def train(path, data_dir, images, *more):
    return run(
        "--mode=train",
        *TINY,
        f"--workdir={path}",
        f"--config.data.data_dir={data_dir}",
        f"--config.train.total_images={images}",
        *more,
    )


def test_a_run_is_a_directory(workdir):
    assert json.loads((workdir / "config.json").read_text())["data"]["num_classes"] == 10
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [line["images"] for line in lines if "train/loss" in line] == [32, 64, 96]
    assert np.isfinite(losses).all()
    assert list(workdir.glob("events.out.tfevents.*"))
    with Image.open(workdir / "samples" / "0000000096.png") as grid:
        assert grid.size == (4 + 8 * 52, 4 + 10 * 52)
    assert "lora/down/kernel" in (workdir / "parameters.txt").read_text()


def test_the_same_command_goes_on_where_it_was(workdir, data_dir, tmp_path):
    """Cut in two, a run ends with the metrics of the whole one."""
    cut = tmp_path / "cut"
    train(cut, data_dir, 48)
    _, text = train(cut, data_dir, 96)
    assert "resuming from the checkpoint of step 3" in text

    def losses(path):
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        return {line["images"]: line["train/loss"] for line in lines if "train/loss" in line}

    assert losses(cut)[96] == losses(workdir)[96]
    _, text = train(cut, data_dir, 96)
    assert "nothing is left to train" in text


def test_samples_are_functions_of_seed_class_and_weights(workdir, tmp_path):
    sample = ["--mode=sample", f"--workdir={workdir}"]
    _, text = run(*sample, "--seeds=0-11", "--class_id=3", f"--out={tmp_path / 'a.npz'}")
    assert json.loads(text.splitlines()[-1])["weights"] == "ema"
    with np.load(tmp_path / "a.npz") as file:
        images = file["images"]
        assert images.shape == (12, 8, 8, 1)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(file["seeds"], np.arange(12))
        assert (file["labels"] == 3).all()
    run(
        *sample,
        "--seeds=7,2",
        "--class_id=3",
        "--config.sampler.batch_size=5",
        f"--out={tmp_path / 'folder'}",
    )
    for seed in (2, 7):
        with Image.open(tmp_path / "folder" / f"{seed:06d}.png") as picture:
            difference = np.abs(np.asarray(picture, int) - images[seed, ..., 0])
            assert difference.max() <= 1
    run(*sample, "--seeds=0-19", "--class_id=all", "--weights=raw", f"--out={tmp_path / 'g.png'}")
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.size == (4 + 2 * 52, 4 + 10 * 52)


def test_export_and_import_keep_every_bit(workdir, tmp_path):
    """workdir -> safetensors -> workdir: the same samples; adapters alone go with their base."""
    out = tmp_path / "net.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={out}")
    run("--mode=import", f"--source={out}", f"--workdir={tmp_path / 'again'}")
    small = tmp_path / "adapters.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={small}", "--adapters_only")
    assert small.stat().st_size < out.stat().st_size
    run(
        "--mode=import",
        f"--source={small}",
        f"--base={out}",
        f"--workdir={tmp_path / 'joined'}",
    )
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
    _, text = train(tuned, data_dir, 32, freeze, f"--config.init_from={base}")
    counts = [int(n.replace(",", "")) for n in re.findall(r" parameters: ([\d,]+)", text)]
    assert counts[0] < counts[1]  # trained, frozen
    from lora_diffusion_jax import factory, lora

    before = factory.load_workdir(base).variables["params"]
    after = lora.split(factory.load_workdir(tuned).variables["params"])[0]
    import jax

    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_info_counts_the_paper_row():
    _, text = run("--mode=info", "--config=configs/cifar10_edm.py")
    assert "Total parameters: 57,746,907" in text.splitlines()
    assert "LoRA sites (with_lora): 12" in text
    _, text = run("--mode=info", "--config=configs/cifar10_edm.py", "--config.lora.mode=only_lora")
    assert "Total parameters: 53,413,083" in text.splitlines()


MISTAKES = {
    "unknown field": (["--config.train.batchsize=3"], "batchsize"),
    "misspelt group": (["--config.trian.batch_size=3"], "trian"),
    "wrong type": (["--config.train.batch_size=many"], "batch_size"),
    "missing data set": (["--config.data.name=cifar11"], "cifar11"),
    "missing folder": (
        ["--config.data.name=", "--config.data.path=/nowhere/at/all"],
        "/nowhere/at/all",
    ),
    # A tuple given twice on the command line is joined: with TINY these are six levels.
    "size that does not divide": (["--config.model.channel_mult=(1,1,1,1,1)"], "multiples of 32"),
    "other image size": (["--config.data.image_size=16"], "data.image_size=16"),
    "rank 0": (["--config.lora.rank=0"], "rank is 0"),
    "one sampling step": (["--config.sampler.num_steps=1"], "num_steps is 1"),
    "levels upside down": (
        ["--config.sampler.sigma_min=2", "--config.sampler.sigma_max=1"],
        "sigma_min is 2",
    ),
    "mesh": (["--config.mesh.data=3"], "data=3"),
    "unwritable workdir": (["--workdir=/proc/run"], "/proc/run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_training_are_plain_errors(name, data_dir, tmp_path):
    arguments, words = MISTAKES[name]
    status, text = run(
        "--mode=train",
        *TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
        "--config.train.total_images=32",
        *arguments,
        ok=False,
    )
    assert status in (1, 2), text  # 1 from the flags' own parser
    assert words in text
    assert "Traceback" not in text


def test_mistakes_with_a_run_are_plain_errors(workdir, data_dir, tmp_path):
    before = sorted(p for p in workdir.rglob("*") if p.is_file())
    for arguments, words in (
        (["--mode=sample", f"--workdir={workdir}", "--class_id=10", "--out=x.npz"], "Class 10"),
        (["--mode=sample", f"--workdir={workdir}", "--seeds=5-2", "--out=x.npz"], "--seeds=5-2"),
        (["--mode=sample", f"--workdir={workdir}", "--step=7", "--out=x.npz"], "no checkpoint 7"),
        (["--mode=sample", f"--workdir={workdir}"], "needs --out"),
        (["--mode=sample", f"--workdir={tmp_path}", "--out=x.npz"], "is not a run"),
        (["--mode=fly"], "fly"),
        (
            ["--mode=import", f"--source={workdir / 'config.json'}", f"--workdir={tmp_path}/n"],
            "config.json",
        ),
    ):
        _, text = run(*arguments, ok=False)
        assert words in text, text
        assert "Traceback" not in text
    _, text = run(
        "--mode=train",
        *TINY,
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.model.channels=12",
        ok=False,
    )
    assert "model.channels: 8 there, 12 now" in text
    assert sorted(p for p in workdir.rglob("*") if p.is_file()) == before
    assert not Path("x.npz").exists()
