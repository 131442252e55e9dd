"""Signals as a request to save and stop: SIGINT, SIGTERM, and those that announce a preemption."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from lora_diffusion_jax.processes.agreement import alone, exchange

# Sent by clouds, Kubernetes and Slurm before they take the machine away (SIGTERM; SIGUSR1 by Slurm's
# --signal), by Ctrl-C (SIGINT), and by a terminal or ssh session that closes (SIGHUP).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

Result = TypeVar("Result")

_entered: list["Interrupts"] = []  # the innermost is last


class Interrupted(BaseException):
    """Raised where a signal cuts work short; not an Exception, so that the work does not catch it."""


class Interrupts:
    """Context manager that records signals; a second SIGINT kills the process.

    Signals that were ignored before (SIGHUP under nohup) stay ignored.

    Args:
        doing: what happens after a signal, for the message.

    Attributes:
        received: the first signal that this process got, or None.
        agreed: the signal for which all processes stop, or None.
    """

    def __init__(self, doing: str = "saving after this step"):
        self.doing = doing
        self.received: int | None = None
        self.agreed: int | None = None
        self._raise_at_once = False
        self._previous: dict[int, Any] = {}

    @property
    def stopped_by(self) -> int | None:
        """The signal that cut work short, or None."""
        return self.agreed or self.received

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        _entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _entered.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            name = signal.Signals(number).name
            # Not print, which the signal may have interrupted
            os.write(2, f"\n{name}: {self.doing}; press Ctrl-C to exit at once\n".encode())
            if self._raise_at_once:
                raise Interrupted
        elif number == signal.SIGINT:  # launchers repeat SIGTERM, but only a person presses Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def cut_short(self, work: Callable[[], Result]) -> Result:
        """Calls `work`; a signal raises Interrupted out of it, at once even if it came before.

        With several processes this happens at the next `pause_point`, as the others wait in the work.
        """
        self._raise_at_once = alone()
        try:
            if self._raise_at_once and self.received is not None:
                raise Interrupted
            return work()
        finally:
            self._raise_at_once = False


def pause_point() -> None:
    """A place in long work where a signal may stop it; all processes must pass it alike.

    Raises:
        Interrupted: inside `with Interrupts()`, if any process got a signal.
    """
    if _entered:
        received = exchange("agreeing whether to stop", str(_entered[-1].received or 0))
        _entered[-1].agreed = max(map(int, received)) or None
        if _entered[-1].agreed:
            raise Interrupted
