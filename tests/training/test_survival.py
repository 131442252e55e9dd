"""A run that is killed, asked to stop, and killed again ends with the same bits."""

import json
import signal
import subprocess
import sys

import pytest

from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.small import fast_compile_env
from tests.training.stand_in import train_lines

STEPS = 34  # a line every 7, a checkpoint every 5


class Run:
    """The stand-in program at work."""

    def __init__(self, workdir, *options, **environment):
        command = [sys.executable, "-m", "tests.training.stand_in", workdir, *map(str, options)]
        self.process = subprocess.Popen(
            [*command, "--total", str(STEPS)],
            env={**fast_compile_env(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def wait_for(self, text):
        """Reads until a line begins with `text`."""
        for line in self.process.stdout:
            self.output += line
            if line.startswith(text):
                return
        raise AssertionError(f"ended without {text!r}:\n{self.output}")

    def end(self):
        """Reads to the end; returns the exit code."""
        self.output += self.process.communicate(timeout=120)[0]
        return self.process.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run = Run(workdir, JAX_ENABLE_COMPILATION_CACHE="0")  # the others read what one has compiled
    assert run.end() == 0, run.output
    return workdir, json.loads(workdir.with_name(f"{workdir.name}.json").read_text())


def test_killed_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, undisturbed, monkeypatch):
    workdir, cache = tmp_path / "run", tmp_path / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))

    # kill -9 from within, while the checkpoint of step 10 is being written or just was
    run = Run(workdir, "--die-at", 11)
    assert run.end() == -signal.SIGKILL
    (step,) = cache.glob("jit_train_step-*-cache")
    written = step.stat().st_mtime_ns

    # SIGTERM: the step is finished and saved
    run = Run(workdir, "--pause", 0.05)
    run.wait_for("resuming from the checkpoint of step ")
    run.wait_for("batch 17")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.output
    assert "SIGTERM: saving after this step" in run.output
    assert "stopped by SIGTERM after step " in run.output
    stopped_at = max(saved_steps(workdir))
    assert stopped_at >= 17

    # kill -9 from outside; a second run meanwhile is refused
    run = Run(workdir, "--pause", 0.05)
    run.wait_for(f"resuming from the checkpoint of step {stopped_at}")
    run.wait_for("batch 27")
    second = Run(workdir)
    run.process.send_signal(signal.SIGSTOP)  # hold it while the second one starts
    assert second.end() == 2
    assert f"Another run is using {workdir} (process {run.process.pid} on " in second.output
    run.process.kill()
    assert run.end() == -signal.SIGKILL

    run = Run(workdir)
    assert run.end() == 0, run.output
    reference, told = undisturbed
    assert json.loads((tmp_path / "run.json").read_text()) == told
    assert train_lines(workdir) == train_lines(reference)
    assert [path.stat().st_mtime_ns for path in cache.glob("jit_train_step-*-cache")] == [written]


def test_a_second_interrupt_ends_at_once(tmp_path):
    run = Run(tmp_path / "run", "--pause", 60)
    run.wait_for("batch 1")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("SIGINT: saving after this step")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == -signal.SIGINT
