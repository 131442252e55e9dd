"""FFHQ at 64x64 with EDM's DDPM++ and UC-LoRA, 20 bases.

    python main.py --mode=train --config=configs/ffhq64_edm.py --workdir=workdirs/ffhq64 \
        --config.data.path=ffhq-64x64.zip

AFHQv2 at 64x64 (the same network, dropout 0.25):

    ... --config.data.path=afhqv2-64x64.zip --config.model.dropout=0.25

Parameters: 63,941,619 (61,805,571 with --config.lora.mode=baseline). EDM: 4 days on 8 V100; FID 2.39
(FFHQ) and 1.96 (AFHQv2) at 79 evaluations for the baseline. Not yet measured here.
"""

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base


def get_config() -> ConfigDict:
    """Unconditional, 64x64, batch 256, 40 sampling steps."""
    config = base()
    config.data.path = "ffhq-64x64.zip"
    config.data.image_size = 64
    config.data.channels = 3
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.dropout = 0.05
    config.lora.bases = 20
    config.augment.p = 0.15
    config.train.batch_size = 256
    config.train.learning_rate = 2e-4
    config.sampler.num_steps = 40
    return config
