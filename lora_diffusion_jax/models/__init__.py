"""The U-Nets by name, without any LoRA code."""

import functools
from collections.abc import Callable

from lora_diffusion_jax.models.adm_unet import ADMUNet
from lora_diffusion_jax.models.improved_unet import ImprovedUNet
from lora_diffusion_jax.models.song_unet import SongUNet
from lora_diffusion_jax.models.unet import UNet

NETWORKS: dict[str, Callable[..., UNet]] = {  # model.name -> the network from its settings
    "ddpmpp": SongUNet,
    "ncsnpp": functools.partial(
        SongUNet,
        embedding="fourier",
        encoder="residual",
        channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1),
    ),
    "adm": ADMUNet,
    "improved": ImprovedUNet,
}
