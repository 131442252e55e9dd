"""Several processes train, stop and fail as one."""

import contextlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.processes.test_check_in import free_port
from tests.training.stand_in import fast_compile_env, train_lines


class Job:
    """The stand-in program at work in several processes."""

    def __init__(self, workdir, count, *options, devices=1, each=lambda index: ()):
        address = f"127.0.0.1:{free_port()}"
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "tests.training.stand_in", workdir, *map(str, options)]
        command += ["--processes", str(count), "--address", address]
        self.members = [
            subprocess.Popen(
                [*command, "--process", str(index), *map(str, each(index))],
                env=fast_compile_env(flags),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]
        self.output = [""] * count

    def wait_for(self, index, text):
        """Reads what a process prints until a line begins with `text`."""
        for line in self.members[index].stdout:
            self.output[index] += line
            if line.startswith(text):
                return
        raise AssertionError(f"process {index} ended without {text!r}:\n{self.output[index]}")

    def end(self):
        """Reads all to the end; returns the exit codes."""
        readers = [
            threading.Thread(target=self._finish, args=(i,)) for i in range(len(self.members))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return [member.returncode for member in self.members]

    def _finish(self, index):
        self.output[index] += self.members[index].communicate(timeout=300)[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.kill()


def losses(workdir):
    return [line["train/loss"] for line in train_lines(workdir) if "train/loss" in line]


def test_two_processes_stop_die_and_resume_to_the_same_bits(tmp_path):
    """SIGTERM to one stops both at one step; kill -9 of one ends both; resumed, nothing shows."""
    once = ("--total", 34)
    with Job(tmp_path / "whole", 2, *once) as job:
        assert job.end() == [0, 0], job.output
    run = tmp_path / "run"
    with Job(run, 2, *once, "--pause", 0.05) as job:
        job.wait_for(1, "batch 12")
        job.members[1].send_signal(signal.SIGTERM)
        assert job.end() == [128 + signal.SIGTERM] * 2, job.output
    assert "stopped by SIGTERM after step" in job.output[0]
    stopped_at = max(saved_steps(run))
    assert 12 <= stopped_at < 20
    with Job(run, 2, *once, "--pause", 0.05) as job:
        job.wait_for(0, f"resuming from the checkpoint of step {stopped_at}")
        job.wait_for(0, "batch 25")
        job.members[1].kill()
        survivor, killed = job.end()
    assert (survivor, killed) == (2, -signal.SIGKILL)
    assert re.search(r"stopped sending heartbeats\):\n1\n", job.output[0])
    assert "error: JAX aborted this process, probably because another one was" in job.output[0]
    with Job(run, 2, *once) as job:
        assert job.end() == [0, 0], job.output
    assert (tmp_path / "run.json").read_text() == (tmp_path / "whole.json").read_text()
    assert train_lines(run) == train_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, (2, 2)), pytest.param(4, 1, (1, 4), marks=pytest.mark.slow)],
)
def test_processes_train_like_one(tmp_path, count, devices, mesh):
    """The losses of 50 steps; half-way the run moves to another number of processes."""
    every = ("--log-every", 1)
    with Job(tmp_path / "one", 1, "--total", 50, *every) as job:
        assert job.end() == [0], job.output
    sizes = ("--data", mesh[0], "--fsdp", mesh[1])
    with Job(tmp_path / "many", count, "--total", 25, *every, *sizes, devices=devices) as job:
        assert job.end() == [0] * count, job.output
    with Job(tmp_path / "many", 1, "--total", 50, *every) as job:
        assert job.end() == [0], job.output
    found, expected = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert len(expected) == 50
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums in another order


def test_a_mistake_of_one_ends_all_and_is_told(tmp_path):
    # process 1 was given another config
    each = lambda index: ("--width", 16 + index)  # noqa: E731
    with Job(tmp_path / "a", 2, each=each) as job:
        assert job.end() == [2, 2], job.output
    assert "the config differs between processes" in job.output[0]
    # process 1 cannot go on: its data ends in an error that process 0 does not meet
    each = lambda index: ("--break-at", 8) if index else ()  # noqa: E731
    with Job(tmp_path / "b", 2, each=each) as job:
        assert job.end() == [2, 2], job.output
    assert re.search(r"error: process 1 \(.*\) failed: batch 8 cannot be read", job.output[0])


SAMPLING = """
import sys
import jax, numpy as np
from lora_diffusion_jax import processes
from lora_diffusion_jax.evaluation.features import Detector, extract
from tests.test_generate import VARIABLES, images_of, make

processes.join(sys.argv[1], 2, int(sys.argv[2]), limit=60)
with processes.ending_together():
    batch = images_of(make(batch_size=4), range(10))
    network = lambda v, x: (x.reshape(len(x), -1) * v["w"], x.mean((1, 2)).astype("float32"))
    detector = Detector("flat", 16, network, {"w": np.float32(0.5)})
    features, logits = map(np.concatenate, zip(*extract(detector, [batch.images])))
    np.savez(sys.argv[3], **batch._asdict(), features=features, logits=logits)
"""


def test_sampling_and_features_over_two_processes(tmp_path):
    """Every process gets all images and features, in order; the images are those of one process."""
    from tests.test_generate import images_of, make

    address = f"127.0.0.1:{free_port()}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", SAMPLING, address, str(i), tmp_path / f"{i}.npz"],
            env=fast_compile_env("--xla_force_host_platform_device_count=2"),
        )
        for i in range(2)
    ]
    assert [member.wait(300) for member in members] == [0, 0]
    expected = images_of(make(batch_size=4), range(10))
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as found:
            np.testing.assert_array_equal(found["seeds"], np.arange(10))
            np.testing.assert_array_equal(found["labels"], expected.labels)
            # One unit: the compiler may round differently for another number of devices.
            assert np.abs(found["images"].astype(int) - expected.images).max() <= 1
            flat = found["images"].reshape(10, -1)
            np.testing.assert_array_equal(found["features"], flat * np.float32(0.5))
            np.testing.assert_allclose(found["logits"][:, 0], flat.mean(1), rtol=1e-6)
