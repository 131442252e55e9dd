"""An evaluation during training, cut short by a signal, is repeated by the same command."""

import json
import signal

import pytest

from lora_diffusion_jax.modes import evaluate
from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.modes.running import TINY
from tests.modes.running import run as command
from tests.processes.test_processes import Job
from tests.small import config_flags

pytestmark = pytest.mark.slow
# Sends a signal to itself, or none (0), before the third batch of samples of an evaluation, once the
# checkpoint that was begun before is there.
PROGRAM = """
import os, sys, time
from lora_diffusion_jax.modes import main, train
from lora_diffusion_jax.training.checkpoint import saved_steps
pause_point, batches = train.pause_point, iter(range(1, 10**6))
def count():
    if next(batches) == 3 and number:
        print("in an evaluation", flush=True)
        while not saved_steps(workdir):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
    pause_point()
number, train.pause_point = int(sys.argv.pop()), count
workdir = next(arg for arg in sys.argv if arg.startswith("--workdir=")).partition("=")[2]
sys.exit(main.main(sys.argv[1:]))
"""
SIZES = config_flags(
    train__total_images=96,
    train__eval_every=48,
    train__sample_every=4800,
    eval__num_samples=48,
    sampler__batch_size=8,
)


@pytest.fixture(scope="module")
def inputs(data_dir, tmp_path_factory):
    """Flags of data and reference."""
    reference = tmp_path_factory.mktemp("reference") / "digits.npz"
    flags = [
        "--data=digits",
        f"--data_dir={data_dir}",
        "--features=rotation",
        f"--dest={reference}",
    ]
    command("ref", *flags, program=evaluate.main)
    return [f"--config.data.data_dir={data_dir}", f"--config.eval.reference={reference}"]


def job(workdir, inputs, count, number=0):
    """Trains with two evaluations; the last process sends itself the signal in the first one."""
    where = (f"--workdir={workdir}", *inputs)
    each = lambda index: (number if index == count - 1 else 0,)  # noqa: E731
    return Job(count, "-c", PROGRAM, "--mode=train", *TINY, *SIZES, *where, each=each)


def results(workdir):
    """What was learnt and what the evaluations found."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    shown = ("step", "train/", "eval/")
    return [{k: v for k, v in line.items() if k.startswith(shown)} for line in lines]


@pytest.mark.parametrize(
    ("count", "number"), [(1, signal.SIGKILL), (2, signal.SIGTERM), (2, signal.SIGKILL)]
)
def test_an_evaluation_is_repeated(tmp_path, inputs, count, number):
    whole, run = tmp_path / "whole", tmp_path / "run"
    with job(whole, inputs, count) as undisturbed:
        assert undisturbed.end() == [0] * count, undisturbed.output
    with job(run, inputs, count, number) as disturbed:
        codes = disturbed.end()
    assert "in an evaluation" in disturbed.output[-1]
    if number == signal.SIGTERM:
        assert codes == [128 + number] * count, disturbed.output
    else:
        assert codes == [2] * (count - 1) + [-number], disturbed.output
    assert saved_steps(run) == [3]
    assert not any("eval/" in str(line) for line in results(run))
    with job(run, inputs, count) as resumed:
        assert resumed.end() == [0] * count, resumed.output
    assert "resuming from the checkpoint of step 3" in resumed.output[0]
    assert results(run) == results(whole)
    assert str(results(run)).count("'eval/fd_rotation_48'") == 2
