"""CIFAR-10 with EDM's DDPM++ and UC-LoRA: the paper's EDM rows (arXiv 2405.03958, table 1).

    python main.py --mode=train --config=configs/cifar10_edm.py --workdir=workdirs/cifar10_edm

Rows by override (parameters, and the paper's FID at 35 evaluations, 50,000 samples):

    --config.class_conditional=True  --config.lora.mode=baseline    55,735,299   1.79
                                     --config.lora.mode=only_lora   53,413,083   1.82
                                     --config.lora.mode=with_lora   57,746,907   1.75
    --config.class_conditional=False --config.lora.mode=baseline    55,733,891   1.97
                                     --config.lora.mode=only_lora   53,411,675   1.99
                                     --config.lora.mode=with_lora   57,745,499   1.96

The paper starts from the official EDM checkpoint (`--config.init_from=FILE.pkl`) and trains all
parameters for 100 M images; EDM's own run of 200 M images took 2 days on 8 V100. Not yet measured here.
"""

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base


def get_config() -> ConfigDict:
    """Class-conditional, with_lora, rank 4, 18 bases."""
    config = base()
    config.class_conditional = True
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.num_classes = 10
    config.train.total_images = 100_000_000
    return config
