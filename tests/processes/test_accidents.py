"""What happens to one of two processes, or to their disk, ends both with a sentence; the run goes on."""

import re
import shutil
import signal
import time

import pytest

from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.processes.test_processes import STAND_IN, Job, train
from tests.training.stand_in import train_lines

pytestmark = pytest.mark.slow
LOST = re.compile("JAX aborted this process|lost connection|Waited|process 1 .* failed")
# As the command line, without what orbax's event loops raise after an error; perhaps on a full disk.
PROGRAM = """
import resource, sys
from lora_diffusion_jax import cli
from tests.training.stand_in import main
if sys.argv.pop() == "small":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.unraisablehook = cli._quiet_loops
main()
"""


def last_errors(job):
    """The last sentence that each process printed; no process left a traceback."""
    assert not any("Traceback" in output for output in job.output), job.output
    return [re.findall("^(?:error|UserError): .*", output, re.M)[-1:] for output in job.output]


@pytest.mark.parametrize("index", [0, 1])
def test_one_is_killed_and_the_other_ends_soon(tmp_path, index):
    once = ("--total", 30)
    train(tmp_path / "whole", 2, *once)
    with Job(2, *STAND_IN, tmp_path / "run", *once, "--pause", 0.1) as job:
        job.wait_for(1 - index, "batch 12")
        job.members[index].kill()
        began = time.monotonic()
        codes = job.end()
    assert time.monotonic() - began < 200
    assert codes[index] == -signal.SIGKILL
    assert codes[1 - index] == 2, job.output
    assert LOST.search(job.output[1 - index])
    train(tmp_path / "run", 2, *once)
    assert (tmp_path / "run.json").read_text() == (tmp_path / "whole.json").read_text()
    assert train_lines(tmp_path / "run") == train_lines(tmp_path / "whole")


@pytest.mark.parametrize("index", [0, 1])
def test_the_disk_of_one_is_full(tmp_path, index):
    """It may write no file above 3 kB; what was saved before stays, and the run goes on."""
    train(tmp_path / "whole", 2, "--total", 20)
    train(tmp_path / "run", 2, "--total", 10)
    command = ("-c", PROGRAM, tmp_path / "run", "--total", 20)
    with Job(2, *command, each=lambda i: ("small" if i == index else "any",)) as job:
        assert job.end() == [2, 2], job.output
    errors = last_errors(job)
    assert "File too large" in str(errors).replace("file too large", "File too large")
    assert "space" in str(errors)
    assert 10 in saved_steps(tmp_path / "run")
    train(tmp_path / "run", 2, "--total", 20)
    assert (tmp_path / "run.json").read_text() == (tmp_path / "whole.json").read_text()


def test_the_workdir_is_deleted_under_both(tmp_path):
    run = tmp_path / "run"
    with Job(2, "-c", PROGRAM, run, "--total", 400, "--pause", 0.05, "any") as job:
        job.wait_for(1, "batch 12")
        shutil.rmtree(run.rename(tmp_path / "gone"))  # at once: it is being written to
        began = time.monotonic()
        assert job.end() == [2, 2], job.output
    assert time.monotonic() - began < 200
    assert all("disappeared" in str(error) for error in last_errors(job)), job.output
    assert not (run / "config.json").exists()  # orbax may create folders anew
