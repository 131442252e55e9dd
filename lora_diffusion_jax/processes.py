"""Several processes as one program: joining, agreeing within a time limit, failing together."""

import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lora_diffusion_jax import roll_call
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lifelines import Lifelines

LIMIT = 300.0  # seconds that a process waits for the others
_ROOT = "lora_diffusion_jax"
_SLICE = 5.0  # seconds of one call of the coordination service; between them signals are heard
_WATCH_SECONDS = 1.0
# Set by launchers in every process of a job: (variable, what it is to be parsed as a number)
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

Result = TypeVar("Result")


class SharedError(UserError):
    """A mistake that every process knows of and stops for; process 0 tells the user."""


class _Session:
    """What this process knows of the others."""

    def __init__(self):
        self.limit = LIMIT
        self.serial: collections.Counter[str] = collections.Counter()
        self.ended = threading.Event()  # as it should, or by an error that the others are told
        self.watch: threading.Thread | None = None
        self.begun = 0  # steps
        self.moved_at: float | None = None  # when the last step was begun


_session = _Session()


# Joining.


def join(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    detect: bool | None = None,
    limit: float = LIMIT,
) -> None:
    """Makes this process one of several, before JAX does anything else; alone, it does nothing.

    Args:
        address: HOST:PORT of process 0; default: JAX_COORDINATOR_ADDRESS.
        count: number of processes; default: JAX_NUM_PROCESSES.
        index: this one's number; default: JAX_PROCESS_ID.
        detect: let JAX find address, count and index (TPU pods, Slurm, Open MPI, Kubernetes). None:
            inside a Slurm step or an Open MPI job of more than one process.
        limit: seconds that processes wait for one another, here and later.

    Raises:
        UserError: some of the three are missing, or the others are.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("num_processes", "JAX_NUM_PROCESSES") if count is None else count
    index = _number("process_id", "JAX_PROCESS_ID") if index is None else index
    if not limit > 0:
        raise UserError(f"The processes' time limit is {limit} s; it must be above 0.")
    _session.limit = limit
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    if detect is None and not any(value is not None for value in given.values()):
        detect = any(_number(name, name) not in (None, 1) for name in _LAUNCHERS)
    if detect:
        _initialize(limit)
    elif any(value is not None for value in given.values()):
        _join_explicitly(given, limit)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _check_versions()
        lines = _tie_lifelines()
        _session.watch = threading.Thread(target=_watch, args=(lines,), daemon=True)
        _session.watch.start()


def _number(name: str, variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{variable}={text} ({name}) is not a whole number.")
    return int(text)


def _join_explicitly(given: dict[str, Any], limit: float) -> None:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator_address=HOST:PORT "
            "(of process 0), --num_processes=N and --process_id=I, or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        )
    address, count, index = given.values()
    if count < 1:
        raise UserError(f"num_processes is {count}; it must be at least 1.")
    if count == 1:
        return
    roll_call.answer(address, count, index, limit, _versions())
    _initialize(
        limit,
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
    )


def _versions() -> dict[str, str]:
    return {
        "The version of jax": jax.__version__,
        "Python": ".".join(map(str, sys.version_info[:2])),
    }


def _initialize(limit: float, **given: Any) -> None:
    """jax.distributed.initialize, which ends the process by itself when its time is up."""
    # SIGTERM is ours: JAX's own notifier would take it away from training/interrupts.py.
    jax.config.update("jax_enable_preemption_service", False)
    told = threading.Timer(limit, _say_too_late, (limit,))
    told.daemon = True
    told.start()
    try:
        jax.distributed.initialize(initialization_timeout=int(limit) + 2, **given)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"JAX could not join the processes: {str(error).splitlines()[0]} Give "
            "--coordinator_address, --num_processes and --process_id where there is no Slurm, Open "
            "MPI, Kubernetes or TPU pod to find them by."
        ) from error
    finally:
        told.cancel()


def _say_too_late(limit: float) -> None:
    text = (
        f"error: not all processes joined within {limit:.0f} s ({_me()} did). See that every one was "
        "started and that they reach the first one's host.\n"
    )
    os.write(2, text.encode())
    os._exit(2)


def _me() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _tie_lifelines() -> Lifelines:
    client, key = _client(), f"{_ROOT}/lifelines"
    return Lifelines(
        jax.process_index(),
        _coordinator().rpartition(":")[0].strip("[]"),
        publish=lambda port: client.key_value_set(key, str(port)),
        find=lambda: int(client.blocking_key_value_get(key, int(_session.limit * 1000))),
    )


def _check_versions() -> None:
    for name, value in _versions().items():
        check_same(name, value)


def check_joined() -> None:
    """Raises UserError in a process that has others beside it which it was not joined with."""
    if not jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"This is one of {jax.process_count()} processes on a pod, but they were not joined; add "
            "--distributed to the command, on every host."
        )


# Agreeing.


def alone() -> bool:
    """Whether there is only this process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_leader() -> bool:
    """Whether this is process 0, which writes files and speaks."""
    return alone() or jax.process_index() == 0


