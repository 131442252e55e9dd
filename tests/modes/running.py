"""Running the commands as a user types them: a small network, the digits."""

import contextlib
import io
import subprocess
import sys

from lora_diffusion_jax.modes import main
from tests.small import ROOT, SMALL_NETWORK, config_flags

TINY = [
    "--config=digits",
    *config_flags(
        **{**SMALL_NETWORK, "model__channel_mult": (1,), "model__attn_resolutions": (8,)}
    ),
    *config_flags(train__batch_size=16, train__log_every=32, train__checkpoint_every=48),
    *config_flags(sampler__num_steps=3, eval__num_samples=0),
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
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_command(path, data_dir, images, *more):
    flags = config_flags(data__data_dir=data_dir, train__total_images=images)
    return ["--mode=train", *TINY, f"--workdir={path}", *flags, *more]


def train(path, data_dir, images, *more, status=0):
    return run(*train_command(path, data_dir, images, *more), status=status)
