"""Running main.py as a user does: a process, a small network, the digits."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The programs run for milliseconds: compiling them well is not worth it.
FAST_COMPILE = "--xla_backend_optimization_level=0"
TINY = [
    "--config=configs/digits.py",
    "--config.model.channels=8",
    "--config.model.channel_mult=(1,)",
    "--config.model.attn_resolutions=(8,)",
    "--config.lora.rank=2",
    "--config.lora.bases=3",
    "--config.lora.widths=(16, 8)",
    "--config.train.batch_size=16",
    "--config.train.log_every=32",
    "--config.train.checkpoint_every=48",
    "--config.sampler.num_steps=3",
    "--config.eval.num_samples=0",
]


def run(*arguments, ok=True, program="main.py"):
    """Runs main.py (or eval_fid.py); returns (status, everything it printed)."""
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, text
    return done.returncode, text


def start(*arguments, program="main.py"):
    """Starts main.py; returns the process, whose standard output holds all it prints."""
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(path, data_dir, images, *more, ok=True):
    return run(
        "--mode=train",
        *TINY,
        f"--workdir={path}",
        f"--config.data.data_dir={data_dir}",
        f"--config.train.total_images={images}",
        *more,
        ok=ok,
    )