def exchange(name: str, text: str, limit: float | None = None) -> list[str]:
    """Gives every process the texts of all, by number; returns when the last has come here.

    Runs over JAX's coordination service, on the host: no device takes part, and a time limit holds.

    Args:
        name: what is waited for, for messages.
        text: of this process.
        limit: seconds; None: as given to `join`.

    Raises:
        UserError: naming the processes that did not come.
    """
    if alone():
        return [text]
    limit = _session.limit if limit is None else limit
    prefix = f"{_ROOT}/exchange/{name}/{_session.serial[name]}"
    _session.serial[name] += 1
    client = _client()
    client.key_value_set(f"{prefix}/{jax.process_index()}", text)
    deadline = time.monotonic() + limit
    texts = [_get(client, f"{prefix}/{i}", deadline) for i in range(jax.process_count())]
    missing = [str(i) for i, found in enumerate(texts) if found is None]
    if missing:
        raise UserError(
            f"Waited {limit:.0f} s for process {', '.join(missing)} of {jax.process_count()} at: "
            f"{name}. They are stuck, slower by more than that (--process_timeout), or gone; look at "
            "their output. Started again, the same command goes on from the last checkpoint."
        )
    return texts


def _client() -> Any:
    # Without a public name; orbax reads it at the same place.
    from jax._src import distributed

    return distributed.global_state.client


def _coordinator() -> str:
    from jax._src import distributed

    return distributed.global_state.coordinator_address


def _get(client: Any, key: str, deadline: float) -> str | None:
    """The value of a key, as soon as it is there; None after the deadline."""
    while True:
        left = max(deadline - time.monotonic(), 0.01)
        try:
            return client.blocking_key_value_get(key, int(min(left, _SLICE) * 1000) + 1)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() >= deadline:
                return None


def barrier(name: str, limit: float | None = None) -> None:
    """Returns when all processes have come here; see `exchange`."""
    exchange(name, "", limit)


def from_leader(name: str, work: Callable[[], Result], limit: float | None = None) -> Result:
    """Does work in process 0 alone and gives its result, made of JSON types, to all.

    Raises:
        SharedError: in all processes, when the work raised a UserError.
    """
    if alone():
        return work()
    message = ""
    if is_leader():
        try:
            message = json.dumps({"result": work()})
        except UserError as error:
            message = json.dumps({"error": str(error)})
    outcome = json.loads(exchange(name, message, limit)[0])
    if "error" in outcome:
        raise SharedError(outcome["error"])
    return outcome["result"]


def all_true(name: str, flag: bool) -> bool:
    """Whether the flag is true in every process."""
    return all(text == "1" for text in exchange(name, "1" if flag else "0"))


def check_same(name: str, text: str) -> None:
    """Raises SharedError unless this text is the same in all processes."""
    texts = exchange(name, text)
    for index, other in enumerate(texts):
        if other != texts[0]:
            raise SharedError(
                f"{name} differs between processes: {_shortened(texts[0], other)} in process 0, "
                f"{_shortened(other, texts[0])} in process {index}. Start all with the same command."
            )


def _shortened(text: str, other: str, around: int = 60) -> str:
    """The text near where it first differs from the other."""
    start = len(os.path.commonprefix((text, other)))
    part = text[max(start - around, 0) : start + around]
    return repr(part if len(part) == len(text) else f"...{part}...")


# Arrays.


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array that all processes hold alike -> a global array, each device taking its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """A global array, however it is laid out -> the whole of it on the host, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


# Failing.


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
    except Exception as error:
        if alone():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(3 * _WATCH_SECONDS)  # if another failed, we shall hear why, and end here
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
    _session.ended.set()
    if _session.watch is not None:
        _session.watch.join(5 * _WATCH_SECONDS)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _fail(message: str, status: int) -> None:
    """Ends this process, and lets the others know why."""
    _session.ended.set()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _client().key_value_set(f"{_ROOT}/failed/{jax.process_index()}", f"({_me()}): {message}")
        if is_leader():  # the coordination service ends with it: first the others must have read
            time.sleep(3 * _WATCH_SECONDS)
    except jax.errors.JaxRuntimeError:
        pass  # the service is gone, and with it the others
    os._exit(status)


def begin_step(number: int | None) -> None:
    """Notes that the program begins a step that others take part in; None: it leaves the steps.

    When none follows within the limit, a warning says how far each process is.
    """
    _session.begun = number or 0
    _session.moved_at = None if number is None else time.monotonic()


def _watch(lines: Lifelines) -> None:
    """Ends this process soon after another has failed; says who holds up the steps."""
    client = _client()
    while not _session.ended.wait(_WATCH_SECONDS):
        lost = lines.lost()
        try:
            for index in lost:
                client.key_value_set(f"{_ROOT}/lost/{index}", "", True)
            failed = client.key_value_dir_get(f"{_ROOT}/failed/")
            lost = lost or [_last(key) for key, _ in client.key_value_dir_get(f"{_ROOT}/lost/")]
            if not failed and not lost and _is_held_up():
                _say_who_is_behind(client)
        except jax.errors.JaxRuntimeError:
            if not lost:
                return  # JAX itself ends processes that lost the service
            failed = []
        if (failed or lost) and not _session.ended.is_set():
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
    if is_leader():  # the coordination service ends with it: first the others must have read
        time.sleep(3 * _WATCH_SECONDS)
    os._exit(2)


def _is_held_up() -> bool:
    return _session.moved_at is not None and time.monotonic() - _session.moved_at > _session.limit


def _say_who_is_behind(client: Any) -> None:
    """Compares the steps begun; the others write theirs here when they are held up, too."""
    prefix = f"{_ROOT}/begun/"
    client.key_value_set(f"{prefix}{jax.process_index()}", str(_session.begun), True)
    _session.moved_at = time.monotonic()  # say it again after as long
    time.sleep(2 * _WATCH_SECONDS)
    begun = {_last(key): text for key, text in client.key_value_dir_get(prefix)}
    told = ", ".join(f"process {i} {begun.get(i, 'no answer')}" for i in range(jax.process_count()))
    if is_leader():
        text = f"warning: no step has ended for {_session.limit:.0f} s. Steps begun: {told}.\n"
        os.write(2, text.encode())
