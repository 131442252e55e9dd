"""Parameter counts of the paper's table and of the reference networks, to the last one."""

from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from configs import cifar10_iddpm, imagenet64_iddpm
from lora_diffusion_jax import lora
from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables, variable_shapes
from lora_diffusion_jax.factory.training import build_optimizer
from lora_diffusion_jax.training import sharding, state

MODES = ("baseline", "only_lora", "with_lora")
CONDITIONAL = {"class_conditional": True, "lora.adapter": "time_class"}


def cifar10(model: str, conditional: bool) -> ConfigDict:
    config = base()
    config.model.name = model
    config.class_conditional = conditional
    config.data.image_size, config.data.channels, config.data.num_classes = 32, 3, 10
    return config


def ffhq64(model: str) -> ConfigDict:
    config = base()
    config.model.name = model
    config.model.channel_mult = (1, 2, 2, 2)
    config.lora.bases = 20
    config.data.image_size, config.data.channels = 64, 3
    return config


def iddpm(module: ModuleType, **changes: Any) -> ConfigDict:
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config


def imagenet64() -> ConfigDict:
    config = base()
    config.model.name = "adm"
    config.model.channels, config.model.channel_mult = 192, (1, 2, 3, 4)
    config.model.num_blocks, config.model.attn_resolutions = 3, (32, 16, 8)
    config.model.augment_dim = 0
    config.class_conditional = True
    config.data.image_size, config.data.channels, config.data.num_classes = 64, 3, 1000
    return config


# name -> config, and what its three modes count (None: not published)
ROWS = {
    "CIFAR-10 DDPM++ uncond": (cifar10("ddpmpp", False), (55_733_891, 53_411_675, 57_745_499)),
    "CIFAR-10 DDPM++ cond": (cifar10("ddpmpp", True), (55_735_299, 53_413_083, 57_746_907)),
    "CIFAR-10 NCSN++ uncond": (cifar10("ncsnpp", False), (56_397_827, None, 58_409_435)),
    "CIFAR-10 NCSN++ cond": (cifar10("ncsnpp", True), (56_400_643, None, 58_412_251)),
    "FFHQ-64 DDPM++": (ffhq64("ddpmpp"), (61_805_571, None, 63_941_619)),
    "FFHQ-64 NCSN++": (ffhq64("ncsnpp"), (62_761_091, None, 64_897_139)),
    "ImageNet-64 ADM cond": (imagenet64(), (295_899_267, None, 309_923_995)),
    "CIFAR-10 IDDPM uncond": (iddpm(cifar10_iddpm), (52_546_438, 47_591_440, 54_880_528)),
    "CIFAR-10 IDDPM cond": (
        iddpm(cifar10_iddpm, **CONDITIONAL),
        (52_551_558, 48_513_040, 55_807_248),
    ),
    "ImageNet-64 IDDPM uncond": (
        iddpm(imagenet64_iddpm),
        (121_063_942, 113_602_960, 124_175_248),
    ),
    "ImageNet-64 IDDPM cond": (
        iddpm(imagenet64_iddpm, **CONDITIONAL, **{"model.channels": 192}),
        (273_049_350, None, None),
    ),
}
QUICK = (  # each kind of network, each mode
    *("CIFAR-10 DDPM++ cond with_lora", "CIFAR-10 DDPM++ cond only_lora"),
    *("CIFAR-10 NCSN++ uncond baseline", "CIFAR-10 IDDPM uncond with_lora"),
    "ImageNet-64 ADM cond with_lora",
)
COUNTS = [
    pytest.param(
        *(config, mode, count),
        id=f"{name} {mode}",
        marks=() if f"{name} {mode}" in QUICK else pytest.mark.slow,
    )
    for name, (config, counts) in ROWS.items()
    for mode, count in zip(MODES, counts, strict=True)
    if count is not None
]


@pytest.mark.parametrize(("config", "mode", "expected"), COUNTS)
def test_parameter_count(config: ConfigDict, mode: str, expected: int) -> None:
    config = config.copy_and_resolve_references()
    config.lora.mode = mode
    shapes = variable_shapes(config, build_denoiser(config))
    assert lora.count(shapes["params"]) == expected


@pytest.mark.parametrize(
    ("config", "most"),
    [(cifar10("ddpmpp", True), 1.03), pytest.param(imagenet64(), 1.02, marks=pytest.mark.slow)],
)
def test_fsdp_divides_the_state(config: ConfigDict, most: float) -> None:
    """Parameters, moments and average take 1/n of the bytes per device, but for small arrays."""
    denoiser = build_denoiser(config)

    def init() -> state.TrainState:
        variables = init_variables(config, denoiser, jax.random.key(0))
        return state.create_state(variables, build_optimizer(config))

    shapes = jax.eval_shape(init)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    # four float32 of each parameter: itself, two moments, its average
    assert whole == pytest.approx(16 * lora.count(shapes.params), rel=1e-3)
    for count in (2, 4, 8):
        mesh = AbstractMesh((4, count), sharding.AXES)
        layout = sharding.tree_sharding(shapes, mesh)
        share = sum(
            np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, place in zip(*map(jax.tree.leaves, (shapes, layout)), strict=True)
        )
        assert 1 <= share * count / whole < most
