"""Processes end together: what ends one is told by the others, within seconds."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.interrupts import Interrupted
from lora_diffusion_jax.processes.lifelines import Lifelines
from lora_diffusion_jax.processes.session import (
    ROOT,
    SharedError,
    alone,
    coordination_client,
    coordinator_host,
    is_leader,
    name_of_this,
    session,
)

_WATCH_SECONDS = 1.0


def watch_the_others() -> None:
    """Starts the thread that ends this process soon after another has failed."""
    client, key = coordination_client(), f"{ROOT}/lifelines"
    lines = Lifelines(
        jax.process_index(),
        jax.process_count(),
        coordinator_host(),
        publish=lambda text: client.key_value_set(key, text),
        find=lambda: client.blocking_key_value_get(key, int(session.limit * 1000)),
    )
    session.watch = threading.Thread(target=_watch, args=(lines,), daemon=True)
    session.watch.start()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error of the work inside ends the other processes too, and they say whose it was.

    Without it they would wait for this one in the middle of a step.
    """
    try:
        yield
        _leave()
    except SharedError:
        _leave()
        raise
    except UserError as error:
        if alone():
            raise
        print(f"error: {error}", file=sys.stderr)
        _fail(str(error), 2)
    except (Interrupted, SystemExit):  # all have agreed on it
        _leave()
        raise
    except KeyboardInterrupt:
        if alone():
            raise
        _fail("it was interrupted", 130)
    except Exception as error:
        if alone():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            if session.told.wait(3 * _WATCH_SECONDS):  # another failed, and that was said
                session.watch.join()  # it ends this process
            print(
                f"error: the processes lost one another: {_first_line(error)}. One of them was "
                "killed, or its connection is cut; look at the output of the others. Started again, "
                "the same command goes on from the last checkpoint.",
                file=sys.stderr,
            )
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {_first_line(error)}", 1)


def _leave() -> None:
    """Says goodbye to the others, so that they do not take this process's end for a death."""
    session.ended.set()
    if session.watch is not None:
        session.watch.join(5 * _WATCH_SECONDS)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _fail(message: str, status: int) -> None:
    """Ends this process, and lets the others know why."""
    session.ended.set()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        coordination_client().key_value_set(
            f"{ROOT}/failed/{jax.process_index()}", f"({name_of_this()}): {message}"
        )
        if is_leader():  # the coordination service ends with it: first the others must have read
            time.sleep(3 * _WATCH_SECONDS)
    except jax.errors.JaxRuntimeError:
        pass  # the service is gone, and with it the others
    os._exit(status)


def begin_step(number: int | None) -> None:
    """Notes that the program begins a step that others take part in; None: it leaves the steps.

    When none follows within the limit, a warning says how far each process is.
    """
    session.begun = number or 0
    session.moved_at = None if number is None else time.monotonic()


def _watch(lines: Lifelines) -> None:
    """Ends this process soon after another has failed; says who holds up the steps."""
    client = coordination_client()
    while not session.ended.wait(_WATCH_SECONDS):
        lost = lines.lost()
        try:
            for index in lost:
                client.key_value_set(f"{ROOT}/lost/{index}", "", True)
            lost = lost or [_last(key) for key, _ in client.key_value_dir_get(f"{ROOT}/lost/")]
            failed = client.key_value_dir_get(f"{ROOT}/failed/")  # last: it is written first
            if not failed and not lost and _is_held_up():
                _say_who_is_behind(client)
        except jax.errors.JaxRuntimeError:
            if not lost:
                break  # JAX itself ends processes that lost the service
            failed = []
        if (failed or lost) and not session.ended.is_set():
            _end_with_the_others(failed, lost)
    lines.say_goodbye()


def _last(key: str) -> int:
    """The process's number at the end of a key."""
    return int(key.rsplit("/", 1)[-1])


def _end_with_the_others(failed: list[tuple[str, str]], lost: list[int]) -> None:
    """Says whose end it was, and ends this process."""
    if failed:
        text = f"process {_last(failed[0][0])} stopped {failed[0][1]}"
    else:
        text = (
            f"process {', '.join(map(str, lost))} was killed, or its machine is gone; look at its "
            "output. Started again, the same command goes on from the last checkpoint."
        )
    os.write(2, f"error: {text}\n".encode())
    session.told.set()
    if is_leader():  # the coordination service ends with it: first the others must have read
        time.sleep(3 * _WATCH_SECONDS)
    os._exit(2)


def _is_held_up() -> bool:
    return session.moved_at is not None and time.monotonic() - session.moved_at > session.limit


def _say_who_is_behind(client: Any) -> None:
    """Compares the steps begun; the others write theirs here when they are held up, too."""
    prefix = f"{ROOT}/begun/"
    client.key_value_set(f"{prefix}{jax.process_index()}", str(session.begun), True)
    session.moved_at = time.monotonic()  # say it again after as long
    time.sleep(2 * _WATCH_SECONDS)
    begun = {_last(key): text for key, text in client.key_value_dir_get(prefix)}
    told = ", ".join(f"process {i} {begun.get(i, 'no answer')}" for i in range(jax.process_count()))
    if is_leader():
        text = f"warning: no step has ended for {session.limit:.0f} s. Steps begun: {told}.\n"
        os.write(2, text.encode())
