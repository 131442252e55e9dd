"""Freed memory is kept: the next allocation touches no new pages."""

import os
import platform
import statistics
import subprocess
import sys

import pytest

# 256 MiB, touched and freed in a thread, as XLA does; prints the page faults of the second time. With
# several cores, in the main thread.
PROGRAM = """
import ctypes, os, resource, sys, threading
several = sys.argv[1] == "several"
if not several:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lora_diffusion_jax import memory
print(memory.keep_freed_memory())
libc, size = ctypes.CDLL(None), 2**28
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if several:
        use()
    else:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def second_time(cores: str, **variables: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cores],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize("cores", ["one", "several"])
def test_second_allocation_touches_no_new_pages(monkeypatch, cores):
    for name in (
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_MAX_",
        "MALLOC_ARENA_MAX",
        "GLIBC_TUNABLES",
    ):
        monkeypatch.delenv(name, raising=False)
    kept, faults = second_time(cores)
    if not kept:
        pytest.skip("there is an accelerator")
    assert faults < 1000
    kept, more = second_time(cores, MALLOC_ARENA_MAX="8")  # of the user: left alone
    assert not kept
    assert more > 10 * max(faults, 1)


# 64 MiB between two kernels, allocated by JAX; prints the page faults of each call.
COMPILED = """
import resource
from lora_diffusion_jax import memory
print(memory.keep_freed_memory())
memory.allocate_in_caller()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: jnp.cos(jax.lax.optimization_barrier(jnp.sin(x))).max())
x = jnp.ones(2**24)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(11)])
"""


def median_faults(**variables: str) -> tuple[bool, float]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**clean, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, *faults = done.stdout.split()
    return kept == "True", statistics.median(map(int, faults))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_programs_of_jax_reuse_their_memory():
    kept, faults = median_faults()
    if not kept:
        pytest.skip("there is an accelerator")
    kept, more = median_faults(MALLOC_ARENA_MAX="8")  # of the user: left alone
    assert not kept
    assert more > 10 * max(faults, 1)
