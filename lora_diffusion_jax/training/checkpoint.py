"""Checkpoints of a run: saved in the background, restored onto any mesh, read by others."""

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_diffusion_jax import processes
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.sharding import path_of
from lora_diffusion_jax.training.workdir import Say, gone, plain_disk_errors

FOLDER = "checkpoints"
# Parts of a checkpoint, restored one by one: sampling reads the weights alone.
PARTS = ("weights", "optimizer", "interval")
# Seconds that processes wait for one another's reading. Where one of them cannot read its share, the
# others are held by orbax's own barrier first, which gives up after 300 s.
RESTORE_LIMIT = 1800.0
Parts = Mapping[str, PyTree]


@flax.struct.dataclass
class SavedWeights:
    """The network of a checkpoint: what is trained, frozen and constant, and the average."""

    params: PyTree
    frozen: PyTree
    buffers: PyTree
    ema: PyTree


class Checkpoints:
    """The checkpoints of one run, for the process(es) that train it.

    Saving copies the arrays to the host and returns; a thread writes them to a directory that gets
    its name when it is whole. What goes wrong there is raised by the next call of `check`, `save`
    or `wait`.

    Args:
        workdir: the run's directory.
        keep: the newest checkpoints to keep, >= 1.
        keep_step: step -> is its checkpoint kept for good, besides.
        say: where to tell of checkpoints that could not be read.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int = 3,
        keep_step: Callable[[int], bool] = lambda step: False,
        say: Say = print,
    ):
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints; at least 1 is needed to resume.")
        self.directory = Path(workdir).absolute() / FOLDER
        self.say = say
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Newest(keep, keep_step),
            enable_async_checkpointing=True,
            # Made in the background, a folder that cannot be made lets the other threads wait for
            # it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_all_processes(),
        )
        self.saving = False  # a save was begun whose outcome is not known yet

        def make_folder() -> None:
            with plain_disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)

        processes.from_leader("making the folder of checkpoints", make_folder)
        with plain_disk_errors(self.directory):
            self.manager = _manager(self.directory, options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # With an error on its way, one from the background must not take its place.
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self.manager.latest_step()

    def save(self, step: int, parts: Parts) -> None:
        """Starts to save; a step that is already there is left as it is.

        Raises:
            UserError: the folder is gone (orbax would make a new one), or cannot be written.
        """
        if processes.is_leader() and not self.directory.is_dir():
            raise gone(self.directory)
        if step in self.manager.all_steps():
            return
        items = {name: ocp.args.PyTreeSave(part) for name, part in parts.items()}
        with plain_disk_errors(self.directory):
            self.saving = True
            self.manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises what went wrong in the background since the last call; costs next to nothing."""
        if self.saving and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when all is on disk."""
        with plain_disk_errors(self.directory):
            self.saving = False
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def close(self) -> None:
        """Waits and ends the threads."""
        try:
            self.wait()
        finally:
            self.manager.close()

    def restore(self, like: Parts) -> tuple[int, dict[str, PyTree]] | None:
        """The newest checkpoint that can be read, on the shardings of `like`.

        Unreadable ones (cut short by a full disk, a copy or a machine's death) are told of and
        renamed to unreadable-STEP, once an older one was read.

        Args:
            like: shapes with shardings, part by part; parts that a checkpoint lacks are left out.

        Returns:
            (step, parts), or None when there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another network; or there are some, and all unreadable.
        """
        found, torn = _newest_readable(self.manager, like, self.say, self.directory)
        if found and torn:
            _set_aside(self.directory, torn)
            self.manager.reload()
        return found


class _Newest:
    """Keeps the newest n checkpoints and those of chosen steps."""

    def __init__(self, keep: int, keep_step: Callable[[int], bool]):
        self.keep, self.keep_step = keep, keep_step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = len(checkpoints) - self.keep
        return [i >= newest or self.keep_step(c.step) for i, c in enumerate(checkpoints)]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Leaves out orbax's lines: what goes wrong is raised to us, with a trace of its own."""
    return "orbax" not in Path(record.pathname).parts


def _all_processes() -> ocp.options.MultiprocessingOptions:
    """Naming them lets orbax wait over the coordination service, with a time limit.

    Otherwise it waits by a collective of the devices, in a thread, between those of the steps.
    """
    if processes.alone():
        return ocp.options.MultiprocessingOptions()
    everyone = set(range(jax.process_count()))
    return ocp.options.MultiprocessingOptions(active_processes=everyone)


def _manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    logging.getLogger("absl").addFilter(_not_from_orbax)
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in PARTS}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _newest_readable(
    manager: ocp.CheckpointManager,
    like: Parts | None,
    say: Say,
    directory: Path,
    steps: Sequence[int] | None = None,
) -> tuple[tuple[int, dict[str, PyTree]] | None, list[int]]:
    """((step, parts) or None, the newer steps that could not be read)."""
    torn, reason = [], None
    for step in sorted(manager.all_steps() if steps is None else steps, reverse=True):
        try:
            parts = _read(manager, step, like, directory)
        except UserError:
            raise
        # Whatever a damaged file makes the readers raise: a missing piece, JSON, decompression.
        except Exception as error:
            parts, reason = None, error
        reasons = processes.exchange(
            f"reading checkpoint {step}", _brief(reason) if parts is None else "", RESTORE_LIMIT
        )
        if not any(reasons):
            return (step, parts), torn
        torn.append(step)
        say(f"checkpoint {step} in {directory} cannot be read ({max(reasons)}); skipped")
    if torn:
        raise UserError(
            f"No checkpoint in {directory} can be read (tried {torn}): {max(reasons)}. Copy them "
            "again, or move the folder away to start from scratch."
        ) from reason
    return None, []


