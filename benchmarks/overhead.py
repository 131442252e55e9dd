"""What checkpoints, logging and the input cost a training run: shares of its time, one JSON line.

python -m benchmarks.overhead [--config=digits|small] [--steps=40] [--rounds=5] [--data_dir=DIR]

digits  configs/digits.py, 1.0 M parameters
small   configs/cifar10_edm.py narrowed to what a CPU trains: 64 channels, one block, batch 32

checkpoint   a block of steps that begins with a checkpoint and ends when it is on disk, less one
             without (the two in turn, median), over the time of 1,000 steps: an upper bound, for a
             run goes on while the last bytes are written
log          the same for writing the line of an interval, at the config's own interval
input_wait   share of the time in which the loop waited for batches that were held in memory
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

from lora_diffusion_jax import compile_cache, factory
from lora_diffusion_jax.data.pipeline import Batches
from lora_diffusion_jax.training import sharding
from lora_diffusion_jax.training.checkpoint import Checkpoints, to_parts
from lora_diffusion_jax.training.feed import Feed
from lora_diffusion_jax.training.loop import empty_metrics
from lora_diffusion_jax.training.metrics import to_scalars
from lora_diffusion_jax.training.state import create_state
from lora_diffusion_jax.training.step import lower_step
from lora_diffusion_jax.training.writers import Writers

STEPS = 1_000  # that the shares are for


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
    source = factory.open_source(config)
    return factory.complete(config, source), source


class Trainer:
    """The pieces of the training loop, run by hand."""

    def __init__(
        self, config: ConfigDict, source: object, *, stream: bool = False, workers: int = 0
    ):
        self.config, self.mesh = config, factory.build_mesh(config)
        denoiser = factory.build_denoiser(config)
        batch_size = config.train.batch_size
        batches = Batches(
            source,
            batch_size,
            0,
            rows=sharding.local_rows(batch_size, self.mesh),
            memory_limit=0 if stream else 2**30,
            num_workers=workers,
        )
        self.feed = Feed(batches, self.mesh, 0)
        optimizer = factory.build_optimizer(config)

        def init() -> object:
            variables = factory.init_variables(config, denoiser, jax.random.key(0))
            return create_state(variables, optimizer, factory.trainable(config))

        self.state, self.interval = jax.jit(init)(), empty_metrics(self.mesh)
        self.key = jax.random.key(1)
        self.stop = jax.device_put(
            np.zeros(self.mesh.size, np.int32), sharding.batch_sharding(self.mesh)
        )
        step = factory.build_step(config, denoiser, self.mesh)
        item = {**self.feed.next(), "stop": self.stop}
        self.state = jax.device_put(self.state, sharding.tree_sharding(self.state, self.mesh))
        self.key = jax.device_put(self.key, sharding.replicated(self.mesh))
        self.compiled = lower_step(
            step, self.state, self.interval, self.feed.data, item, self.key, self.mesh
        ).compile()

    def train(self, steps: int) -> None:
        """Some steps, to their end."""
        for _ in range(steps):
            item = {**self.feed.next(), "stop": self.stop}
            self.state, self.interval, status = self.compiled(
                self.state, self.interval, self.feed.data, item, self.key
            )
            jax.block_until_ready(status)

    def log(self, writers: Writers, step: int) -> None:
        """Writes the line of an interval."""
        interval, bad = jax.device_get((self.interval, self.state.nonfinite_grads))
        values = to_scalars(interval) | {"train/nonfinite_grads": float(bad)}
        writers.write(step, step * self.config.train.batch_size, values)
        self.interval = empty_metrics(self.mesh)


def seconds(work: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def extra(plain: Callable[[], None], more: Callable[[], None], rounds: int) -> float:
    """Median of time(more) - time(plain), the two in turn."""
    return float(np.median([-seconds(plain) + seconds(more) for _ in range(rounds)]))


def costs(trainer: Trainer, steps: int, rounds: int) -> dict[str, float]:
    """Shares of checkpoint and log in STEPS steps, and what they were computed from."""
    trainer.train(3)
    numbers = iter(range(1, 10**6))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writers = stack.enter_context(Writers(Path(folder), 0, 0))
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
    """Images per second that the input hands out when nothing else is done."""
    for _ in range(10):
        trainer.feed.next()
    spent = seconds(lambda: [trainer.feed.next() for _ in range(batches)])
    return batches * trainer.config.train.batch_size / spent


def streamed(config: ConfigDict, source: object, workers: int, steps: int) -> dict[str, float]:
    """Rate and wait of batches that are read ahead."""
    trainer = Trainer(config, source, stream=True, workers=workers)
    with trainer.feed:
        return {"images_per_sec": rate(trainer), "input_wait": input_wait(trainer, steps)}


def rounded(tree: object) -> object:
    """Four significant digits are enough."""
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
