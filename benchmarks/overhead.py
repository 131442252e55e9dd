"""What checkpoints, logging and the input cost a training run: shares of its time, one JSON line.

python -m benchmarks.overhead [--config=digits|small] [--steps=40] [--rounds=5] [--data_dir=DIR]

digits  configs/digits.py, 1.0 M parameters
small   configs/cifar10_edm.py narrowed to what a CPU trains: 64 channels, one block, batch 32

checkpoint   a block of steps that begins with a checkpoint and ends when it is on disk, minus one
             without (alternating, median), over the time of 1,000 steps: an upper bound, since a
             run continues while the last bytes are written
log          the same for writing the line of an interval, at the config's own interval
input_wait   share of the time in which the loop waited for batches held in memory
stream       batches decoded from disk as they are needed, by threads and by two workers: images per
             second without training, and the share of the time in which training waited for them
"""

import argparse
import contextlib
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import compile_cache
from lora_diffusion_jax.factory.data import build_batches, complete, open_source
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables
from lora_diffusion_jax.factory.training import build_mesh, build_optimizer, build_step, trainable
from lora_diffusion_jax.training import loop, sharding, state
from lora_diffusion_jax.training.checkpoint import Checkpoints, to_parts
from lora_diffusion_jax.training.feed import Feed
from lora_diffusion_jax.training.metrics import to_scalars
from lora_diffusion_jax.training.writers import Writers

STEPS = 1_000  # that the shares refer to


def open_config(name: str, data_dir: str) -> tuple[ConfigDict, object]:
    """A config with its data set: (config, source)."""
    config = importlib.import_module(f"configs.{'digits' if name == 'digits' else 'cifar10_edm'}")
    config = config.get_config()
    if name == "small":
        config.model.channels = 64
        config.model.channel_mult = (1, 2)
        config.model.num_blocks = 1
        config.train.batch_size = 32
    config.data.data_dir = data_dir
    source = open_source(config)
    return complete(config, source), source


class Trainer:
    """The pieces of the training loop, run by hand."""

    def __init__(self, config: ConfigDict, source: object):
        self.config, self.mesh = config, build_mesh(config)
        denoiser, optimizer = build_denoiser(config), build_optimizer(config)
        self.feed = Feed(build_batches(config, source, self.mesh), self.mesh, 0)

        def init() -> state.TrainState:
            variables = init_variables(config, denoiser, jax.random.key(0))
            return state.create_state(variables, optimizer, trainable(config))

        layout = sharding.tree_sharding(jax.eval_shape(init), self.mesh)
        self.state = jax.jit(init, out_shardings=layout)()
        self.interval = loop.empty_metrics(self.mesh)
        self.key = jax.device_put(jax.random.key(1), sharding.replicated(self.mesh))
        program = loop.jit_step(build_step(config, denoiser, self.mesh), self.state, self.mesh)
        self.compiled = program.lower(
            self.state, self.interval, self.feed.data, self.feed.next(), self.key
        ).compile()

    def train(self, steps: int) -> None:
        """Some steps, to their end."""
        for _ in range(steps):
            self.state, self.interval, status = self.compiled(
                self.state, self.interval, self.feed.data, self.feed.next(), self.key
            )
            jax.block_until_ready(status)

    def log(self, writers: Writers, step: int) -> None:
        """Writes the line of an interval."""
        interval, bad = jax.device_get((self.interval, self.state.nonfinite_grads))
        writers.write(step, to_scalars(interval) | {"train/nonfinite_grads": float(bad)})
        self.interval = loop.empty_metrics(self.mesh)


def seconds(work: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def extra(plain: Callable[[], None], more: Callable[[], None], rounds: int) -> float:
    """Median of time(more) - time(plain), measured alternately."""
    return float(np.median([-seconds(plain) + seconds(more) for _ in range(rounds)]))


def costs(trainer: Trainer, steps: int, rounds: int) -> dict[str, float]:
    """Shares of checkpoint and log in STEPS steps, and what they were computed from."""
    trainer.train(3)
    numbers = iter(range(1, 10**6))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writers = stack.enter_context(Writers(Path(folder), trainer.config.train.batch_size, 0))
        checkpoints = stack.enter_context(Checkpoints(folder, keep=1))

        def plain() -> None:
            trainer.train(steps)

        def save() -> None:
            checkpoints.save(next(numbers), to_parts(trainer.state, trainer.interval))
            trainer.train(steps)
            checkpoints.wait()

        def log() -> None:
            trainer.train(steps)
            for _ in range(10):
                trainer.log(writers, next(numbers))

        save()  # the first one starts orbax's threads
        step = min(seconds(plain) for _ in range(rounds)) / steps
        saving = extra(plain, save, rounds)
        logging = extra(plain, log, rounds) / 10
    every = trainer.config.train.log_every / trainer.config.train.batch_size
    return {
        "step_seconds": step,
        "save_seconds": saving,
        "log_seconds": logging,
        "steps_per_log": every,
        "checkpoint": saving / (STEPS * step),
        "log": logging / (every * step),
    }


def input_wait(trainer: Trainer, steps: int) -> float:
    """Share of the time in which the loop waits for its batches."""
    trainer.train(3)
    before = trainer.feed.waited
    spent = seconds(lambda: trainer.train(steps))
    return (trainer.feed.waited - before) / spent


def rate(trainer: Trainer, batches: int = 100) -> float:
    """Images per second of the input alone."""
    for _ in range(10):
        trainer.feed.next()
    spent = seconds(lambda: [trainer.feed.next() for _ in range(batches)])
    return batches * trainer.config.train.batch_size / spent


def streamed(config: ConfigDict, source: object, workers: int, steps: int) -> dict[str, float]:
    """Rate and wait of batches that are read ahead."""
    config.data.memory_limit_gib, config.data.workers = 0.0, workers
    trainer = Trainer(config, source)
    with trainer.feed:
        return {"images_per_sec": rate(trainer), "input_wait": input_wait(trainer, steps)}


def rounded(tree: object) -> object:
    """Numbers with four significant digits."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=("digits", "small"), default="digits")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data_dir", default="")
    args = parser.parse_args()
    compile_cache.use_compilation_cache()
    config, source = open_config(args.config, args.data_dir)
    trainer = Trainer(config, source)
    about = {"benchmark": "overhead", "config": args.config, "batch": config.train.batch_size}
    result = {
        **about,
        "device": jax.devices()[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params)),
        **costs(trainer, args.steps, args.rounds),
        "input_wait": input_wait(trainer, args.steps),
        "stream": {
            f"{workers} workers" if workers else "threads": streamed(
                config, source, workers, args.steps
            )
            for workers in (0, 2)
        },
    }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
