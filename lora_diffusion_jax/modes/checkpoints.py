"""Checkpoint files in, safetensors out."""

import os
from pathlib import Path

from lora_diffusion_jax import files, interop, lora, processes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.interop.export import Weights
from lora_diffusion_jax.training import checkpoint, workdir


def import_checkpoint(
    source: str | Path, directory: str | os.PathLike, base: str | None = None
) -> int:
    """Turns a checkpoint file into a workdir that sample, train and evaluate accept.

    Args:
        source: an official snapshot, or a file that --mode=export wrote.
        directory: the workdir to create.
        base: for a file of adapters alone, the file or workdir of the network they belong to.

    Returns:
        Number of parameters.

    Raises:
        UserError: the file cannot be read, or the workdir already holds a run.
    """
    if has_checkpoint(directory):
        raise UserError(f"{directory} already holds a run; choose another workdir.")
    loaded = interop.load_pretrained(source, base)
    params = loaded.variables["params"]
    weights = checkpoint.SavedWeights(
        params=params, frozen={}, buffers=loaded.variables.get("buffers", {}), ema=params
    )
    with workdir.open_workdir(directory, loaded.config.to_dict()) as path, files.disk_errors(path):
        checkpoint.save_weights(path, weights)
    return lora.count(params)


def export_checkpoint(
    run: Pretrained, out: str | Path, *, weights: Weights, adapters_only: bool
) -> None:
    """Writes a run's weights as safetensors with official names, whole or the adapters alone.

    Raises:
        UserError: the official format cannot express the network, or the file cannot be written.
    """
    interop.export_network(
        out, run.variables, run.config, weights=weights, adapters_only=adapters_only
    )


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run has saved anything, as process 0 sees it: file systems may differ for a while."""

    def look() -> bool:
        exists = (Path(directory) / checkpoint.FOLDER).is_dir()
        return exists and bool(checkpoint.saved_steps(directory))

    return processes.from_leader("looking for checkpoints", look)
