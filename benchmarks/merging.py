"""Programs with `xla_options.merge_kernels` beside the same without, on CPU; one JSON line a program.

    python -m benchmarks.merging [--size=digits] [--rounds=9]

Each kind is compiled in a process of its own, whose XLA_FLAGS differ; this one loads both and calls them
in turn. `ratio` is the median of the time with merged kernels over that without, `compile` the ratio of the
seconds of processor time that compilation took. Sizes as in benchmarks/cpu.py.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import time
from typing import Any

from lora_diffusion_jax import memory, xla_options

if __name__ == "__main__":  # before the threads of the imports below
    memory.keep_freed_memory()

import jax
from jax.experimental import serialize_executable

from benchmarks.cpu import BATCH, config_of, machine
from benchmarks.gpu import programs
from benchmarks.network import ratio

FLAGS = {"merged": xla_options.MERGED, "apart": "xla_none"}


def lower(size: str) -> dict[str, tuple[Any, tuple]]:
    """The lowered sampler and training step, with arguments."""
    made = programs(config_of(size))
    return {
        name: (jax.jit(function).lower(*given), given) for name, (function, given) in made.items()
    }


def compiled(size: str, extra: str) -> dict[str, tuple[bytes, float]]:
    """In a new process: each program, compiled, and how long that took in seconds of processor time."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_options.OPTION}{extra}"
    jax.config.update("jax_enable_compilation_cache", False)
    made = {}
    for name, (lowered, _) in lower(size).items():
        start = time.process_time()
        program = lowered.compile()
        made[name] = (serialize_executable.serialize(program)[0], time.process_time() - start)
    return made


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="digits", choices=BATCH)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        made = {
            name: pool.submit(compiled, args.size, extra).result() for name, extra in FLAGS.items()
        }
    for what, (lowered, given) in lower(args.size).items():
        trees = lowered.in_tree, lowered.out_tree
        programs = [
            serialize_executable.deserialize_and_load(made[n][what][0], *trees) for n in FLAGS
        ]
        calls = [functools.partial(program, *given) for program in programs]
        line = {
            "benchmark": "merging",
            **machine(),
            "size": args.size,
            "what": what,
            "ratio": round(ratio(*calls, args.rounds), 3),
            "compile": round(made["merged"][what][1] / made["apart"][what][1], 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
