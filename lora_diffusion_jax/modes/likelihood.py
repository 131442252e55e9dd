"""Bits per dimension of the held-out images under a trained network."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from lora_diffusion_jax import processes
from lora_diffusion_jax.array_types import Images, ImagesU8, LabelIds, Variables
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.diffusion.likelihood import (
    flow_bits_of_levels,
    flow_levels,
    variational_bound,
)
from lora_diffusion_jax.diffusion.precond import DDPM, Denoiser
from lora_diffusion_jax.diffusion.samplers import BoundDenoiser, bind
from lora_diffusion_jax.errors import UserError, choose, printable
from lora_diffusion_jax.factory.data import named_classes, open_heldout
from lora_diffusion_jax.factory.networks import image_shape, num_classes
from lora_diffusion_jax.factory.objectives import refuse_changes
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.factory.training import build_mesh
from lora_diffusion_jax.keys import LIKELIHOOD, purpose_key
from lora_diffusion_jax.modes.sample import choose_images
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.training.step import to_float, to_labels

USUAL_NUM = 1000  # images, without --num

# (denoise, images [B, H, W, C], keys [B]) -> bits per dimension [B]
Route = Callable[[BoundDenoiser, Images, jax.Array], jax.Array]


def bound_bits(denoise: BoundDenoiser, images: Images, keys: jax.Array) -> jax.Array:
    """The variational bound of all timesteps."""
    prior, terms = variational_bound(denoise, images, key=keys)
    return prior + terms.sum(axis=1)


ROUTES: dict[str, Route] = {"vlb": bound_bits, "ode": flow_bits_of_levels}


def measure(run: Pretrained, num: int | None = None, route: str | None = None) -> dict[str, Any]:
    """Mean bits per dimension of held-out images, and what it is a mean of.

    Args:
        run: the network, its weights and its config.
        num: images, evenly spread over the held-out ones; None: USUAL_NUM, or all if they are fewer.
        route: vlb, the variational bound of a discrete process, or ode, the density of the probability
            flow; None: vlb for networks that have a discrete process, else ode.

    Returns:
        {'bpd_vlb' or 'bpd_ode', 'standard_error', 'num', 'of', 'data', 'nfe'}.

    Raises:
        UserError: there are no held-out images, not so many, or of another kind; or the network has no
            such route.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    refuse_changes(run.config, "--mode=likelihood")
    precond = run.denoiser.precond
    route = route or ("vlb" if isinstance(precond, DDPM) else "ode")
    function = choose("--route", route, ROUTES)
    if route == "ode":
        evaluations = 2 * (len(flow_levels(precond)) - 1)
    elif isinstance(precond, DDPM):
        evaluations = precond.num_steps
    else:
        raise UserError(
            f"--route=vlb needs a network of a discrete process (precond.name=ddpm), and this one has "
            f"precond.name={run.config.precond.name}; use --route=ode."
        )
    if run.config.data.floats:
        raise UserError(
            "--mode=likelihood counts bits of 8-bit images, but this run's data are an array of floats, "
            "whose density has no such unit."
        )
    source = heldout_images(run.config)
    chosen = choose_images(source, num, USUAL_NUM, 2, "held-out")
    bits = bits_of(run, function, source, chosen)
    return {
        f"bpd_{route}": float(bits.mean()),
        "standard_error": float(bits.std(ddof=1) / np.sqrt(len(bits))),
        "num": len(bits),
        "of": len(source),
        "data": source.title,
        "nfe": evaluations,
    }


def heldout_images(config: ConfigDict) -> ImageSource:
    """The held-out images of a config.

    Raises:
        UserError: there are none, or they do not fit the network.
    """
    source = open_heldout(config, labels=num_classes(config) > 0)
    if source is None:
        raise UserError(
            "There are no held-out images: name a folder or ZIP of them with --config.data.eval_path, or a "
            "TFDS data set with --config.data.name."
        )
    if source.image_shape != image_shape(config):
        raise UserError(
            f"{source.title} has images of shape {source.image_shape}; this network takes "
            f"{image_shape(config)}."
        )
    if num_classes(config) not in (0, source.num_classes):
        raise UserError(
            f"{source.title} has {source.num_classes} classes, and this network {num_classes(config)}; "
            "the held-out images need the labels of the training images."
        )
    names = tuple(config.data.class_names)
    if num_classes(config) and names and (found := named_classes(source)) != names:
        raise UserError(
            f"{source.title} has the classes {printable(', '.join(found))}, and this network was trained on "
            f"{printable(', '.join(names))}; name and number the held-out classes alike."
        )
    return source


def bits_of(
    run: Pretrained, function: Route, source: ImageSource, chosen: np.ndarray
) -> np.ndarray:
    """Bits per dimension of chosen images, float64 [N]. With several processes all must call it alike.

    What is drawn for an image depends on its number in the data set alone.
    """
    mesh, classes = build_mesh(run.config), num_classes(run.config)
    spread, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    program = jax.jit(
        functools.partial(_bits, function, run.denoiser, classes),
        in_shardings=(whole, spread, spread, spread),
        out_shardings=spread,
    )
    variables = jax.tree.map(lambda v: processes.place(np.asarray(v), whole), run.variables)
    size = -(-min(run.config.sampler.batch_size, len(chosen)) // mesh.size) * mesh.size
    found = []
    with tqdm(total=len(chosen), unit="img", desc="likelihood", disable=None) as bar:
        for start in range(0, len(chosen), size):
            pause_point()
            part = chosen[start : start + size]
            batch = source.read(part.tolist())
            arrays = (batch["image"], batch["label"], part.astype(np.uint32))
            inputs = (processes.place_rows(array, size, spread) for array in arrays)
            found.append(processes.fetch(program(variables, *inputs))[: len(part)])
            bar.update(len(part))
    return np.concatenate(found).astype(np.float64)


def _bits(
    function: Route,
    denoiser: Denoiser,
    classes: int,
    variables: Variables,
    images: ImagesU8,
    labels: LabelIds,
    numbers: jax.Array,
) -> jax.Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, purpose_key(0, LIKELIHOOD)))(numbers)
    denoise = bind(denoiser, variables, to_labels(labels, classes))
    return function(denoise, to_float(images), keys)
