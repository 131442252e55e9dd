"""Training, resuming, sampling and describing from the command line."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.modes import evaluate
from tests.modes.running import run, start, train
from tests.small import config_flags


def test_a_run_is_a_directory(workdir):
    assert json.loads((workdir / "config.json").read_text())["data"]["num_classes"] == 10
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [line["images"] for line in lines if "train/loss" in line] == [32, 64, 96]
    assert np.isfinite(losses).all()
    assert list(workdir.glob("events.out.tfevents.*"))
    with Image.open(workdir / "samples" / "0000000096.png") as grid:
        assert grid.height == 4 + 10 * 52
        assert 8 < grid.width - (4 + 8 * 52) < 30  # the number of each row
    assert "lora/down/kernel" in (workdir / "parameters.txt").read_text()
    page = (workdir / "index.html").read_text()
    assert "./samples/0000000096.png" in page
    assert "--mode=train --config=digits" in page
    assert "<tr><td>lora.rank</td><td>2</td></tr>" in page


def test_the_same_command_goes_on_where_it_was(workdir, data_dir, tmp_path):
    """Cut in two, a run ends with the metrics of the whole one."""
    cut = tmp_path / "cut"
    train(cut, data_dir, 48)
    config = json.loads((cut / "config.json").read_text())
    del config["lora"]["adapter"]  # as if this field were newer than the run
    (cut / "config.json").write_text(json.dumps(config))
    text = train(cut, data_dir, 96)
    assert "resuming from the checkpoint of step 3" in text

    def losses(path):
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        return {line["images"]: line["train/loss"] for line in lines if "train/loss" in line}

    assert losses(cut)[96] == losses(workdir)[96]
    text = train(cut, data_dir, 96)
    assert "nothing is left to train" in text


def test_samples_are_functions_of_seed_class_and_weights(workdir, tmp_path):
    sample = ["--mode=sample", f"--workdir={workdir}"]
    text = run(*sample, "--seeds=0-11", "--class_id=3", f"--out={tmp_path / 'a.npz'}")
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
        assert grid.height == 4 + 10 * 52
        assert 8 < grid.width - (4 + 2 * 52) < 30


@pytest.mark.slow
def test_info_counts_the_paper_row():
    text = run("--mode=info", "--config=configs/cifar10_edm.py", "--measure=off")
    assert "Total parameters: 57,746,907" in text.splitlines()
    assert "LoRA sites (with_lora): 12" in text
    changes = {"class_conditional": True, "lora__adapter": "time_class", "lora__mode": "only_lora"}
    text = run(
        "--mode=info",
        "--config=configs/cifar10_iddpm.py",
        "--measure=off",
        *config_flags(**changes),
    )
    assert "Total parameters: 48,513,040" in text.splitlines()
    assert "LoRA sites (only_lora): 30" in text


@pytest.mark.slow
def test_a_reference_judges_during_training(data_dir, tmp_path):
    """Quick on the way, more samples at the end, both named by their number; resumed without doubling."""
    reference = tmp_path / "ref.npz"
    arguments = ["ref", "--data=digits", f"--data_dir={data_dir}", "--features=rotation"]
    run(*arguments, f"--dest={reference}", program=evaluate.main)
    path = tmp_path / "judged"
    judged = [
        f"--config.eval.reference={reference}",
        "--config.eval.num_samples=80",
        "--config.eval.final_num_samples=160",
        "--config.eval.num_steps=2",
        "--config.train.eval_every=32",
        "--config.sampler.batch_size=80",
    ]
    train(path, data_dir, 64, *judged)
    lines = list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))
    found = {
        (line["images"], name): line[name] for line in lines for name in line if "eval/" in name
    }
    assert set(found) == {(32, "eval/fd_rotation_80"), (64, "eval/fd_rotation_160")}
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    missing = "--config.eval.reference=/no.npz"
    assert "/no.npz" in train(tmp_path / "other", data_dir, 64, *judged, missing, status=2)


@pytest.mark.slow
def test_sampling_goes_on_after_a_signal(workdir, tmp_path):
    """SIGTERM in the middle keeps what is done; the same command makes the rest, of the same images."""
    sample = ["--mode=sample", f"--workdir={workdir}", "--seeds=0-299", "--class_id=all"]
    sample += ["--config.sampler.batch_size=8", "--config.sampler.num_steps=20"]
    folder, whole = tmp_path / "folder", tmp_path / "whole.npz"
    process = start(*sample, f"--out={folder}")
    while not (folder / "000008.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "stopped by SIGTERM; rerun the same command to resume" in text
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 8 < len(made) < 300
    text = run(*sample, f"--out={folder}")
    assert f"{len(made)} of 300 images are there already" in text
    assert all((folder / name).stat().st_mtime_ns == made[name] for name in made)
    run(*sample, f"--out={whole}")
    with np.load(whole) as file:
        for seed, image, label in zip(file["seeds"], file["images"], file["labels"], strict=True):
            with Image.open(folder / f"{seed:06d}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), image[..., 0])
            assert label == seed // 30
    listed = json.loads((folder / "dataset.json").read_text())["labels"]
    assert listed == [[f"{seed:06d}.png", seed // 30] for seed in range(300)]
