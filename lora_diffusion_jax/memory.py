"""How glibc hands memory back to the system, which training on a CPU must not pay for at every step."""

import ctypes
import os

from lora_diffusion_jax import host

# mallopt(3): parameters of glibc's malloc
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_kept = False  # freed memory


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed for the next step; returns whether it does.

    XLA on CPU allocates the temporary arrays of a program at every call. glibc gets large blocks from
    the system and returns them at once, so that each step touches new pages, which took a tenth to a
    third of its time (docs/scaling.md). The memory of a process then stays at its highest.

    Only the main arena of malloc keeps blocks of any size. On one core it is the only one. On several,
    threads would wait for one another there; it is the main thread's, so `allocate_in_caller` helps.

    To be called before numpy and JAX are imported: the threads that they start get memory of their own,
    which this no longer affects. Does nothing where there is an accelerator, whose host has other work
    for its threads, where the user has set malloc's behaviour by environment variables, or without glibc.
    """
    global _kept
    if host.has_accelerator():
        return False
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    if any(name in os.environ for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    wanted = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # never, none
    if host.usable_cores() == 1:
        wanted[_ARENA_MAX] = 1
    _kept = all([mallopt(parameter, value) == 1 for parameter, value in wanted.items()])
    return _kept


def allocate_in_caller() -> None:
    """After `keep_freed_memory`, has JAX run a CPU's programs in the thread that calls them.

    To be called before JAX first looks for devices. Python handles no signal while its main thread
    runs a program: `processes.call` is for those that take longer than a training step.
    """
    if _kept:
        import jax  # only now: see above

        jax.config.update("jax_cpu_enable_async_dispatch", False)
