"""ImageNet at 64x64 with improved-diffusion's network and TimeLoRA: the paper's IDDPM rows.

    python main.py --mode=train --config=configs/imagenet64_iddpm.py --workdir=workdirs/imagenet64_iddpm \
        --config.data.path=imagenet-64x64.zip

Rows by override (parameters, and the paper's FID at 4000 evaluations, 50,000 samples):

    --config.lora.mode=baseline    121,063,942   19.2
    --config.lora.mode=only_lora   113,602,960   18.2
    --config.lora.mode=with_lora   124,175,248   not published

The settings are those of improved-diffusion's checkpoint imagenet64_uncond_100M_1500K.pt, which
`--config.init_from=FILE.pt` starts from. Its class-conditional network (imagenet64_cond_270M_250K.pt) is

    --config.class_conditional=True --config.lora.mode=baseline --config.model.channels=192 \
        --config.train.learning_rate=3e-4 --config.train.batch_size=2048 \
        --config.train.total_images=512000000 --config.train.ema_halflife_images=14194944 \
        --config.precond.rescale_timesteps=False

with 273,049,350 parameters (`--config.lora.adapter=time_class` beside with_lora or only_lora). It was not
trained with this loss: with rescale_learned_sigmas=False the variational term has the factor 1 in the
reference, here T/1000 = 4. Nor is `--config.precond.loss=vlb` the reference's training of L_vlb, which draws
t by importance sampling; here t is uniform. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import cifar10_iddpm


def get_config() -> ConfigDict:
    """cifar10_iddpm with a deeper network, without dropout and classes."""
    config = cifar10_iddpm.get_config()
    config.data.name = ""
    config.data.path = "imagenet-64x64.zip"
    config.data.image_size = 64
    config.data.num_classes = 1000
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.dropout = 0.0
    config.train.total_images = 1_500_000 * 128
    return config
