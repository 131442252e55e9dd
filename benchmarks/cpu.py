"""Sampling and training on a CPU, beside the authors' PyTorch code in the same run.

    python -m benchmarks.cpu [--peer=FOLDER] [--compile] [--sizes=digits,small,full] [--rounds=7]

FOLDER is a checkout of the authors' code (lthilnklover/diffusion_lora); it needs PyTorch. Both sides
have equal networks and batches in float32 and take turns. One JSON line per measurement, the median of
the rounds in seconds; for the peer `ours_is_faster_by`, its time over ours. Under `taskset -c 0` it
measures one core. The peer runs in a process of its own, as memory.py changes the memory of this one.

full        the CIFAR-10 DDPM++ with LoRA, 57.7M parameters, batch 8
small       the same with two levels of 32 and 64 channels, 1.0M parameters, batch 16
digits      configs/digits.py, 1.0M parameters, batch 128

sampling    2 steps of Heun, 3 evaluations, latents to uint8 images
training    augmentation, loss, gradients, Adam, average of the weights
compile     seconds from a traced program to one that runs, without the cache
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import pathlib
from multiprocessing.connection import Connection
from typing import Any

from lora_diffusion_jax import host, memory, xla_options

if __name__ == "__main__":  # before the threads of the imports below
    memory.keep_freed_memory()
    xla_options.merge_kernels()

import jax
from ml_collections import ConfigDict

from benchmarks.gpu import Call, compare, ours, peer, some_of

WHAT = ("sampling", "training")
BATCH = {"digits": 128, "small": 16, "full": 8}
SIMD = ("avx512f", "avx2", "avx", "sse4_2", "asimd")  # best first; the last is ARM's


def config_of(size: str) -> ConfigDict:
    """The config of one of the sizes."""
    name = "digits" if size == "digits" else "cifar10_edm"
    config = importlib.import_module(f"configs.{name}").get_config()
    if size == "small":
        config.model.channels, config.model.channel_mult, config.model.num_blocks = 32, (1, 2), 1
    config.train.batch_size = config.sampler.batch_size = BATCH[size]
    config.sampler.num_steps = 2
    return config


def machine() -> dict[str, Any]:
    """The processor, its widest vector instructions, and the cores that this process may use."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name", "unknown"),
        "simd": next((name for name in SIMD if name in flags), "unknown"),
        "cores": host.usable_cores(),
    }


def peer_process(folder: str, size: str, compiled: bool) -> dict[str, Call]:
    """The calls of `benchmarks.gpu.peer`, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(folder, size, compiled, there), daemon=True).start()
    there.close()  # that an error over there ends `recv` here

    def call(what: str) -> None:
        here.send(what)
        here.recv()

    return {what: functools.partial(call, what) for what in ("sampling", "training")}


def serve(folder: str, size: str, compiled: bool, there: Connection) -> None:
    """Makes the calls that are asked for, until the other side has ended."""
    calls = peer(folder, config_of(size), "float32", compiled, "cpu")
    with contextlib.suppress(EOFError):
        while True:
            calls[there.recv()]()
            there.send(None)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile, too")
    parser.add_argument("--sizes", type=some_of(BATCH), default=list(BATCH))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--what", type=some_of(WHAT), default=list(WHAT))
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    memory.allocate_in_caller()  # as training does

    for size in args.sizes:
        config = config_of(size)
        calls, compiling = ours(config, "float32", args.what)
        sides = {"ours": calls}
        if args.peer:
            sides["eager"] = peer_process(str(args.peer), size, False)
        if args.peer and args.compile:
            sides["compile"] = peer_process(str(args.peer), size, True)
        about = {"benchmark": "cpu", **machine(), "size": size, "batch": config.train.batch_size}
        for what in args.what:
            took = compare({who: calls[what] for who, calls in sides.items()}, args.rounds)
            for who, spent in took.items():
                line = {**about, "what": what, "who": who, "seconds": round(spent, 4)}
                if who == "ours":
                    line["compile_seconds"] = round(compiling[what], 1)
                else:
                    line["ours_is_faster_by"] = round(spent / took["ours"], 3)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
