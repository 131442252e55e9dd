"""ImageNet at 64x64, class-conditional, with the ADM network and UC-LoRA.

    python main.py --mode=train --config=configs/imagenet64_adm.py --workdir=workdirs/imagenet64 \
        --config.data.path=imagenet-64x64.zip

Parameters: 309,923,995 (295,899,267 with --config.lora.mode=baseline). EDM: 13 days on 32 A100; FID
1.36 at 511 evaluations with churn for the baseline (Karras et al. 2022, table 3). EDM computes in
float16 with a loss scale; here bfloat16, which needs none. Not yet measured here.
"""

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base


def get_config() -> ConfigDict:
    """1000 classes, batch 4096, 256 stochastic sampling steps, no augmentation."""
    config = base()
    config.class_conditional = True
    config.dtype = "bfloat16"
    config.data.path = "imagenet-64x64.zip"
    config.data.image_size = 64
    config.data.channels = 3
    config.data.num_classes = 1000

    config.model.name = "adm"
    config.model.channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.attn_resolutions = (32, 16, 8)
    config.model.dropout = 0.10
    config.model.augment_dim = 0
    config.augment.p = 0.0

    config.train.batch_size = 4096
    config.train.learning_rate = 1e-4
    config.train.total_images = 2_500_000_000
    config.train.ema_halflife_images = 50_000_000

    config.sampler.num_steps = 256
    config.sampler.s_churn = 40.0
    config.sampler.s_min = 0.05
    config.sampler.s_max = 50.0
    config.sampler.s_noise = 1.003
    return config
