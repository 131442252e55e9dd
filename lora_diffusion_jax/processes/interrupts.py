"""Signals as a request to save and stop: SIGINT, SIGTERM, and what announces a preemption."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from lora_diffusion_jax.processes.agreement import exchange
from lora_diffusion_jax.processes.session import alone

# What clouds, Kubernetes and Slurm send ahead of taking the machine away (SIGTERM; SIGUSR1 by Slurm's
# --signal), a hand (SIGINT), and a terminal or ssh session that closes (SIGHUP).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

Result = TypeVar("Result")

_entered: list["Interrupts"] = []  # the innermost is last


class Interrupted(BaseException):
    """Raised where a signal cuts work short; no Exception, so that the work does not catch it."""


class Interrupts:
    """Notes the signals while it is entered; a second SIGINT ends the process at once.

    Signals that were ignored before (SIGHUP under nohup) stay so.

    Attributes:
        received: the signal this process got first, or None.
        agreed: the one that all processes know to stop for, or None.
    """

    def __init__(self, doing: str = "saving after this step"):
        self.doing = doing
        self.received: int | None = None
        self.agreed: int | None = None
        self.at_once = False  # raise where the program stands
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._note)
        _entered.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _entered.remove(self)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # Launchers may send SIGTERM twice; only a hand means it.
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received = number
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: {self.doing}; SIGINT (Ctrl-C) ends at once\n".encode())
        if self.at_once:
            raise Interrupted

    def cut_short(self, work: Callable[[], Result]) -> Result:
        """Calls work, which a signal, now or before, ends by Interrupted.

        With several processes that happens at its next `pause_point`: the others wait inside it.
        """
        self.at_once = alone()
        try:
            if self.at_once and self.received is not None:
                raise Interrupted
            return work()
        finally:
            self.at_once = False

    def pause(self) -> None:
        """Raises Interrupted, in all processes, when one of them was told to stop."""
        told = exchange("agreeing whether to stop", str(self.received or 0))
        self.agreed = max(int(text) for text in told) or None
        if self.agreed is not None:
            raise Interrupted


def pause_point() -> None:
    """A place inside long work where a signal may end it; all processes must come by it alike.

    Raises:
        Interrupted: inside `with Interrupts()`, when a process was told to stop.
    """
    if _entered:
        _entered[-1].pause()
