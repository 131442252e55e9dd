"""A tiny network, data set and run that stand in for the real ones; also a program: see `main`."""

import argparse
import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax import processes, remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.paths import is_adapter
from lora_diffusion_jax.training import sharding
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.loop import Cadence, train
from lora_diffusion_jax.training.optimizer import adam
from lora_diffusion_jax.training.sharding import local_rows, make_mesh
from lora_diffusion_jax.training.state import create_state
from lora_diffusion_jax.training.step import make_train_step
from lora_diffusion_jax.training.workdir import open_workdir

BATCH, SIZE, CLASSES = 16, 4, 3


class Adapter(nn.Module):
    """A low-rank addition under the name the project gives adapters."""

    features: int

    @nn.compact
    def __call__(self, x):
        down = nn.Dense(2, use_bias=False, name="down")(x)
        return nn.Dense(self.features, use_bias=False, name="up")(down)


class Net(nn.Module):
    """A convolution, a wide layer (for fsdp) with an adapter, and labels."""

    width: int = 32

    @nn.compact
    def __call__(self, x, sigma, labels):
        level = jnp.log(sigma).reshape(-1, 1, 1, 1)
        h = nn.Conv(self.width, (3, 3), name="conv")(x)
        h = h + level + nn.Dense(self.width, name="label")(labels)[:, None, None]
        h = jnp.tanh(h)
        h = h + nn.Dense(self.width, name="mid")(h) + Adapter(self.width, name="lora")(h)
        return nn.Dense(x.shape[-1], name="out")(h)


class ArrayBatches:
    """Batches of arrays in memory; the order is a function of (seed, step)."""

    def __init__(self, images, labels, batch_size, seed=0, in_memory=True, rows=slice(None)):
        self.batch_size, self.seed, self.rows = batch_size, seed, rows
        self.images = images if in_memory else None
        self.labels = labels if in_memory else None
        self.source = {"image": images, "label": labels}

    def indices(self, step):
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(0, len(self.source["image"]), self.batch_size).astype(np.int32)
        return chosen[self.rows]

    def iterate(self, start_step):
        step = start_step
        while True:
            index = self.indices(step)
            yield {name: rows[index] for name, rows in self.source.items()}
            step += 1


class Objective:
    """Squared error of the denoised image."""

    def draw(self, key, shape):
        level, noise = jax.random.split(key)
        # Uniform: a normal draw doubles the time to compile.
        return {
            "sigma": jnp.exp(jax.random.uniform(level, shape[:1], minval=-3, maxval=3)),
            "noise": jax.random.uniform(noise, shape, minval=-1.7, maxval=1.7),
        }

    def loss(self, variables, images, labels, draws, train):
        sigma = draws["sigma"]
        noisy = images + sigma[:, None, None, None] * draws["noise"]
        return {"loss": jnp.square(Net().apply(variables, noisy, sigma, labels) - images)}


def make_data(count=64):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, count).astype(np.int32)


def make_step(optimizer, objective=None, **options):
    options = {
        "ema": Ema(200.0),
        "batch_size": BATCH,
        "num_classes": CLASSES,
    } | options
    mesh = options.pop("mesh", None) or make_mesh()
    return make_train_step(objective or Objective(), optimizer, mesh=mesh, **options)


def init_variables(key=None):
    """Weights from numpy, so that little is compiled; a key scales them by 1 to 9/8."""
    x = jnp.zeros((1, SIZE, SIZE, 3))
    init = functools.partial(Net().init, jax.random.key(1))
    shapes = jax.eval_shape(init, x, jnp.ones(1), jnp.zeros((1, CLASSES)))
    rng, scale = np.random.default_rng(1), 1 if key is None else 1 + jax.random.uniform(key) / 8
    return jax.tree.map(
        lambda s: (
            jnp.asarray(rng.normal(size=s.shape) / np.prod(s.shape[:-1]) ** 0.5, s.dtype) * scale
        ),
        shapes,
    )


def make_run(workdir, *, total=40, mesh=None, callbacks=None, step_options=None, **options):
    """The arguments of `run` for a run of `total` steps."""
    optimizer = adam(2e-3, rampup_images=100)
    cadence = {"log_every": 7 * BATCH, "checkpoint_every": 5 * BATCH} | options.pop("cadence", {})
    in_memory = options.pop("in_memory", True)
    trainable = options.pop("trainable", lambda path: True)
    mesh = mesh or make_mesh()
    rows = local_rows(BATCH, mesh)
    arguments = {
        "config": {"train": {"batch_size": BATCH, "total_images": total * BATCH}, "model": "net"},
        "init": lambda key: create_state(init_variables(key), optimizer, trainable),
        "step_fn": make_step(optimizer, mesh=mesh, **(step_options or {})),
        "batches": ArrayBatches(*make_data(), BATCH, in_memory=in_memory, rows=rows),
        "mesh": mesh,
        "cadence": Cadence(total_images=total * BATCH, **cadence),
        "seed": 3,
        "callbacks": callbacks,
    }
    return {"workdir": workdir} | arguments | options


def run(workdir, config, **arguments):
    """Opens the workdir and trains."""
    with open_workdir(workdir, config, ("train.total_images", "train.*_every")) as directory:
        return train(directory, **arguments)


def digest(state):
    """One hash over every bit of a state."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        total.update(jax.tree_util.keystr(path).encode() + processes.fetch(leaf).tobytes())
    return total.hexdigest()


def train_lines(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = [
        json.loads(text) for text in (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if k in ("step", "images") or k.startswith("train/")}
            for line in lines]  # fmt: skip


def main():
    """Trains as told, and writes {digest, step, devices} to WORKDIR.json, or --about."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", help="or its URL")
    parser.add_argument("--about")
    parser.add_argument("--total", type=int, default=40)
    parser.add_argument("--data", type=int, default=-1)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--freeze", action="store_true", help="train the adapter alone")
    parser.add_argument("--log-every", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per batch")
    parser.add_argument("--die-at", type=int, help="kill -9 when this step's batch is asked for")
    parser.add_argument("--break-at", type=int, help="a UserError when this step's batch is due")
    parser.add_argument("--width", type=int, default=BATCH, help="batch size the config names")
    options = parser.parse_args()
    sharding.FSDP_MIN_SIZE = 512  # the network's layers are small
    try:
        processes.join(limit=60, heartbeat_timeout_seconds=6)
        with processes.ending_together():
            sys.exit(go(options))
    except UserError as error:
        print(f"UserError: {remote.named(str(error))}", flush=True)
        sys.exit(2)


def go(options):
    """Trains; returns the exit code."""
    arguments = make_run(
        remote.local(options.workdir),
        total=options.total,
        mesh=make_mesh(options.data, options.fsdp),
        trainable=is_adapter if options.freeze else lambda path: True,
        cadence={"log_every": options.log_every * BATCH},
    )
    indices = arguments["batches"].indices

    def slow(step):
        print(f"batch {step}", flush=True)
        if step == options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == options.break_at:
            raise UserError(f"batch {step} cannot be read")
        time.sleep(options.pause if step > 0 else 0)
        return indices(step)

    arguments["batches"].indices = slow
    arguments["config"]["train"]["batch_size"] = options.width
    result = run(**arguments)
    about = {"digest": digest(result.state), "step": result.step, "devices": jax.device_count()}
    if processes.is_leader():
        Path(options.about or f"{options.workdir}.json").write_text(json.dumps(about))
    return result.exit_code


if __name__ == "__main__":
    main()
