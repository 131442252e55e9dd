"""Which devices of this machine each run of a sweep sees, without using any of them.

A process that initialises JAX takes all devices that it sees. So the sweep itself looks into /dev alone,
and every run is started with the environment variables that show it its own.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lora_diffusion_jax.errors import UserError

Environment = dict[str, str]
_MEMORY_SHARE = 0.9  # of a GPU, for all runs on it together


def visible(environment: Mapping[str, str], dev: Path = Path("/dev")) -> tuple[str, list[str]]:
    """('gpu' or 'tpu', the names of the devices), or ('cpu', [])."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")[0]
    for kind, variable, pattern, words in (
        ("gpu", "CUDA_VISIBLE_DEVICES", r"nvidia(\d+)", ("", "cuda", "gpu")),
        ("tpu", "TPU_VISIBLE_CHIPS", r"accel(\d+)|vfio/(\d+)", ("", "tpu")),
    ):
        if platforms not in words:
            continue
        if variable in environment:
            found = [name for name in environment[variable].split(",") if name not in ("", "-1")]
        else:
            paths = [p.relative_to(dev).as_posix() for p in (*dev.glob("*"), *dev.glob("vfio/*"))]
            matches = filter(None, (re.fullmatch(pattern, path) for path in paths))
            count = len(list(matches))
            found = [str(number) for number in range(count)]
        if found:
            return kind, found
    return "cpu", []


def slots(
    jobs: int | None, environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev")
) -> list[Environment]:
    """For each of the runs at a time, the environment variables that it is started with.

    One run sees all devices. Several share the devices out: each has one or more of its own, or, if they
    outnumber the GPUs, a part of one GPU's memory.

    Args:
        jobs: how many runs at a time; None: one per device.
        environment: of this process.
        dev: where the system lists devices.

    Raises:
        UserError: `jobs` is less than 1, or TPU chips cannot be shared out so.
    """
    check_jobs(jobs)
    kind, names = visible(environment, dev)
    jobs = jobs or max(1, len(names))
    if jobs == 1 or not names:
        return [{} for _ in range(jobs)]
    if kind == "tpu":
        return _chips(jobs, names)
    if jobs > len(names):
        share = _MEMORY_SHARE / -(-jobs // len(names))
        more = {} if _sets_memory(environment) else {_FRACTION: f"{share:.3f}"}
        return [{"CUDA_VISIBLE_DEVICES": names[k % len(names)], **more} for k in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[k::jobs])} for k in range(jobs)]


def check_jobs(jobs: int | None) -> None:
    """Raises UserError for a number of runs at a time that is less than 1."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1.")


_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _sets_memory(environment: Mapping[str, str]) -> bool:
    return _FRACTION in environment or "XLA_PYTHON_CLIENT_PREALLOCATE" in environment


def _chips(jobs: int, names: list[str]) -> list[Environment]:
    """A chip of its own for each run: a process takes one chip, or all of the machine."""
    if jobs > len(names):
        raise UserError(
            f"--jobs is {jobs}, but this machine has {len(names)} TPU chips, which processes cannot share; "
            f"give at most {len(names)}."
        )
    one = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    return [{"TPU_VISIBLE_CHIPS": name, **one} for name in names[:jobs]]
