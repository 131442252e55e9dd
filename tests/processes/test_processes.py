"""Processes train, agree, stop and fail as one."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.processes.test_check_in import free_port
from tests.small import fast_compile_env
from tests.test_generate import images_of, make
from tests.training.stand_in import train_lines

STAND_IN = ("-m", "tests.training.stand_in")


class Job:
    """A program at work in several processes, which are killed at the end of a with block."""

    def __init__(self, count, *arguments, devices=1, each=lambda index: ()):
        job = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
        }
        env = job | fast_compile_env(f"--xla_force_host_platform_device_count={devices}")
        self.output = [""] * count
        self.members = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments), *map(str, each(index))],
                env=env | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]

    def wait_for(self, index, text):
        """Reads what a process prints until a line contains `text`; returns the line."""
        for line in self.members[index].stdout:
            self.output[index] += line
            if text in line:
                return line
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
        self.output[index] += self.members[index].communicate(timeout=500)[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.kill()
            member.wait()


def train(workdir, count, *options, expected=0, **settings):
    """Trains to the end; returns what was printed."""
    with Job(count, *STAND_IN, workdir, *options, **settings) as job:
        assert job.end() == [expected] * count, job.output
    return job.output


@pytest.mark.slow
def test_two_processes_stop_die_and_resume_to_the_same_bits(tmp_path):
    """SIGTERM to one stops both at one step; kill -9 of one ends both; resumed, nothing shows."""
    once, run = ("--total", 34), tmp_path / "run"
    train(tmp_path / "whole", 2, *once)
    with Job(2, *STAND_IN, run, *once, "--pause", 0.05) as job:
        job.wait_for(1, "batch 12")
        job.members[1].send_signal(signal.SIGTERM)
        assert job.end() == [128 + signal.SIGTERM] * 2, job.output
    assert "stopped by SIGTERM after step" in job.output[0]
    stopped_at = max(saved_steps(run))
    assert 12 <= stopped_at < 20
    with Job(2, *STAND_IN, run, *once, "--pause", 0.05) as job:
        job.wait_for(0, f"resuming from the checkpoint of step {stopped_at}")
        job.wait_for(0, "batch 25")
        job.members[1].kill()
        assert job.end() == [2, -signal.SIGKILL]
    assert re.search(r"stopped sending heartbeats\):\n1\n", job.output[0])
    assert (
        "error: JAX aborted this process, probably because another one was killed" in job.output[0]
    )
    train(run, 2, *once)
    assert (tmp_path / "run.json").read_text() == (tmp_path / "whole.json").read_text()
    assert train_lines(run) == train_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, (2, 2)), pytest.param(4, 1, (1, 4), marks=pytest.mark.slow)],
)
def test_processes_train_like_one(tmp_path, count, devices, mesh):
    """The losses of 50 steps; half-way the run moves to another number of processes."""
    every = ("--log-every", 1)
    train(tmp_path / "one", 1, "--total", 50, *every)
    sizes = ("--data", mesh[0], "--fsdp", mesh[1])
    train(tmp_path / "many", count, "--total", 25, *every, *sizes, devices=devices)
    train(tmp_path / "many", 1, "--total", 50, *every)
    expected, found = (
        [line["train/loss"] for line in train_lines(tmp_path / name) if "train/loss" in line]
        for name in ("one", "many")
    )
    assert len(expected) == 50
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums in another order


def test_an_error_of_one_ends_all_and_is_reported(tmp_path):
    output = train(tmp_path / "a", 2, expected=2, each=lambda index: ("--width", 16 + index))
    assert "the config differs between processes" in output[0]
    each = lambda index: ("--break-at", 8) if index else ()  # noqa: E731
    output = train(tmp_path / "b", 2, expected=2, each=each)
    assert re.search(r"error: process 1 \(.*\) failed: batch 8 cannot be read", output[0])


AGREEING = """
import jax, time
from lora_diffusion_jax import processes
from lora_diffusion_jax.errors import UserError
processes.join(limit=60)
index = jax.process_index()
with processes.Interrupts("saving"), processes.ending_together():
    for letters in ("abc", "def"):
        assert processes.exchange("letters", letters[index]) == list(letters)
    assert processes.from_leader("a number", lambda: 7 if index == 0 else 1 / 0) == 7
    processes.check_same("a word", "word")
    try:
        processes.check_same("a word", "x" * 999 + "1y"[index > 1])
    except processes.SharedError as error:
        print(error, flush=True)
    try:
        if index != 1:
            processes.barrier("the test", limit=3)
    except UserError as error:
        print(error, flush=True)
    time.sleep(600)
"""


def test_values_signals_and_lateness():
    with Job(3, "-c", AGREEING) as job:
        line = job.wait_for(1, "a word differs between processes")
        assert re.search(r"'x+1' in process 0, 'x+y' in process 2", line)
        for waiting in (0, 2):
            job.wait_for(waiting, "a word differs")
        time.sleep(0.3)
        job.members[0].send_signal(signal.SIGTERM)  # handled in the middle of waiting
        job.wait_for(0, "SIGTERM: saving")
        assert "Waited" not in job.output[0]
        for waiting in (0, 2):
            job.wait_for(waiting, "Waited 3 s for process 1 of 3 at: the test.")
        began = time.monotonic()
        job.members[0].kill()
        assert job.end() == [-signal.SIGKILL, 2, 2]
        assert (
            time.monotonic() - began < 10
        )  # the coordination service is gone: no heartbeats needed
    assert "Rerun the same command" in job.output[1].splitlines()[-1]


VERSIONS = """
import jax, os
from lora_diffusion_jax import processes
if os.environ["JAX_PROCESS_ID"] == "1":
    jax.__version__ = "0.1"
processes.join(limit=60)
"""


def test_versions_must_be_equal():
    with Job(2, "-c", VERSIONS) as job:
        assert job.end() == [1, 1]
    for output in job.output:
        assert re.search(r"SharedError: The installation differs .* 'jax \d.* 'jax 0.1, ", output)


SAMPLING = """
import jax, sys
import numpy as np
from lora_diffusion_jax import processes
from lora_diffusion_jax.evaluation.features import Detector, extract
from tests.test_generate import images_of, make

processes.join(limit=60)
with processes.ending_together():
    batch = images_of(make(batch_size=4), range(10))
    network = lambda v, x: (x.reshape(len(x), -1) * v["w"], x.mean((1, 2)).astype("float32"))
    detector = Detector("flat", 16, network, {"w": np.float32(0.5)})
    features, logits = map(np.concatenate, zip(*extract(detector, [batch.images])))
    path = f"{sys.argv[1]}/{jax.process_index()}.npz"
    np.savez(path, **batch._asdict(), features=features, logits=logits)
"""


def test_sampling_and_features_over_two_processes(tmp_path):
    """Every process gets all images and features, in order; the images are those of one process."""
    with Job(2, "-c", SAMPLING, tmp_path, devices=2) as job:
        assert job.end() == [0, 0], job.output
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
