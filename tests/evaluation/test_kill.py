"""`gen` killed with SIGKILL at three moments ends with the number of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

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
    expected, _ = start(runs[0], reference, "fid,pr").communicate(timeout=300)
    for least in (1, 600, 1800):
        process = start(runs[1], reference, "fid,pr")
        deadline = time.monotonic() + 200
        while images_done(runs[1]) < least and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert least <= images_done(runs[1]) < 4000
    out, _ = start(runs[1], reference, "fid,pr").communicate(timeout=300)
    rows, others = ([json.loads(line) for line in text.splitlines()] for text in (out, expected))
    assert len(rows) == 5
    assert [row["value"] for row in rows] == [row["value"] for row in others]
