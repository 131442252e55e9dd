"""Arrays between the hosts and the devices of all processes."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from lora_diffusion_jax.processes.threads import in_thread

T = TypeVar("T")


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array that is equal in all processes -> a global array; each device takes its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_rows(array: np.ndarray, size: int, sharding: Sharding) -> jax.Array:
    """The rows of a host array as `place` has them, the last one repeated so that there are `size`."""
    return place(array[np.minimum(np.arange(size), len(array) - 1)], sharding)


def call(program: Callable[..., T], *args: Any) -> T:
    """program(*args), whose arrays `fetch` waits for; signals are handled meanwhile.

    Where JAX runs programs in the thread that calls them (`memory.allocate_in_caller`), that is another
    thread than this.
    """
    if jax.config.read("jax_cpu_enable_async_dispatch"):
        return program(*args)
    return in_thread(program, *args)


def fetch(array: jax.Array) -> np.ndarray:
    """A global array with any sharding -> the whole array on the host of every process."""
    while not array.is_ready():  # type: ignore[attr-defined]  # Python handles no signal while it waits inside JAX
        time.sleep(0.005)
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
