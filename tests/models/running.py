"""How the tests run networks: compiled, but without the optimisations that take longer than the run."""

from collections.abc import Callable

import jax


def run_once(function: Callable) -> Callable:
    """jit for programs that run a few times: without XLA's own optimisations the wait is half."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
