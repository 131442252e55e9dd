"""CIFAR-10 with NCSN++ (EDM's "VE" architecture) and UC-LoRA.

    python main.py --mode=train --config=configs/cifar10_ncsnpp.py --workdir=workdirs/cifar10_ncsnpp

Parameters: 58,412,251 class-conditional with LoRA (58,409,435 unconditional; 56,400,643 and 56,397,827
with --config.lora.mode=baseline). EDM reports FID 1.79 conditional and 1.98 unconditional for the
baseline (Karras et al. 2022, table 2). Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import cifar10_edm


def get_config() -> ConfigDict:
    """cifar10_edm with the other architecture."""
    config = cifar10_edm.get_config()
    config.model.name = "ncsnpp"
    return config
