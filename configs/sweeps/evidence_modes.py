"""Which conditioning: scale-and-shift, adapters, or both, with each adapter; 56 runs.

    python main.py --mode=sweep --config=configs/sweeps/evidence_modes.py \
        --workdir=workdirs/evidence/modes --jobs=2

`evidence_unconditional.py` is the same without classes. The analysis is in docs/results.md.
"""

from configs import evidence
from lora_diffusion_jax import grids

get_config = evidence.get_config


def sweep(add: grids.Add) -> None:
    """Adds every kind of conditioning with every seed."""
    kinds = grids.chain(
        [{"lora.mode": "baseline"}],
        evidence.adapter("static", "with_lora"),
        evidence.adapter("uc", "with_lora"),
        evidence.adapter("time", "with_lora"),
        evidence.adapter("time_class", "with_lora"),
        evidence.adapter("uc", "only_lora"),
        evidence.adapter("time_class", "only_lora"),
    )
    add(grids.product(kinds, grids.over("train.seed", evidence.SEEDS)))
