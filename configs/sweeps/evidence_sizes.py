"""Rank and number of bases of UC-LoRA around 9 bases of rank 2; 56 runs.

    python main.py --mode=sweep --config=configs/sweeps/evidence_sizes.py \
        --workdir=workdirs/evidence/sizes --jobs=2

The analysis is in docs/results.md.
"""

from configs import evidence
from lora_diffusion_jax import grids

get_config = evidence.get_config


def sweep(add: grids.Add) -> None:
    """Adds the centre, other ranks and other numbers of bases, with every seed."""
    sizes = grids.chain(
        [{"lora.bases": 9, "lora.rank": 2}],
        grids.product(grids.over("lora.bases", [9]), grids.over("lora.rank", [1, 4])),
        grids.product(grids.over("lora.bases", [1, 3, 18]), grids.over("lora.rank", [2])),
        [{"lora.bases": 9, "lora.rank": 2, "lora.adapter": "static"}],  # without a condition
    )
    add(grids.product(sizes, grids.over("train.seed", evidence.SEEDS)))
