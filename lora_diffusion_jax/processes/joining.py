"""Starts jax.distributed."""

import asyncio
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import check_in
from lora_diffusion_jax.processes.agreement import alone, check_same, session
from lora_diffusion_jax.processes.ending import explain_aborts

# The number of processes, set by launchers in each of them
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    detect: bool | None = None,
    limit: float = session.limit,
    heartbeat_timeout_seconds: float = session.heartbeat,
    folder: str | os.PathLike | None = None,
) -> None:
    """Makes this process one of several, or does nothing if it is alone. Call it before other JAX.

    Args:
        address: HOST:PORT of process 0; default: JAX_COORDINATOR_ADDRESS.
        count: number of processes; default: JAX_NUM_PROCESSES.
        index: number of this process; default: JAX_PROCESS_ID.
        detect: let JAX find address, count and index (TPU pods, Slurm, Open MPI, Kubernetes). None:
            inside a Slurm step or an Open MPI job of more than one process.
        limit: seconds that processes wait for one another, here and later.
        heartbeat_timeout_seconds: a process that JAX has not heard for so long is dead, and ends all.
        folder: the workdir, which all processes share: a secret in it keeps strangers out of the start.

    Raises:
        UserError: an argument is missing or invalid, or other processes did not come.
        SharedError: the processes have different versions of JAX or Python.
    """
    if not (0 < limit < 1e6 and 1 <= heartbeat_timeout_seconds < 1e6):
        raise UserError(
            f"Invalid --process_timeout={limit} or --heartbeat_timeout={heartbeat_timeout_seconds}; "
            "expected more than 0 s and at least 1 s."
        )
    session.limit, session.heartbeat = limit, math.ceil(heartbeat_timeout_seconds)
    given = {
        "coordinator_address": address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _integer("JAX_NUM_PROCESSES") if count is None else count,
        "process_id": _integer("JAX_PROCESS_ID") if index is None else index,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if detect is None and len(missing) == 3:
        detect = any(_integer(name) not in (None, 1) for name in _LAUNCHERS)
    if detect:
        _initialize(limit)
    elif not missing and given["num_processes"] != 1:
        _join_explicitly(given, limit, Path(folder).absolute() if folder else None)
    elif len(missing) in (1, 2):
        raise UserError(
            f"Missing {' and '.join(missing)}: several processes need --coordinator_address=HOST:PORT "
            "of process 0, --num_processes and --process_id (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
        )
    if not alone():
        versions = f"jax {jax.__version__}, Python {'.'.join(map(str, sys.version_info[:2]))}"
        check_same("The installation", versions)


def _integer(variable: str) -> int | None:
    text = os.environ.get(variable) or None
    if text and not text.isdecimal():
        raise UserError(f"{variable}={text} is not a whole number.")
    return text and int(text)


def _join_explicitly(given: dict[str, Any], limit: float, folder: Path | None) -> None:
    address, count, index = given.values()
    if not 0 <= index < count:
        raise UserError(
            f"Invalid --process_id={index}; expected 0 to {count - 1} (--num_processes - 1)."
        )
    deadline = time.monotonic() + limit
    if index > 0:
        asyncio.run(check_in.call(*_split(address), count, index, limit, folder))
    else:
        # One interface is enough; by default JAX listens on all of them.
        host, port = _split(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address)
        try:
            host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise UserError(f"Process 0 cannot resolve {host!r}: {error.strerror}.") from error
        asyncio.run(check_in.lead(host, port, count, limit, folder))
        given["coordinator_bind_address"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # All are there, so that the rest takes a second.
    left = max(deadline - time.monotonic(), 10.0)
    _initialize(left, cluster_detection_method="deactivate", **given)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"Invalid address {address!r} of process 0; expected HOST:PORT.")
    return host.strip("[]"), int(port)


def _initialize(limit: float, **given: Any) -> None:
    # SIGTERM is handled in interrupts.py; JAX's preemption service would take it.
    jax.config.update("jax_enable_preemption_service", False)
    explain_aborts()
    try:
        jax.distributed.initialize(
            initialization_timeout=math.ceil(limit),
            heartbeat_timeout_seconds=session.heartbeat,
            **given,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"JAX could not join the processes ({(str(error).splitlines() or ['no reason'])[0]}). "
            "Outside Slurm, Open MPI, Kubernetes and TPU pods, set --coordinator_address, "
            "--num_processes and --process_id."
        ) from error


def check_joined() -> None:
    """Raises UserError if JAX sees other processes that this one was not joined with."""
    if not jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"This is one of {jax.process_count()} hosts of a pod, but the processes were not joined; "
            "add --distributed to the command on every host."
        )
