"""What the doctor says about machines that are well and machines that are not."""

import fnmatch
import json
import re
import shutil

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes import doctor
from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.modes.running import TINY, run, start

CPU = {"count": 1, "platform": "cpu", "memory": 0}
GPU = {"count": 2, "platform": "gpu", "memory": 80 * 2**30}


@pytest.mark.parametrize(
    ("found", "hardware", "words"),
    [
        (CPU, "", ""),
        (GPU, "nvidia0", ""),
        (CPU, "nvidia0", "jax[cuda13]"),
        (CPU, "accel0", "jax[tpu]"),
        (
            {"error": "Unknown backend gpux"},
            "",
            "(Unknown backend gpux). Correct JAX_PLATFORMS",
        ),
    ],
)
def test_idle_accelerators_and_missing_devices(monkeypatch, found, hardware, words):
    monkeypatch.setattr(doctor, "probe", lambda: found)
    monkeypatch.setattr(
        doctor.glob, "glob", lambda pattern: fnmatch.filter([f"/dev/{hardware}"], pattern)
    )
    if not words:
        (line,) = doctor.devices()
        assert f"{found['count']} x {found['platform']}" in line
        return
    with pytest.raises(UserError) as error:
        list(doctor.devices())
    assert words in str(error.value)


def test_an_unknown_flag_is_found_without_ending_the_program(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    process = start("--mode=doctor", *TINY)
    printed = process.communicate()[0]
    assert process.returncode == 1, printed
    assert re.search("nknown flag.*--xla_no_such_flag=1.*Correct.*XLA_FLAGS", printed)
    assert "checkpoint: " in printed  # which needs no device
    assert "1 problem found" in printed


def test_a_cache_and_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR"):
        list(doctor.cache())
    with pytest.raises(UserError, match="Choose another workdir"):
        list(doctor.run(tmp_path / "file" / "run", may_be_new=True))
    (line,) = doctor.run(tmp_path / "new", may_be_new=True)
    assert "GiB free" in line
    assert not (tmp_path / "new").exists()


def test_unreadable_checkpoints_and_a_damaged_config_are_problems(tmp_path):
    config = {"train": {"batch_size": 16, "total_images": 96}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("4", "unreadable-6"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    lines = doctor.run(tmp_path, may_be_new=False)
    assert [next(lines), next(lines)][1] == "run: 1 checkpoints, 64 of 96 images"
    with pytest.raises(UserError, match="unreadable-6"):
        next(lines)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        list(doctor.run(tmp_path, may_be_new=False))


def test_all_damage_in_a_run_is_listed(workdir, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(workdir, run_dir)
    assert list(doctor.damaged(run_dir)) == []
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    (run_dir / "checkpoints" / str(steps[0]) / "weights" / "_METADATA").write_text("{}")
    shutil.rmtree(run_dir / "checkpoints" / str(steps[1]) / "optimizer")
    with (run_dir / "config.json").open("a") as file:
        file.write(" ")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step"')
    found = list(doctor.damaged(run_dir))
    assert len(found) == 4
    for text, words in zip(
        found, ("config.json", "weights/_METADATA", "no optimizer", "1 damaged lines"), strict=True
    ):
        assert words in text


def test_checkpoints_without_checksums_are_named(workdir, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(workdir, run_dir)
    assert not any("not verified" in line for line in doctor.run(run_dir, may_be_new=False))
    step = saved_steps(run_dir)[0]
    (run_dir / "checkpoints" / str(step) / "SHA256SUMS").unlink()
    (line,) = (x for x in doctor.run(run_dir, may_be_new=False) if "not verified" in x)
    assert f"checkpoint {step}, without checksums" in line


def test_the_command_counts_problems(tmp_path, data_dir):
    data = f"--config.data.data_dir={data_dir}"
    config = ["--mode=doctor", "--config=digits", data]
    text = run(*config, f"--workdir={tmp_path / 'run'}")
    for words in (
        "jaxlib ",
        "devices: 1 x cpu",
        "mesh: data=1, fsdp=1",
        "1,500 images",
        "GiB free",
    ):
        assert words in text
    assert text.endswith("\nNo problems found.\n")
    text = run(*config, "--config.mesh.data=3", "--workdir=/proc/nothing", status=1)
    assert "PROBLEM: The mesh asks for data=3" in text
    assert text.endswith("\n2 problems found.\n")
    text = run("--mode=doctor", "--workdir=/nothing", status=1)
    assert "PROBLEM: /nothing is not a run" in text
