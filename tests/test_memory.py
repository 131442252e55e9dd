"""Freed memory is kept: the next allocation touches no new pages."""

import os
import platform
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
