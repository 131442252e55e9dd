"""Kinds of conditioning on CIFAR-10 with a narrow network; 12 runs.

    python main.py --mode=sweep --config=configs/sweeps/evidence_cifar10.py \
        --workdir=workdirs/evidence/cifar10 --config.data.data_dir=DIR --jobs=2

The analysis is in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import cifar10_edm, evidence
from lora_diffusion_jax import grids


def get_config() -> ConfigDict:
    """A network of 16 and 32 channels with one block a level; 25,600 images."""
    config = cifar10_edm.get_config()
    config.class_conditional = True
    evidence.shorten(config)
    config.model.num_blocks = 1
    config.train.log_every = 64 * 50
    config.train.checkpoint_every = 64 * 200
    return config


def sweep(add: grids.Add) -> None:
    """Adds the baseline, UC-LoRA beside it and alone, and LoRA without a condition, with three seeds."""
    kinds = grids.chain(
        [{"lora.mode": "baseline"}],
        [{"lora.mode": "with_lora", "lora.adapter": "uc"}],
        [{"lora.mode": "only_lora", "lora.adapter": "uc"}],
        [{"lora.mode": "with_lora", "lora.adapter": "static", "lora.bases": 22}],
    )
    add(grids.product(kinds, grids.over("train.seed", range(3))))
