"""What a tired person types: each a plain error, nothing lost."""

import pytest

from lora_diffusion_jax.modes.main import MODES, build_parser
from tests.modes.running import TINY, run

MISTAKES = {
    "missing data set": (["--config.data.name=cifar11"], "cifar11"),
    "missing folder": (["--config.data.name=", "--config.data.path=/nowhere"], "/nowhere"),
    "size that does not divide": (["--config.model.channel_mult=(1,1,1,1,1)"], "multiples of 16"),
    "other image size": (["--config.data.image_size=16"], "data.image_size=16"),
    "rank 0": (["--config.lora.rank=0"], "rank is 0"),
    "one sampling step": (["--config.sampler.num_steps=1"], "num_steps is 1"),
    "levels upside down": (
        ["--config.sampler.sigma_min=2", "--config.sampler.sigma_max=1"],
        "sigma_min is 2",
    ),
    "mesh": (["--config.mesh.data=3"], "data=3"),
    "attention at no level": (["--config.model.attn_resolutions=(5,)"], "levels have 8"),
    "no such level": (["--config.model.attn_levels=(1,)"], "there is no level 1"),
    "a number that is none": (["--config.sampler.s_noise=nan"], "s_noise is nan"),
    "an infinite rate": (["--config.train.learning_rate=inf"], "learning_rate is inf"),
    "a rate below 0": (["--config.train.learning_rate=-1"], "learning_rate is -1"),
    "a URL": (["--config.init_from=https://x.org/y.pkl"], "init_from=https://x.org/y.pkl is a URL"),
    "half precision": (["--config.dtype=float16"], "bfloat16"),
    "unwritable workdir": (["--workdir=/proc/run"], "/proc/run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_training_are_plain_errors(name, data_dir, tmp_path):
    arguments, words = MISTAKES[name]
    text = run(
        "--mode=train",
        *TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
        "--config.train.total_images=32",
        *arguments,
        status=2,
    )
    assert text.startswith("error: ")
    assert words in text


@pytest.mark.parametrize(
    ("mode", "flag", "others"),
    [
        ("train", "--sweep=lora.rank=1,2", "--mode=sweep"),
        ("train", "--weights=ema", "--mode=sample and --mode=likelihood"),  # its default, too
        ("train", "--nooverwrite", "--mode=sample and --mode=analyze"),
        ("sample", "--jobs=2", "--mode=sweep"),
        ("sample", "--source=x", "--mode=import"),
        ("info", "--launcher=local", "--mode=sweep"),
        ("doctor", "--num_processes=2", "--mode=train and"),
        ("export", "--seeds=0-3", "--mode=sample and --mode=analyze"),
        ("sweep", "--seeds=0-3", "--mode=sample and --mode=analyze"),
        ("sweep", "--process_timeout=3", "--mode=train and"),
        ("import", "--step=3", "--mode=sample and"),
    ],
)
def test_a_flag_of_another_mode_is_not_ignored(mode, flag, others, tmp_path):
    needs = [f"--{name}={tmp_path / 'x'}" for name in MODES[mode].needs]
    text = run(f"--mode={mode}", *needs, flag, status=2)
    name = flag.partition("=")[0].removeprefix("--").removeprefix("no")
    assert f"--mode={mode} does not read --{name}, which is for {others}" in text
    assert not list(tmp_path.iterdir())


def test_every_flag_is_read_by_some_mode():
    flags = set(vars(build_parser().parse_args(["--mode=info"]))) - {"mode"}
    assert flags == {flag for mode in MODES.values() for flag in (*mode.needs, *mode.reads)}


def test_mistakes_with_a_run_are_plain_errors(workdir, data_dir, tmp_path):
    before = sorted(p for p in workdir.rglob("*") if p.is_file())
    out, run_dir = f"--out={tmp_path / 'x.npz'}", f"--workdir={workdir}"
    for arguments, words in (
        (["--mode=sample", run_dir, "--class_id=10", out], "Class 10"),
        (["--mode=sample", run_dir, "--class_id=cat", out], "neither a class number nor `all`"),
        (["--mode=sample", run_dir, "--seeds=5-2", out], "--seeds=5-2"),
        (["--mode=sample", run_dir, "--seeds=1,1", f"--out={tmp_path / 'x'}"], "given twice"),
        (["--mode=sample", run_dir, "--step=7", out], "no checkpoint 7"),
        (["--mode=sample", run_dir, "--config.model.channels=12", out], "another network"),
        (["--mode=sample", run_dir, f"--out={tmp_path / 'x.jpg'}"], "x.jpg"),
        (["--mode=sample", run_dir], "needs --out"),
        (["--mode=sample", f"--workdir={tmp_path}", out], "is not a run"),
        (["--mode=train", f"--workdir={tmp_path / 'new'}"], "--config"),
        (["--mode=info"], "--config=FILE or --workdir=DIR"),
    ):
        text = run(*arguments, status=2)
        assert text.startswith("error: ")
        assert words in text, text
    text = run(
        "--mode=train",
        *TINY,
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.model.channels=12",
        status=2,
    )
    assert "model.channels: 8 there, 12 now" in text
    assert sorted(p for p in workdir.rglob("*") if p.is_file()) == before
    assert not list(tmp_path.iterdir())
