"""What LoRA costs in sampling, and what folding it into the base leaves of that: one JSON line a batch size.

python -m benchmarks.folding [--config=digits|narrow|cifar10] [--batches=1,2,8,64] [--rounds=15]

digits   configs/digits.py
narrow   configs/cifar10_edm.py with 64 channels, two levels, one block
cifar10  configs/cifar10_edm.py

Medians of interleaved calls of 4 steps, 7 evaluations, over those of lora.mode=baseline on mixed classes.

baseline_one   baseline, one class: the embedding and what depends on it are computed once
lora           with_lora, mixed classes
lora_one       with_lora, one class
folded         with_lora, one class, sampler.fold=on
"""

import argparse
import importlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.gpu import compare
from lora_diffusion_jax.factory import networks, training

# name -> lora.mode, sampler.fold, whether the images share their class
VARIANTS = {
    "baseline": ("baseline", "off", False),
    "baseline_one": ("baseline", "off", True),
    "lora": ("with_lora", "off", False),
    "lora_one": ("with_lora", "off", True),
    "folded": ("with_lora", "on", True),
}


def config_of(name: str, batch: int, mode: str, fold: str) -> ConfigDict:
    """A config by its name here."""
    module = "digits" if name == "digits" else "cifar10_edm"
    config = importlib.import_module(f"configs.{module}").get_config()
    if name == "narrow":
        config.model.channels = 64
        config.model.channel_mult = (1, 2)
        config.model.num_blocks = 1
    config.lora.mode, config.sampler.fold = mode, fold
    config.sampler.batch_size, config.sampler.num_steps = batch, 4
    return config


def compiled(config: ConfigDict, one: bool) -> Callable[[], jax.Array]:
    """A call that samples a batch."""
    denoiser, mesh = networks.build_denoiser(config), training.build_mesh(config)
    variables = networks.init_variables(config, denoiser, jax.random.key(0))
    generator = training.build_generator(config, denoiser, mesh)
    batch = config.sampler.batch_size
    seeds = jnp.arange(batch, dtype=jnp.uint32)
    labels = jnp.eye(10)[:1] if one else jnp.eye(10)[np.arange(batch) % 10]
    program = generator.compiled_shared if one else generator.compiled
    run = program.lower(variables, seeds, labels).compile()
    return lambda: jax.block_until_ready(run(variables, seeds, labels))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=("digits", "narrow", "cifar10"), default="digits")
    parser.add_argument("--batches", default="1,2,8,64")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for batch in map(int, args.batches.split(",")):
        calls = {
            name: compiled(config_of(args.config, batch, mode, fold), one)
            for name, (mode, fold, one) in VARIANTS.items()
        }
        medians = compare(calls, args.rounds)
        ratios = {name: round(m / medians["baseline"], 3) for name, m in medians.items()}
        about = {"benchmark": "folding", "config": args.config, "batch": batch}
        print(json.dumps({**about, "baseline_seconds": medians["baseline"], **ratios}), flush=True)


if __name__ == "__main__":
    main()
