"""An error in one process ends all of them, and each one prints whose error it was."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from lora_diffusion_jax.errors import UserError, explain
from lora_diffusion_jax.processes.agreement import ROOT, SharedError, alone, client, session
from lora_diffusion_jax.processes.interrupts import Interrupted

WHO = f"{socket.gethostname()}, process {os.getpid()}"
_LOST = re.compile("gloo|nccl|connection|unavailable", re.IGNORECASE)  # errors of collectives
_DELIVERY_MS, _FOREVER_MS = 5000, 10**12  # JAX's waits all take a limit

_reported = threading.Lock()  # taken by whoever tells the user why this process exits


def explain_aborts() -> None:
    """Adds a sentence to JAX's abort of this process, and makes its exit status 2.

    JAX aborts from a C++ thread when another process dies or does not start in time. Its callback for
    that case fails (jaxlib 0.10 and 0.12 cannot convert the argument), and Python's own signal
    handlers do not run any more.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    if _reported.acquire(blocking=False):
        text = (
            "error: JAX aborted this process, probably because another one was killed, cannot be reached "
            "or did not start; its log above has the number, or process 0 itself is gone. Rerun the same "
            "command to resume from the last checkpoint.\n"
        )
        os.write(2, text.encode())  # not print, whose lock another thread may hold
    os._exit(2)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error raised inside ends the other processes too, which would wait for this one."""
    if alone():
        yield
        return
    listener = threading.Thread(target=_listen, daemon=True)
    listener.start()
    try:
        yield
    except BaseException as error:
        if raised_by_all(error):
            raise
        _fail(error)
    finally:  # Python crashes if it exits while a thread is blocked inside JAX
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_set(_inbox(jax.process_index()), "", True)  # wakes the listener
        listener.join(_DELIVERY_MS / 1000)


def raised_by_all(error: BaseException) -> bool:
    """Whether every process raises this error at the same place, or there is only this one."""
    return alone() or isinstance(error, (SharedError, Interrupted, SystemExit))


def _inbox(index: int) -> str:
    return f"{ROOT}/error for {index}"


def _listen() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: JAX aborts
        error = client().blocking_key_value_get(_inbox(jax.process_index()), _FOREVER_MS)
        if error and _reported.acquire(blocking=False):
            os.write(2, f"error: {error}\n".encode())
            _exit(2)


def _fail(error: BaseException) -> NoReturn:
    """Tells the user and the other processes, and exits."""
    summary, status = (str(error).splitlines() or [""])[0][:1000], 2
    own = isinstance(error, (UserError, KeyboardInterrupt)) or not _LOST.search(summary)
    if not own and not _reported.locked():
        # A collective is the first to notice that a process is gone. Soon that process reports its
        # error, or JAX misses its heartbeats, names it and aborts.
        print(f"error: lost connection to another process: {summary}", file=sys.stderr, flush=True)
        time.sleep(session.heartbeat + 5)
    if not _reported.acquire(blocking=False):
        threading.Event().wait()  # the listener is about to exit
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        summary, status = "interrupted", 130
    else:
        if session.debug:
            traceback.print_exception(error)
        print(f"error: {explain(error)}", file=sys.stderr)
        summary = f"{type(error).__name__}: {summary}"
    sys.stdout.flush()
    sys.stderr.flush()
    me = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone
        for index in set(range(jax.process_count())) - {me}:
            message = f"process {me} ({WHO}) failed: {summary}"
            client().key_value_set(_inbox(index), message, True)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """Exits when all processes have read the error."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().wait_at_barrier(f"{ROOT}/error read", _DELIVERY_MS)
        if jax.process_index() == 0:  # last, as JAX aborts the others when process 0 is gone
            time.sleep(0.5)
    os._exit(status)
