"""Checkpoint files become workdirs."""

import functools
import os
from pathlib import Path

from ml_collections import ConfigDict

from lora_diffusion_jax import files, interop, lora, processes, remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training import checkpoint, workdir


def import_checkpoint(
    source: str | Path,
    directory: str | os.PathLike,
    base: str | None = None,
    config: ConfigDict | None = None,
) -> int:
    """Turns a checkpoint file into a workdir that sample, train and evaluate accept.

    Args:
        source: an official snapshot or state dict, or a file that --mode=export wrote.
        directory: the workdir to create.
        base: for a file of adapters alone, the file or workdir of the network they belong to.
        config: of the network, which a state dict needs and other files must agree with.

    Returns:
        Number of parameters.

    Raises:
        UserError: the file cannot be read, or the workdir already holds a run.
    """
    if has_checkpoint(directory):
        raise UserError(f"{directory} already holds a run; choose another workdir.")
    for name, path in (("source", source), ("base", base)):
        _check_path(name, path)
    loaded = interop.load_pretrained(source, base, config)
    params = loaded.variables["params"]
    weights = checkpoint.SavedWeights(
        params=params, frozen={}, buffers=loaded.variables.get("buffers", {}), ema=params
    )
    with workdir.open_workdir(directory, loaded.config.to_dict()) as path, files.disk_errors(path):
        checkpoint.save_weights(path, weights)
    return lora.count(params)


def _check_path(name: str, path: str | os.PathLike | None) -> None:
    """Raises UserError for a path where there is nothing, or a folder that is no run."""
    expected = "a .pkl snapshot, a .pt state dict, a .safetensors file, or the workdir of a run"
    if path is None:
        return
    found = Path(remote.local(path, f"--{name}"))
    if not found.exists():
        raise UserError(f"--{name}={path} does not exist; give {expected}.")
    if found.is_dir() and not (found / workdir.CONFIG).exists():
        raise UserError(
            f"--{name}={path} is a folder without {workdir.CONFIG}, so it is no run; give {expected}."
        )


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run has saved anything, as process 0 sees it: file systems may differ for a while."""
    look = functools.partial(checkpoint.saved_steps, directory)
    return bool(processes.from_leader("looking for checkpoints", look))
