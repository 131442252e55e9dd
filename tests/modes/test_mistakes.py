"""What a tired person types: each a plain error, nothing lost."""

from pathlib import Path

import pytest

from tests.modes.running import TINY, run

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
    "missing config": (["--config=configs/none.py"], "configs/none.py"),
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
