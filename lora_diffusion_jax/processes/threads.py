"""Waiting for C++ so that signals are handled: Python handles none while its main thread is in there."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(function: Callable[..., T], *args: Any) -> T:
    """function(*args) from a thread of its own: its result, or the error it raised.

    If a signal's handler raises, the thread goes on until the function returns, but does not hold up
    the end of the program.
    """
    called: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            called.set_result(function(*args))
        except BaseException as error:  # the caller's to handle
            called.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return called.result()
