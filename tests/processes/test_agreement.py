"""Processes exchange values, name those who are late, and end when one of them is gone."""

import contextlib
import re
import signal
import subprocess
import sys
import time

from tests.processes.test_check_in import free_port
from tests.training.stand_in import fast_compile_env

AGREEING = """
import sys, time
from lora_diffusion_jax import processes
from lora_diffusion_jax.errors import UserError
address, index = sys.argv[1], int(sys.argv[2])
processes.join(address, 3, index, limit=60)
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

VERSIONS = """
import sys
import jax
from lora_diffusion_jax import processes
if sys.argv[2] == "1":
    jax.__version__ = "0.1"
try:
    processes.join(sys.argv[1], 2, int(sys.argv[2]), limit=60)
except processes.SharedError as error:
    sys.exit(str(error))
"""


@contextlib.contextmanager
def started(program, count):
    """The program in several processes."""
    address = f"127.0.0.1:{free_port()}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(index)],
            env=fast_compile_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            member.wait()


def read_until(member, text):
    """The line that contains the text; the test ends with those before if there is none."""
    lines = []
    for line in member.stdout:
        if text in line:
            return line
        lines.append(line)
    raise AssertionError("".join(lines))


def test_values_signals_and_lateness():
    with started(AGREEING, 3) as members:
        line = read_until(members[1], "a word differs between processes")
        assert re.search(r"'x+1' in process 0, 'x+y' in process 2", line)
        for waiting in (0, 2):
            read_until(members[waiting], "a word differs")
        time.sleep(0.3)
        members[0].send_signal(signal.SIGTERM)  # heard in the middle of waiting
        assert "SIGTERM: saving" in read_until(members[0], ":")
        for waiting in (0, 2):
            read_until(members[waiting], "Waited 3 s for process 1 of 3 at: the test.")
        began = time.monotonic()
        members[0].kill()
        for survivor in members[1:]:
            assert survivor.wait(30) == 2
            assert "Rerun the same command" in read_until(survivor, "error: JAX aborted")
        assert (
            time.monotonic() - began < 10
        )  # the coordination service is gone: no heartbeats needed


def test_versions_must_be_equal():
    with started(VERSIONS, 2) as members:
        for member in members:
            output, _ = member.communicate(timeout=60)
            assert member.returncode == 1
            assert re.search(r"The installation differs .* 'jax \d.* 'jax 0.1, ", output), output
