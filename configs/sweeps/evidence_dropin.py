"""Adapters dropped onto trained baselines and trained alone, beside baselines trained on; 24 runs.

    python main.py --mode=sweep --config=configs/sweeps/evidence_dropin.py \
        --workdir=workdirs/evidence/dropin --jobs=2

A run starts from the EMA weights of its seed's baseline, which `configs/sweeps/evidence_modes.py` trained in
`workdirs/evidence/modes`, and takes as many steps again. The analysis is in docs/results.md.
"""

from configs import evidence
from lora_diffusion_jax import grids

get_config = evidence.get_config
BASELINE = "workdirs/evidence/modes/mode=baseline,seed={seed}"


def sweep(add: grids.Add) -> None:
    """Adds the baseline trained on, and frozen ones with two adapters, for every seed."""
    frozen = [{"train.freeze_base": True}]
    kinds = grids.chain(
        [{"lora.mode": "baseline"}],
        grids.product(evidence.adapter("uc", "with_lora"), frozen),
        grids.product(evidence.adapter("static", "with_lora"), frozen),
    )
    starts = [BASELINE.format(seed=seed) for seed in evidence.SEEDS]
    pairs = grids.zip(grids.over("train.seed", evidence.SEEDS), grids.over("init_from", starts))
    add(grids.product(kinds, pairs))
