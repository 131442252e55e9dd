"""Running the commands as a user types them: a small network, the digits."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from lora_diffusion_jax.modes import main

ROOT = Path(__file__).resolve().parents[2]
# The programs run for milliseconds: compiling them well is not worth it.
FAST_COMPILE = "--xla_backend_optimization_level=0"
TINY = [
    "--config=digits",
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


def run(*arguments, status=0, program=main.main):
    """Runs a command in this process; returns everything it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        found = program([str(argument) for argument in arguments])
    assert found == status, printed.getvalue()
    return printed.getvalue()


def start(*arguments):
    """Starts main.py as a program; returns the process, whose standard output holds all it prints."""
    return subprocess.Popen(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(path, data_dir, images, *more, status=0):
    return run(
        "--mode=train",
        *TINY,
        f"--workdir={path}",
        f"--config.data.data_dir={data_dir}",
        f"--config.train.total_images={images}",
        *more,
        status=status,
    )
