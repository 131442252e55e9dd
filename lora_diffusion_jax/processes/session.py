"""What this process knows of the others, and the coordination service that all share."""

import collections
import os
import socket
import threading
from typing import Any

import jax

from lora_diffusion_jax.errors import UserError

LIMIT = 300.0  # seconds that a process waits for the others
ROOT = "lora_diffusion_jax"  # of the keys in the coordination service


class SharedError(UserError):
    """A mistake that every process knows of and stops for; process 0 tells the user."""


class Session:
    """The part of one process in a job."""

    def __init__(self):
        self.limit = LIMIT
        self.serial: collections.Counter[str] = collections.Counter()  # exchanges so far, by name
        self.watch: threading.Thread | None = None
        self.ended = threading.Event()  # as it should, or by an error that the others are told
        self.told = threading.Event()  # the user heard that another process failed
        self.begun = 0  # steps
        self.moved_at: float | None = None  # when the last step was begun


session = Session()


def alone() -> bool:
    """Whether there is only this process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_leader() -> bool:
    """Whether this is process 0, which writes files and speaks."""
    return alone() or jax.process_index() == 0


def name_of_this() -> str:
    """Where to look for this process."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def coordination_client() -> Any:
    """JAX's client of the coordination service."""
    # Without a public name; orbax reads it at the same place.
    from jax._src import distributed

    return distributed.global_state.client


def coordinator_host() -> str:
    """The host of process 0, as JAX knows it."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
