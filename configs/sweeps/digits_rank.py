"""Digits without LoRA, and with UC-LoRA of rank 1, 2 and 4, three seeds each: 12 runs.

python main.py --mode=sweep --config=configs/sweeps/digits_rank.py --workdir=workdirs/digits_rank --jobs=2

Each run is the demo's, minutes on two CPU cores. Not yet measured.
"""

from ml_collections import ConfigDict

from configs import digits
from lora_diffusion_jax import grids


def get_config() -> ConfigDict:
    """The demo's config."""
    return digits.get_config()


def sweep(add: grids.Add) -> None:
    """Adds every rank, and the baseline, with every seed."""
    ranks = grids.over("lora.rank", [1, 2, 4])
    baseline = grids.over("lora.mode", ["baseline"])
    seeds = grids.over("train.seed", range(3))
    add(grids.product(grids.chain(baseline, ranks), seeds))
