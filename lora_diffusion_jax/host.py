"""What the machine offers this process, told without importing JAX."""

import glob
import os

# of NVIDIA and AMD GPUs and of TPUs
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def has_accelerator() -> bool:
    """Whether there is one, as far as device files tell; any device that is handed on counts (vfio)."""
    return any(glob.glob(pattern) for pattern in ACCELERATORS)


def usable_cores() -> int:
    """How many cores this process may run on, by its affinity; the machine can have more."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
