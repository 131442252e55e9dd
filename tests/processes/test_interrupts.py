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
