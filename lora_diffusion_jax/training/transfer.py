"""Checkpoints of a run in an object store: which objects make one, how it comes here, goes there and ends."""

import re
import shutil
from pathlib import Path

from lora_diffusion_jax import files, remote
from lora_diffusion_jax.training import base

STEP = re.compile("0|[1-9][0-9]{0,11}")  # the name of a complete checkpoint
# One of these makes a folder in a store a checkpoint; they are written last, and removed first.
_MARKS = (base.METADATA, files.SUMS)


def stored_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in the store, ascending.

    Args:
        directory: the folder of checkpoints, in the mirror.
    """
    objects = (name.split("/") for name in remote.listing(directory))
    marked = {parts[0] for parts in objects if len(parts) == 2 and parts[1] in _MARKS}
    return sorted(int(name) for name in marked if STEP.fullmatch(name))


def fetch(folder: Path, *, whole: bool = True) -> None:
    """Brings a checkpoint and its base into the mirror; does nothing for a path elsewhere.

    Args:
        folder: of the checkpoint.
        whole: all of it, or what reading its weights takes.
    """
    if not remote.is_mirrored(folder):
        return
    names = remote.listing(folder)
    shutil.rmtree(folder, ignore_errors=True)
    remote.fetch(folder, [n for n in names if whole or "/" not in n or n.startswith("weights/")])
    base.fetch(folder)


def push(folder: Path) -> None:
    """Carries a checkpoint into the store; what an interrupted attempt has left there goes first."""
    remote.remove(folder, remote.listing(folder))
    remote.push(folder, last=_MARKS[::-1])


def remove(folder: Path) -> None:
    """Removes a checkpoint from the store, first what makes it one."""
    names = remote.listing(folder)
    remote.remove(folder, [*_MARKS, *(name for name in names if name not in _MARKS)])


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest checkpoints from the store."""
    for step in stored_steps(directory)[:-keep]:
        remove(directory / str(step))


def remove_unfinished(directory: Path) -> None:
    """Removes from the store what a kill has left of a checkpoint that was being saved or removed."""
    complete = set(map(str, stored_steps(directory)))
    there = {name.split("/")[0] for name in remote.listing(directory)}
    for name in sorted(there - complete):
        if STEP.fullmatch(name):
            remove(directory / name)
