"""CIFAR-10 with improved-diffusion's network and TimeLoRA: IDDPM rows of table 1 (arXiv 2405.03958).

    python main.py --mode=train --config=configs/cifar10_iddpm.py --workdir=workdirs/cifar10_iddpm

Rows by override (parameters, and the paper's FID at 4000 evaluations, 50,000 samples):

    --config.lora.mode=baseline    52,546,438   3.69
    --config.lora.mode=only_lora   47,591,440   3.64
    --config.lora.mode=with_lora   54,880,528   3.37
    and with --config.class_conditional=True --config.lora.adapter=time_class
    --config.lora.mode=baseline    52,551,558   3.38
    --config.lora.mode=only_lora   48,513,040   2.91
    --config.lora.mode=with_lora   55,807,248   3.12

The settings are those of improved-diffusion's checkpoint cifar10_uncond_50M_500K.pt, which
`--config.init_from=FILE.pt` starts from: L_hybrid, cosine schedule, 4000 steps, no augmentation, a rate
without ramp-up, and an average that keeps 0.9999 of itself in each step of 128 images.
Not yet measured here.
"""

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base, sampler


def get_config() -> ConfigDict:
    """Unconditional, with_lora: TimeLoRA with 11 bases of rank 4."""
    config = base()
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.num_classes = 10

    config.model.name = "improved"
    config.model.channels = 128
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.num_blocks = 3
    config.model.attn_resolutions = (16, 8)
    config.model.dropout = 0.3
    config.model.augment_dim = 0
    config.augment.p = 0.0

    config.precond.name = "ddpm"
    config.precond.schedule = "cosine"
    config.precond.num_steps = 4000
    config.precond.loss = "hybrid"

    config.lora.adapter = "time"
    config.lora.bases = 11

    config.sampler = sampler("ddpm")  # all 4000 steps, as the paper's figures
    config.eval.num_steps = 250  # of grids and evaluation during training

    config.train.batch_size = 128
    config.train.total_images = 500_000 * 128
    config.train.learning_rate = 1e-4
    config.train.rampup_images = 0
    config.train.ema_halflife_images = 887_184  # 128 ln(0.5) / ln(0.9999): 0.9999 in each step
    config.train.ema_rampup_ratio = 0.0
    return config