def _read(
    manager: ocp.CheckpointManager, step: int, like: Parts | None, directory: Path
) -> dict[str, PyTree]:
    """The parts of one checkpoint; without `like` the weights, as numpy arrays."""
    saved = manager.metadata(step).item_metadata
    trees = {name: saved[name].tree for name in PARTS if saved.get(name) is not None}
    if "weights" not in trees:
        raise FileNotFoundError("it has no weights")
    if like is None:
        to_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), trees["weights"]
        )
        wanted = {"weights": ocp.args.PyTreeRestore(trees["weights"], restore_args=to_numpy)}
    else:
        like = {name: part for name, part in like.items() if name in trees}
        for name, part in like.items():
            _check_fit(part, trees[name], directory / str(step) / name)
        wanted = {
            name: ocp.args.PyTreeRestore(
                part, restore_args=ocp.checkpoint_utils.construct_restore_args(part)
            )
            for name, part in like.items()
        }
    restored = manager.restore(step, args=ocp.args.Composite(**wanted))
    return {name: restored[name] for name in wanted}


def _check_fit(like: PyTree, saved: PyTree, path: Path) -> None:
    """Refuses a checkpoint of another network, naming the arrays that differ."""
    here = {path_of(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(like)}
    there = {path_of(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(saved)}
    wrong = [
        name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)
    ]
    if wrong:
        lines = [
            f"  {name}: {there.get(name, 'absent')} saved, {here.get(name, 'absent')} wanted"
            for name in wrong[:8]
        ]
        raise UserError(
            f"{path} is of another network; {len(wrong)} arrays differ:\n" + "\n".join(lines) + "\n"
            "Use the config that the run was started with, or another workdir."
        )


def _set_aside(directory: Path, torn: Sequence[int]) -> None:
    """Renames unreadable checkpoints, so that their steps can be saved anew and nothing is lost."""

    def rename() -> None:
        with plain_disk_errors(directory):
            for step in torn:
                names = itertools.chain([""], map("-{}".format, itertools.count(2)))
                targets = (directory / f"unreadable-{step}{name}" for name in names)
                (directory / str(step)).rename(next(t for t in targets if not t.exists()))

    processes.from_leader("setting unreadable checkpoints aside", rename)


def _brief(error: BaseException | None) -> str:
    """The first line of an error, cut to a readable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _reader(workdir: str | os.PathLike) -> tuple[ocp.CheckpointManager, Path]:
    directory = Path(workdir).absolute() / FOLDER
    if not directory.is_dir():
        raise UserError(
            f"{workdir} has no checkpoints (looked for {directory}). Give the workdir of a "
            "training run that has saved one."
        )
    # Without its read_only, which warns at every opening; nothing here writes.
    options = ocp.CheckpointManagerOptions(
        create=False, save_root_metadata=False, multiprocessing_options=_all_processes()
    )
    return _manager(directory, options), directory


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps with a checkpoint, ascending.

    Raises:
        UserError: the directory has no checkpoints folder.
    """
    manager, _ = _reader(workdir)
    try:
        return sorted(manager.all_steps())
    finally:
        manager.close()


def open_for_reading(
    workdir: str | os.PathLike,
    step: int | None = None,
    *,
    like: SavedWeights | None = None,
    say: Say = print,
) -> tuple[int, SavedWeights]:
    """The weights of a checkpoint, without touching the run (it may be training).

    Args:
        workdir: the run's directory.
        step: which checkpoint; None: the newest that can be read.
        like: shapes with shardings to restore onto; None: numpy arrays.
        say: where to tell of checkpoints that could not be read.

    Returns:
        (step, weights), for `state.ema_variables` and `state.raw_variables`.

    Raises:
        UserError: there is no such checkpoint, or it is of another network than `like`.
    """
    manager, directory = _reader(workdir)
    try:
        steps = processes.from_leader("listing checkpoints", lambda: sorted(manager.all_steps()))
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{directory} has no checkpoint{'' if step is None else f' {step}'}; there are: "
                f"{', '.join(map(str, steps)) or 'none yet'}."
            )
        parts = None if like is None else {"weights": _weights_part(like)}
        chosen = steps if step is None else [step]
        (step, restored), _ = _newest_readable(manager, parts, say, directory, chosen)
        weights = restored["weights"]
        return step, SavedWeights(**{name: weights.get(name, {}) for name in _FIELDS})
    finally:
        manager.close()


_FIELDS = ("params", "frozen", "buffers", "ema")


def _weights_part(weights: Any) -> dict[str, PyTree]:
    return {name: getattr(weights, name) for name in _FIELDS}


def to_parts(state: Any, metrics: PyTree) -> dict[str, PyTree]:
    """A training state and its running metrics as plain nested dictionaries, part by part."""
    fields = flax.serialization.to_state_dict(state)
    weights = {name: fields.pop(name) for name in _FIELDS}
    return {
        "weights": weights,
        "optimizer": fields,
        "interval": flax.serialization.to_state_dict(metrics),
    }


def from_parts(parts: Parts, state: Any, metrics: PyTree) -> tuple[Any, PyTree]:
    """The inverse of `to_parts`; what `parts` lacks is taken from the state and metrics given."""
    present = {**flax.serialization.to_state_dict(state)}
    present |= parts.get("weights", {}) | parts.get("optimizer", {})
    if "interval" in parts:
        metrics = flax.serialization.from_state_dict(metrics, parts["interval"])
    return flax.serialization.from_state_dict(state, present), metrics


def save_weights(workdir: str | os.PathLike, weights: Any, step: int = 0) -> None:
    """Writes a checkpoint of weights alone, which sampling reads and training starts from.

    Args:
        workdir: the run's directory.
        weights: anything with params, frozen, buffers and ema.
        step: its number.
    """
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(step, {"weights": _weights_part(weights)})
