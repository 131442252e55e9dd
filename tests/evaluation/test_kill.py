"""`gen`, killed or stopped at any moment, ends with the numbers of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes.test_accidents import LOST
from tests.processes.test_processes import Job

from .test_eval_fid import reference, write_run  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import eval_fid
from lora_diffusion_jax.evaluation import collect
collect.SAVE_SECONDS = 0.0
sys.exit(eval_fid.main(sys.argv[1:]))
"""


def start(run, reference, metrics):  # noqa: F811
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            *(sys.executable, "-c", SCRIPT, "gen", f"--workdir={run}", f"--ref={reference}"),
            *("--num=4000", f"--metrics={metrics}", "--config.sampler.num_steps=6"),
        ],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def images_done(run):
    states = list((run / "evaluation" / "partial").glob("*/state.npz"))
    if not states:
        return 0
    with np.load(states[0]) as state:
        return int(state["count"]) + len(state["held"])


@pytest.mark.slow
def test_killed_three_times(tmp_path, reference):  # noqa: F811
    runs = [write_run(tmp_path / name) for name in ("whole", "killed")]
    expected, _ = start(runs[0], reference, "fid,pr").communicate(timeout=900)
    for least in (1, 600, 1800):
        process = start(runs[1], reference, "fid,pr")
        deadline = time.monotonic() + 600
        while images_done(runs[1]) < least and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert least <= images_done(runs[1]) < 4000
    out, _ = start(runs[1], reference, "fid,pr").communicate(timeout=900)
    rows, others = ([json.loads(line) for line in text.splitlines()] for text in (out, expected))
    assert len(rows) == 5
    assert [row["value"] for row in rows] == [row["value"] for row in others]


def start_two(run, reference):  # noqa: F811
    command = ("gen", f"--workdir={run}", f"--ref={reference}", "--num=3000", "--metrics=fid,pr")
    return Job(2, "-c", SCRIPT, *command, "--config.sampler.num_steps=6")


def values(job):
    return [json.loads(line)["value"] for line in job.output[0].splitlines() if line[:1] == "{"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "number"),
    [(0, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGKILL), (1, signal.SIGKILL)],
)
def test_two_processes_go_on_where_they_were(tmp_path, reference, index, number, monkeypatch):  # noqa: F811
    """After a signal to one of its two processes, to the numbers of an undisturbed one."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    whole, run = (write_run(tmp_path / name) for name in ("whole", "run"))
    with start_two(whole, reference) as job:
        assert job.end() == [0, 0], job.output
    expected = values(job)
    with start_two(run, reference) as job:
        deadline = time.monotonic() + 600
        while images_done(run) < 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        job.members[index].send_signal(number)
        codes = job.end()
    if number == signal.SIGTERM:
        assert codes == [128 + signal.SIGTERM] * 2, job.output
        assert "stopped by SIGTERM; rerun the same command to resume" in job.output[0]
    else:
        assert codes[1 - index] == 2, job.output
        assert LOST.search(job.output[1 - index])
    assert 200 <= images_done(run) < 3000
    with start_two(run, reference) as job:
        assert job.end() == [0, 0], job.output
    assert len(expected) >= 3
    assert values(job) == expected
