"""Processes tell one another things and wait for one another, within a time limit."""

import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.session import (
    ROOT,
    SharedError,
    alone,
    coordination_client,
    is_leader,
    session,
)

_SLICE = 5.0  # seconds of one call of the coordination service; between them signals are heard

Result = TypeVar("Result")


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
    limit = session.limit if limit is None else limit
    folder, serial = f"{ROOT}/exchange/{name}", session.serial[name]
    prefix = f"{folder}/{serial}"
    session.serial[name] += 1
    client = coordination_client()
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
    if serial and is_leader():  # all are past the one before
        client.key_value_delete(f"{folder}/{serial - 1}")
    return texts


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
