"""What a config describes: parameters, LoRA sites, cost of an evaluation, data set."""

from typing import NamedTuple

from clu import parameter_overview
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.errors import NotThereError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.data import complete, open_source
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    check_attention,
    forward_flops,
    ignored_inputs,
    variable_shapes,
)
from lora_diffusion_jax.factory.objectives import build_sampler


class Description(NamedTuple):
    """What a config describes.

    Attributes:
        text: the table of parameters and what else there is to know, as lines.
        config: with the sizes of its data set, if that is there.
        num_images: of the data set; 0: it is not there.
    """

    text: str
    config: ConfigDict
    num_images: int


def describe(config: ConfigDict, *, needs_data: bool = False) -> Description:
    """What a config describes; nothing is compiled.

    Args:
        config: of a run.
        needs_data: refuse a data set that is not there, instead of saying so. That is a mistake where it
            was named for this, and none where a config or a run names what another machine has.

    Raises:
        UserError: the config or its data set is invalid, or it leaves open sizes that only the data set
            could tell.
    """
    check(config)
    try:
        source = open_source(config)
    except NotThereError as error:
        data, num_images = f"data set: not opened. {error}", 0
        if needs_data or not (config.data.image_size and config.data.channels):
            raise
    else:
        config, data = complete(config, source), summarize(source)
        num_images = len(source)
    check_attention(config)
    denoiser = build_denoiser(config)
    build_sampler(config, denoiser)
    params = variable_shapes(config, denoiser)["params"]
    base, adapters = lora.split(params)
    sites = lora.list_sites(params)
    lines = [
        parameter_overview.get_parameter_overview(params, include_stats=False),
        f"LoRA sites ({config.lora.mode}): {len(sites)}",
        *(f"  {site}" for site in sites),
        data,
        *filter(None, [ignored_inputs(config)]),
        f"One evaluation: {forward_flops(config, denoiser) / 1e9:.4g} GFLOP per image",
        f"Base parameters: {lora.count(base):,}",
        f"Adapter parameters: {lora.count(adapters):,}",
        f"Total parameters: {lora.count(params):,}",
    ]
    return Description("\n".join(lines), config, num_images)
