"""Values and waiting between processes, through JAX's coordination service and without devices."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.threads import in_thread

ROOT = "lora_diffusion_jax"  # prefix of our keys and barriers in the coordination service

Result = TypeVar("Result")


class SharedError(UserError):
    """An error that every process raises at the same place; process 0 alone prints it."""


@dataclasses.dataclass
class Session:
    """Settings and counters of this process."""

    limit: float = 300.0  # seconds to wait for the other processes
    heartbeat: int = 15  # seconds of silence after which JAX considers a process dead
    debug: bool = False  # print tracebacks
    exchanges: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


session = Session()


def alone() -> bool:
    """Whether this is the only process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_leader() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return alone() or jax.process_index() == 0


def client() -> Any:
    """JAX's client of the coordination service."""
    from jax._src import distributed  # no public name; orbax reads it here as well

    return distributed.global_state.client


def exchange(name: str, text: str, limit: float | None = None) -> list[str]:
    """Collects one text from each process.

    Args:
        name: what the processes wait for, the same in all; for messages.
        text: this process's contribution.
        limit: seconds to wait; None: the limit given to `join`.

    Returns:
        The texts by process number.

    Raises:
        UserError: some processes did not come in time; it names them.
    """
    if alone():
        return [text]
    limit = session.limit if limit is None else limit
    # Keys and barriers of the service serve once: the nth exchange of a name has its own.
    number = session.exchanges[name]
    session.exchanges[name] += 1
    folder = f"{ROOT}/{name}/{number}/"
    client().key_value_set(f"{folder}{jax.process_index()}", text)
    try:
        in_thread(client().wait_at_barrier, folder, int(limit * 1000))
    except jax.errors.JaxRuntimeError as error:
        late = sorted(set(range(jax.process_count())) - _texts(folder).keys())
        if not late:  # all came: the service itself failed
            raise
        raise UserError(
            f"Waited {limit:.0f} s for process {', '.join(map(str, late))} of {jax.process_count()} at: "
            f"{name}. It is gone, stuck or slow; see its output. Rerun the same command to resume from "
            "the last checkpoint, with a larger --process_timeout if it is slow."
        ) from error
    texts = _texts(folder)
    if number and is_leader():  # every process has read the previous exchange
        client().key_value_delete(f"{ROOT}/{name}/{number - 1}/")
    return [texts[i] for i in range(jax.process_count())]


def _texts(folder: str) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): text for key, text in client().key_value_dir_get(folder)}


def barrier(name: str, limit: float | None = None) -> None:
    """Waits until all processes have come here; see `exchange`."""
    exchange(name, "", limit)


def from_leader(name: str, work: Callable[[], Result], limit: float | None = None) -> Result:
    """Calls `work` in process 0 alone; all processes return its result, made of JSON types.

    Raises:
        SharedError: in all processes, if `work` raised a UserError.
    """
    if alone():
        return work()
    outcome: dict[str, Any] = {}
    if is_leader():
        try:
            outcome = {"result": work()}
        except UserError as error:  # any other error ends all processes by `ending_together`
            outcome = {"error": str(error)}
    outcome = json.loads(exchange(name, json.dumps(outcome), limit)[0])
    if "error" in outcome:
        raise SharedError(outcome["error"])
    return outcome["result"]


def check_same(name: str, text: str) -> None:
    """Raises SharedError unless this text is the same in all processes."""
    first, *others = exchange(name, text)
    for index, other in enumerate(others, 1):
        if other != first:
            # Long texts: a window from shortly before the first difference.
            start = max(len(os.path.commonprefix((first, other))) - 60, 0)
            ours, theirs = (repr(x[start : start + 120]) for x in (first, other))
            raise SharedError(
                f"{name} differs between processes: {ours} in process 0, {theirs} in process {index}. "
                "Start all with the same command and the same installation."
            )
