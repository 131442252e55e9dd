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
DEV, PCI = Path("/dev"), Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # PCI vendor
_DISKS_AND_NETWORK = ("0x01", "0x02")  # PCI classes
_MEMORY_SHARE = 0.9  # of a GPU, for all runs on it together


def visible(
    environment: Mapping[str, str], dev: Path = DEV, pci: Path = PCI
) -> tuple[str, list[str]]:
    """('gpu' or 'tpu', the names of the devices), or ('cpu', []); `dev` and `pci` are the system's."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")[0]
    for kind, variable, pattern, words in (
        ("gpu", "CUDA_VISIBLE_DEVICES", r"nvidia(\d+)", ("", "cuda", "gpu")),
        ("tpu", "TPU_VISIBLE_CHIPS", r"accel(\d+)", ("", "tpu")),
    ):
        if platforms not in words:
            continue
        if variable in environment:
            found = [name for name in environment[variable].split(",") if name not in ("", "-1")]
        else:
            count = sum(re.fullmatch(pattern, path.name) is not None for path in dev.glob("*"))
            if kind == "tpu" and not count:
                count = _chips_behind_vfio(dev, pci)
            found = [str(number) for number in range(count)]
        if found:
            return kind, found
    return "cpu", []


def _chips_behind_vfio(dev: Path, pci: Path) -> int:
    """How many of /dev/vfio/N are TPU chips: any device that is handed on to a program is listed there.

    On the PCI bus they are Google's devices, as JAX finds them, but for its disks and network cards.
    """
    nodes = sum(path.name.isdecimal() for path in dev.glob("vfio/*"))
    chips = 0
    for device in pci.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        chips += vendor == _GOOGLE and not kind.startswith(_DISKS_AND_NETWORK)
    return min(nodes, chips)


def slots(
    jobs: int | None,
    environment: Mapping[str, str] = os.environ,
    dev: Path = DEV,
    pci: Path = PCI,
) -> list[Environment]:
    """For each of the runs at a time, the environment variables that it is started with.

    One run sees all devices. Several share the devices out: each has one or more of its own, or, if they
    outnumber the GPUs, a part of one GPU's memory.

    Args:
        jobs: how many runs at a time; None: one per device.
        environment: of this process.
        dev: where the system lists devices.
        pci: where it lists those on the PCI bus.

    Raises:
        UserError: `jobs` is less than 1, or TPU chips cannot be shared out so.
    """
    check_jobs(jobs)
    kind, names = visible(environment, dev, pci)
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
