"""What a config's sampling needs beside the run itself: the network that guides it, and a searched grid."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import processes, remote
from lora_diffusion_jax.diffusion.samplers import searched_grid
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import image_shape, num_classes
from lora_diffusion_jax.factory.pretrained import Pretrained, load_workdir
from lora_diffusion_jax.factory.training import build_generator, build_mesh
from lora_diffusion_jax.generate import Generator

SEARCH_SEEDS = 64  # images whose trajectories a grid is searched on: seeds 0-63
SEARCH_LIMIT = 3600.0  # seconds that other processes wait for process 0


def prepare(run: Pretrained) -> Pretrained:
    """The run with the network that guides it loaded, and with the noise levels of grid=searched found.

    Raises:
        UserError: the guiding run cannot be read or has other images or classes, or the grid cannot be
            searched.
    """
    run = dataclasses.replace(run, weaker=_load_weaker(run.config))
    sampler = run.config.sampler
    if sampler.get("grid") != "searched" or sampler.sigmas:
        return run
    found = processes.from_leader(
        "searching the grid", lambda: json.dumps(_search(run)), SEARCH_LIMIT
    )
    config = run.config.copy_and_resolve_references()
    config.sampler.sigmas = tuple(json.loads(found))
    return dataclasses.replace(run, config=config)


def open_generator(run: Pretrained) -> Generator:
    """The generator that samples a prepared run, from `run.sampled_variables`."""
    weaker = run.weaker.denoiser if run.weaker else None
    return build_generator(run.config, run.denoiser, build_mesh(run.config), weaker)


def _load_weaker(config: ConfigDict) -> Pretrained | None:
    if config.guidance.name != "autoguidance":
        return None
    path = remote.local(config.guidance.workdir, "guidance.workdir")
    weaker = load_workdir(path, at_step=config.guidance.step)
    made, wanted = ((image_shape(c), num_classes(c)) for c in (weaker.config, config))
    if made != wanted:
        raise UserError(
            f"guidance.workdir={config.guidance.workdir} makes images of {made[0]} in {made[1]} classes, "
            f"this network of {wanted[0]} in {wanted[1]}; name a run of the same data."
        )
    return weaker


def _search(run: Pretrained) -> list[float]:
    config = run.config.copy_and_resolve_references()
    config.sampler.grid = "rho"  # so that there is a sampler already
    generator = open_generator(dataclasses.replace(run, config=config))
    seeds = np.arange(SEARCH_SEEDS)
    labels = generator.one_hot(generator.choose_labels(seeds))
    denoise = generator.bind(
        run.denoiser, run.sampled_variables, jnp.asarray(labels) if generator.num_classes else None
    )
    levels = searched_grid(
        denoise,
        generator.latents(jnp.asarray(seeds, jnp.uint32)),
        config.sampler.num_steps,
        **{k: config.sampler[k] for k in ("sigma_min", "sigma_max", "rho", "to_zero")},
    )
    return [float(f"{level:.6g}") for level in levels]  # short to print and to type
