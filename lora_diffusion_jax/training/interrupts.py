"""SIGINT and SIGTERM as a request to stop after the current step."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# With several processes, steps between agreements on whether one of them was told to stop.
AGREE_EVERY = 10

Result = TypeVar("Result")


class Interrupted(BaseException):
    """Raised where a signal cuts work short; no Exception, so that the work does not catch it."""


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered; a second one ends the process at once."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: int | None = None
        self.at_once = False  # raise where the program stands
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())
        if self.at_once:
            raise Interrupted

    def cut_short(self, work: Callable[[], Result]) -> Result:
        """Calls work, which a signal, now or before, ends by Interrupted.

        With several processes it runs to its end: the others may be waiting inside it.
        """
        self.at_once = jax.process_count() == 1
        try:
            if self.at_once and self.received is not None:
                raise Interrupted
            return work()
        finally:
            self.at_once = False

    def agreed(self, step: int) -> int | None:
        """The signal to stop for, the same in all processes, or None."""
        if jax.process_count() == 1:
            return self.received
        if step % AGREE_EVERY:
            return None
        told = multihost_utils.process_allgather(np.int32(self.received or 0))
        return int(told.max()) or None
