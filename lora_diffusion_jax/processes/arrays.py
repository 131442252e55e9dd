"""Arrays between the hosts and the devices of all processes."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

SHORT = 0.005  # seconds between looks at whether the devices are done


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array that all processes hold alike -> a global array, each device taking its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """A global array, however it is laid out -> the whole of it on the host, in every process.

    Python hears no signal while it waits inside JAX: short sleeps let it.
    """
    while not array.is_ready():
        time.sleep(SHORT)
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
