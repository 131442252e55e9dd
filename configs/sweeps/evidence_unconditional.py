"""Which conditioning, without classes: scale-and-shift, adapters, or both; 40 runs.

    python main.py --mode=sweep --config=configs/sweeps/evidence_unconditional.py \
        --workdir=workdirs/evidence/unconditional --jobs=2

The analysis is in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import evidence
from lora_diffusion_jax import grids


def get_config() -> ConfigDict:
    """The config of the class-conditional runs, without the class."""
    config = evidence.get_config()
    config.class_conditional = False
    return config


def sweep(add: grids.Add) -> None:
    """Adds every kind of conditioning with every seed."""
    kinds = grids.chain(
        [{"lora.mode": "baseline"}],
        evidence.adapter("static", "with_lora"),
        evidence.adapter("uc", "with_lora"),
        evidence.adapter("time", "with_lora"),
        evidence.adapter("uc", "only_lora"),
    )
    add(grids.product(kinds, grids.over("train.seed", evidence.SEEDS)))
