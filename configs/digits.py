"""Class-conditional digits (8x8, gray) with UC-LoRA: the demo, minutes on two CPU cores.

python main.py --mode=train --config=configs/digits.py --workdir=workdirs/digits
"""

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base


def get_config() -> ConfigDict:
    """A 1.0M-parameter DDPM++ with attention at 4x4 and 18 bases of rank 4."""
    config = base()
    config.class_conditional = True
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.num_classes = 10

    config.model.channels = 32
    config.model.channel_mult = (1, 2)
    config.model.num_blocks = 1
    config.model.attn_resolutions = (4,)
    config.model.dropout = 0.0
    config.model.augment_dim = 0
    config.augment.p = 0.0

    config.train.batch_size = 128
    config.train.learning_rate = 2e-3
    config.train.total_images = 128 * 800
    config.train.rampup_images = 128 * 50
    config.train.ema_halflife_images = 10_000
    config.train.log_every = 128 * 50
    config.train.checkpoint_every = 128 * 200
    config.train.sample_every = 128 * 200
    config.sampler.batch_size = 100
    return config
