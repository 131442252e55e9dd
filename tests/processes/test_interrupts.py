"""Signals ask to save and stop; some are left alone."""

import os
import signal
import subprocess
import sys

import pytest

from lora_diffusion_jax.processes.interrupts import SIGNALS, Interrupted, Interrupts, pause_point


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_the_work_at_a_pause_point(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        pause_point()  # nothing yet
        os.kill(os.getpid(), number)
        assert interrupts.received == number
        with pytest.raises(Interrupted):
            pause_point()
        assert interrupts.agreed == number
    assert signal.getsignal(number) is before
    pause_point()  # outside: nothing to end


def test_a_signal_cuts_short_what_may_be_cut(capfd):
    reached = []

    def work():
        reached.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("ended")

    with Interrupts("putting things away") as interrupts:
        with pytest.raises(Interrupted):
            interrupts.cut_short(work)
        with pytest.raises(Interrupted):  # what comes after is not begun
            interrupts.cut_short(lambda: reached.append("begun again"))
    assert reached == ["begun"]
    assert "SIGTERM: putting things away" in capfd.readouterr().err


def test_ignored_signals_stay_ignored_and_launchers_may_repeat_themselves():
    """nohup ignores SIGHUP; Slurm may send SIGTERM twice."""
    program = """
import os, signal
from lora_diffusion_jax.processes.interrupts import Interrupts
with Interrupts() as interrupts:
    os.kill(os.getpid(), signal.SIGHUP)
    print(interrupts.received)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(interrupts.received == signal.SIGTERM)
"""
    done = subprocess.run(
        ["nohup", sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "True"]


# A program of some seconds, and a signal after a tenth of one; prints the seconds until it was handled.
LONG = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from lora_diffusion_jax import processes
jax.config.update("jax_cpu_enable_async_dispatch", sys.argv[1] == "async")
x = jnp.ones((500, 500)) / 500
program = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)[0, 0])
assert abs(processes.fetch(processes.call(program, 2)) - 1 / 500) < 1e-6
class Told(Exception): pass
def tell(*_): raise Told
signal.signal(signal.SIGALRM, tell)
signal.setitimer(signal.ITIMER_REAL, 0.1)
began = time.monotonic()
try:
    processes.fetch(processes.call(program, 10**5))
except Told:
    print(time.monotonic() - began, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("dispatch", ["async", "sync"])
def test_signals_are_handled_while_a_program_runs(dispatch):
    done = subprocess.run(
        [sys.executable, "-c", LONG, dispatch],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert 0.05 < float(done.stdout) < 2
