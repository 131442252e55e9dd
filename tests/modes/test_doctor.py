"""What the doctor says about machines that are well and machines that are not."""

import json
import os

import pytest
from lora_diffusion_jax.doctor import Devices

from lora_diffusion_jax.modes import doctor
from tests.modes.running import run

CPU = Devices("cpu", "cpu", (None,))
GPU = Devices("gpu", "NVIDIA H100", (80 * 2**30,) * 2)
CUDA = {"jax-cuda13-plugin": "0.10.2"}
GIB = 2**30


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (doctor.check_python((3, 12, 1)), ""),
        (doctor.check_python((3, 10, 4)), "3.11 or newer"),
        (doctor.check_versions({"jax": "0.10.2", "jaxlib": "0.10.0"}), ""),
        (doctor.check_versions({"jax": "0.10.2", "jaxlib": "0.9.2"}), "two releases"),
        (doctor.check_versions({"jax": "0.10", "jaxlib": "0.10", "grain": ""}), "Install grain"),
        (doctor.check_devices(CPU, {}, [], {}), ""),
        (doctor.check_devices(GPU, {}, ["gpu"], CUDA), ""),
        (doctor.check_devices(CPU, {}, ["gpu"], {}), "jax[cuda13]"),
        (doctor.check_devices(CPU, {}, ["tpu"], {}), "jax[tpu]"),
        (doctor.check_devices(CPU, {}, ["gpu"], CUDA), "driver"),
        (doctor.check_devices(CPU, {"JAX_PLATFORMS": "cpu"}, ["gpu"], CUDA), "hides it"),
        (doctor.check_devices(Devices(error="x"), {"JAX_PLATFORMS": "gpux"}, [], {}), "gpux"),
        (doctor.check_host_memory(16 * GIB, 8 * GIB), ""),
        (doctor.check_host_memory(16 * GIB, GIB), "end other programs"),
        (doctor.check_host_memory(0, 0), ""),  # where it cannot be read
        (doctor.check_shared_memory(64 * 2**20, 2), "/dev/shm"),
        (doctor.check_shared_memory(GIB, 2), ""),
        (doctor.check_state("", 5 * GIB, 8 * GIB), ""),
        (doctor.check_state("", 9 * GIB, 8 * GIB), "mesh.fsdp"),
        (doctor.check_cache("", {}), ""),
    ],
)
def test_each_fault_is_named_with_its_remedy(finding, words):
    assert bool(finding.wrong) == bool(words)
    assert words in finding.wrong


def test_a_cache_and_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "JAX_COMPILATION_CACHE_DIR" in doctor.check_cache(str(tmp_path / "file/x"), {}).wrong
    (first, *_) = doctor.check_workdir(tmp_path / "file" / "run", 0)
    assert "another workdir" in first.wrong
    (first, *_) = doctor.check_workdir(tmp_path / "run", 10**18)
    assert "make room" in first.wrong
    assert not (tmp_path / "run").exists()


def test_checkpoints_set_aside_and_a_damaged_config_are_wrong(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"train": {"batch_size": 16, "total_images": 96}})
    )
    for name in ("4", "unreadable-6"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "unreadable-6" in doctor.check_checkpoints(tmp_path).wrong
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in doctor.check_checkpoints(tmp_path).wrong


def test_the_command_names_what_is_wrong_and_what_is_well(tmp_path, monkeypatch):
    data = f"--config.data.data_dir={tmp_path / 'tfds'}"
    config = ["--mode=doctor", "--config=configs/digits.py", data]
    _, text = run(*config, f"--workdir={tmp_path / 'run'}")
    for words in ("jaxlib ", "devices: 1 x cpu", "mesh: data=1 x fsdp=1", "in memory", "GiB free"):
        assert words in text
    assert "All is well." in text
    status, text = run(*config, "--config.mesh.data=3", "--config.train.batch_size=7", ok=False)
    assert status == 1
    assert "WRONG: The mesh asks for data=3" in text
    assert "1 thing is wrong" in text
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_no_such_flag=1"
    )  # ends any program that asks for devices
    finding = doctor.check_devices(doctor.probe(), os.environ, [], {})
    assert "take it out of the environment" in finding.wrong
    assert "--xla_no_such_flag" in finding.text
