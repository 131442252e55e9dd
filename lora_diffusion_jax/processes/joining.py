"""How several processes become one program."""

import os
import sys
import threading
from typing import Any

import jax

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import roll_call
from lora_diffusion_jax.processes.agreement import check_same
from lora_diffusion_jax.processes.failing import watch_the_others
from lora_diffusion_jax.processes.session import LIMIT, name_of_this, session

# Set by launchers in every process of a job: how many there are
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


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
    session.limit = limit
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    if detect is None and not any(value is not None for value in given.values()):
        detect = any(_number(name, name) not in (None, 1) for name in _LAUNCHERS)
    if detect:
        _initialize(limit)
    elif any(value is not None for value in given.values()):
        _join_explicitly(given, limit)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _check_versions()
        watch_the_others()


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
    # SIGTERM is ours: JAX's own notifier would take it away from interrupts.py.
    jax.config.update("jax_enable_preemption_service", False)
    told = threading.Timer(limit, _say_too_late, (limit,))
    told.daemon = True
    told.start()
    try:
        jax.distributed.initialize(initialization_timeout=int(limit) + 2, **given)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"JAX could not join the processes ({(str(error).splitlines() or ['no reason'])[0]}). "
            "Where there is no Slurm, Open MPI, Kubernetes or TPU pod to find them by, give "
            "--coordinator_address, --num_processes and --process_id."
        ) from error
    finally:
        told.cancel()


def _say_too_late(limit: float) -> None:
    text = (
        f"error: not all processes joined within {limit:.0f} s ({name_of_this()} did). See that every "
        "one was started and that they reach the first one's host.\n"
    )
    os.write(2, text.encode())
    os._exit(2)


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
