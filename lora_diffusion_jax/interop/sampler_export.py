"""A run's whole sampler as one file that JAX runs without this package: seeds in, images out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.factory.sampling import open_generator
from lora_diffusion_jax.files import atomic, disk_errors, write_text

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".jax"


def export_sampler(path: str | Path, run: Pretrained, about: dict[str, Any]) -> None:
    """Writes a sampler for one device of any of PLATFORMS, its weights included, and a .json beside it.

    `jax.export.deserialize(data).call(seeds, labels)` gives (images [B, H, W, C], finite bool [B])
    for seeds uint32 [B] and labels float32 [B, num_classes], or [B, 1], ignored, without classes. B is
    `sampler.batch_size`. JAX reads files of other versions for at least six months
    after and three weeks before.

    Args:
        path: the file to write, .jax.
        run: from `factory.sampling.prepare`.
        about: what the .json says besides: the sampler, the weights, the step.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path} must end in {SUFFIX}: a sampler is a program for JAX.")
    generator = open_generator(run)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    # The network for all platforms: the generator's is for these devices.
    generator = dataclasses.replace(generator, mesh=mesh, denoiser=run.denoiser)
    batch, classes = generator.call_size, generator.num_classes
    weights = jax.device_get(run.sampled_variables)

    def sample(seeds: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return generator.sample(weights, seeds, labels)

    program = export.export(jax.jit(sample), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((batch,), jnp.uint32),
        jax.ShapeDtypeStruct((batch, max(classes, 1)), jnp.float32),
    )
    facts = {
        **about,
        "inputs": {"seeds": [batch], "labels": [batch, max(classes, 1)]},
        "images": [batch, *generator.image_shape],
        "num_classes": classes,
        "platforms": PLATFORMS,
        "jax": jax.__version__,
    }
    data = program.serialize()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_bytes(data)
        write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
