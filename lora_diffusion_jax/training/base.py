"""The frozen weights of a run, stored once: `base/` in its directory, to which its checkpoints refer.

A checkpoint names the folder, and the SHA-256 of its SHA256SUMS, which cover all files in it. Older versions
kept the frozen weights in every checkpoint; such checkpoints refer to no base.
"""

import re
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from lora_diffusion_jax import files, processes, remote
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.untrusted import read_json

METADATA = "_CHECKPOINT_METADATA"  # orbax's, in a checkpoint
WEIGHTS = "weights"  # in the base's folder, as in a checkpoint's
_NAME = re.compile("base(-[1-9][0-9]{0,5})?")
_LIMIT = 1800.0  # seconds that other processes wait until process 0 has written or summed it
Reference = dict[str, str]  # folder, sha256


def is_base(name: str) -> bool:
    """Whether a folder of this name in a run's directory is a base."""
    return bool(_NAME.fullmatch(name))


def reference_of(checkpoint: Path) -> Reference | None:
    """The base that a checkpoint refers to; None if it refers to none, or its metadata are damaged."""
    try:
        found = read_json(checkpoint / METADATA)["custom_metadata"]["base"]
        name, digest = found["folder"], found["sha256"]
        if is_base(name) and re.fullmatch("[0-9a-f]{64}", digest):
            return {"folder": name, "sha256": digest}
    except (UserError, KeyError, TypeError):
        pass
    return None


def folder_of(checkpoint: Path) -> Path | None:
    """The folder of the base that a checkpoint refers to, if it does."""
    found = reference_of(checkpoint)
    return checkpoint.parents[1] / found["folder"] if found else None


def fetch(checkpoint: Path) -> None:
    """Brings the base of a checkpoint into the mirror, unless it is there."""
    folder = folder_of(checkpoint)
    if folder is not None and not (folder / files.SUMS).exists():
        remote.fetch(folder, remote.listing(folder))


def check(checkpoint: Path) -> None:
    """Raises UserError if the base that a checkpoint refers to is missing, or another one."""
    found, folder = reference_of(checkpoint), folder_of(checkpoint)
    if found is None or folder is None:
        return
    sums = folder / files.SUMS
    if not sums.is_file():
        problem = "is missing" if not folder.is_dir() else f"has no {files.SUMS}"
    elif files.sha256(sums) != found["sha256"]:
        problem = "is not the one they were saved with"
    elif damage := files.check_sums(folder):
        problem = f"has changed ({damage})"
    else:
        return
    raise UserError(
        f"{folder}, which holds the frozen weights of the checkpoints in {checkpoint.parent}, {problem}. "
        "Restore it from a copy of the run; the checkpoints hold only what is trained on it."
    )


def write(workdir: Path, frozen: PyTree, options: ocp.options.MultiprocessingOptions) -> Reference:
    """Saves frozen weights; all processes must call it.

    Args:
        workdir: the run's directory.
        frozen: the weights, which no checkpoint of the run there is saved with yet.
        options: for orbax: who writes.

    Returns:
        What checkpoints have to say of them.

    Raises:
        UserError: the directory, or its store, cannot be written.
    """
    with files.disk_errors(workdir):
        if not remote.is_mirrored(workdir):
            name = processes.from_leader("choosing the base's folder", lambda: _choose(workdir))
            _save(workdir / name, frozen, options)
            return processes.from_leader("summing the base", lambda: _sum(workdir / name), _LIMIT)
        if not processes.alone():
            frozen = jax.tree.map(processes.fetch, frozen)

        def write_alone() -> Reference:
            folder = workdir / _choose(workdir)
            _save(folder, frozen, options)
            found = _sum(folder)
            remote.push(folder, last=[files.SUMS])
            return found

        return processes.from_leader("saving the base", write_alone, _LIMIT)


def _choose(workdir: Path) -> str:
    """A free name in the run's directory; a base that no checkpoint can refer to is removed first."""
    if remote.is_mirrored(workdir):
        there = {name.split("/")[0] for name in remote.listing(workdir)}
    else:
        there = {path.name for path in workdir.iterdir()}
    bases = sorted(filter(is_base, there))
    if not _has_checkpoints(workdir):
        for name in bases:
            if remote.is_mirrored(workdir):
                remote.remove(workdir / name, remote.listing(workdir / name))
            else:
                files.make_folder(workdir / name, workdir)  # an error if it is a link
                shutil.rmtree(workdir / name)
        bases = []
    return next(n for k in range(1, 10**6) if (n := f"base-{k}" if k > 1 else "base") not in bases)


def _has_checkpoints(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    if remote.is_mirrored(folder):
        return bool(remote.listing(folder))
    return folder.is_dir() and any(folder.iterdir())


def _save(folder: Path, frozen: PyTree, options: ocp.options.MultiprocessingOptions) -> None:
    if processes.is_leader():
        files.make_folder(folder, folder.parent)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=options) as writer:
        writer.save(folder / WEIGHTS, ocp.args.PyTreeSave({"frozen": frozen}))


def _sum(folder: Path) -> Reference:
    files.write_sums(folder)
    return {"folder": folder.name, "sha256": files.sha256(folder / files.SUMS)}
