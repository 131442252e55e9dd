"""Checkpoints of a run: saved in the background, restored onto any mesh, read by others.

Orbax writes no checksums. Once a checkpoint is complete, a thread writes the SHA-256 of all its files
into its SHA256SUMS, which every reading compares. A checkpoint that is damaged or lacks a part is set
aside, and the one before it is used. Frozen weights are stored once (`base`).

Of a run in an object store (`remote`) the checkpoints are saved in its mirror by process 0, which gets all
arrays, and carried into the store as whole files by that thread; all processes fetch and read them.
"""

import contextlib
import functools
import logging
import operator
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_diffusion_jax import files, processes, remote
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.paths import path_of
from lora_diffusion_jax.training import base, transfer
from lora_diffusion_jax.training.state import SavedWeights, TrainState
from lora_diffusion_jax.training.writers import log
from lora_diffusion_jax.untrusted import read_json

FOLDER = "checkpoints"
# Parts of a checkpoint, restored one by one: sampling reads the weights alone.
PARTS = ("weights", "optimizer", "interval")
WEIGHTS = ("params", "frozen", "buffers", "ema")
# Seconds that processes wait for each other's reading. If one cannot read its share, orbax's own
# barrier holds the others first, and gives up after 300 s.
RESTORE_LIMIT = 1800.0
# Seconds for the save that was begun when this process fails; it may be waiting for other processes.
LAST_SAVE_LIMIT = 30.0
Parts = Mapping[str, PyTree]

# What ended orbax's thread of a save. It logs that at once, but raises it only when all processes have saved.
_thread_errors: list[BaseException] = []


def _is_of_others(record: logging.LogRecord) -> bool:
    """Drops orbax's log records: its errors reach us as exceptions."""
    if "orbax" not in Path(record.pathname).parts:
        return True
    if record.threadName == "async_save" and record.exc_info and record.exc_info[1]:
        _thread_errors.append(record.exc_info[1])
    return False


logging.getLogger("absl").addFilter(_is_of_others)
# A full disk fails hundreds of its tasks, of which it awaits one; asyncio would print the others.
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run, for the process(es) that train it.

    Saving copies the arrays to the host and returns; a thread writes them to a directory that gets
    its name once it is complete. Errors of that thread are raised by the next call of `check`, `save`
    or `wait`.

    Args:
        workdir: the run's directory.
        keep: the newest checkpoints to keep, >= 1.

    Attributes:
        waited: seconds that `save` has taken so far.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3):
        self.directory = Path(workdir).absolute() / FOLDER
        self.mirrored, self.keep = remote.is_mirrored(self.directory), keep
        self.waited = 0.0
        self.saving = False  # a save was begun whose outcome is not known yet
        self.failed = False  # here, while orbax waits for other processes
        self.base: base.Reference | None = None  # of the frozen weights, once they are stored
        self.gathered: int | None = None  # the last step whose arrays process 0 got from all
        self.summing: threading.Thread | None = None  # writes the checksums of the last one
        self.push_error: Exception | None = None  # of that thread
        self.writers = _this_process() if self.mirrored else _all_processes()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1 if self.mirrored else keep,
            enable_async_checkpointing=True,
            # If orbax creates folders in the background and one cannot be created, the other threads
            # wait for it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            cleanup_tmp_directories=True,  # what a kill left unfinished
            create=False,  # it would follow links
            multiprocessing_options=self.writers,
        )

        def create_folder() -> None:
            with files.disk_errors(self.directory):
                files.make_folder(self.directory, self.directory.parent)
                for path in self.directory.iterdir():
                    if path.is_symlink():  # orbax would write or delete what it points to
                        raise UserError(
                            f"{path} is a link; a run writes its checkpoints into its own workdir. Remove it."
                        )
                    # orbax might take it for a later step, and save nothing more
                    if path.name.isnumeric() and not transfer.STEP.fullmatch(path.name):
                        raise UserError(
                            f"{path} is named like a checkpoint, but no run writes that number. Remove it."
                        )

        _where_it_is(self.directory, "creating the folder of checkpoints", create_folder)
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in PARTS}
        with files.disk_errors(self.directory):
            self.held = files.Held(self.directory)
            self.manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *trace: Any) -> None:
        try:
            if error is not None and not processes.raised_by_all(error):
                self.failed = not self._saved_within(LAST_SAVE_LIMIT)
            if not self.failed:
                self.wait()
        except Exception:
            if kind is None:  # else it would replace the error that is being raised
                raise
        finally:
            self._join()
            if not self.failed:  # else orbax would await the others, which `ending_together` ends
                self.manager.close()
            self.held.close()

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self.manager.latest_step()

    def save(self, step: int, parts: Parts) -> None:
        """Starts to save; does nothing if that step was saved before.

        Raises:
            UserError: the folder has disappeared (orbax would create a new one), or cannot be written.
        """
        if processes.is_leader() and not self.held.is_there():
            raise files.disappeared(self.directory)
        if step in self.manager.all_steps() or step == self.gathered:
            return
        began = time.perf_counter()
        parts = self._without_base(parts)
        if self.mirrored and not processes.alone():
            parts, self.gathered = jax.tree.map(processes.fetch, dict(parts)), step
            if not processes.is_leader():
                return
        items = {name: ocp.args.PyTreeSave(part) for name, part in parts.items()}
        self.wait()  # saving may delete the checkpoint whose checksums are being computed
        with self._save_errors():
            self.saving = True
            _thread_errors.clear()
            about = {"base": self.base} if self.base else None
            self.manager.save(step, args=ocp.args.Composite(**items), custom_metadata=about)
        self.waited += time.perf_counter() - began

    def _without_base(self, parts: Parts) -> Parts:
        """The parts without the frozen weights, which are stored once, before the first checkpoint."""
        weights = parts["weights"]
        if not jax.tree.leaves(weights.get("frozen")):
            return parts
        if self.base is None:
            self.base = base.write(self.directory.parent, weights["frozen"], self.writers)
        return {**parts, "weights": {**weights, "frozen": {}}}

    def check(self) -> None:
        """Raises what went wrong in the background since the last call; costs next to nothing."""
        self._raise_push_error()
        if self.saving and (self._fails() or not self.manager.is_saving_in_progress()):
            self._finish()

    def wait(self) -> None:
        """Returns when everything is on disk, or in the store."""
        self._finish()
        self._join()
        self._raise_push_error()

    def _finish(self) -> None:
        """Waits for the save that was begun, and begins to write its checksums."""
        with self._save_errors():
            saving, self.saving = self.saving, False  # first, so that an error is raised once
            if saving and not self._saved_within(float("inf")):
                self.failed = True
                raise _thread_errors[0] if self._fails() else files.disappeared(self.directory)
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        if saving and processes.is_leader():
            folder = self.directory / str(self.manager.latest_step())
            self.summing = threading.Thread(target=self._complete, args=(folder,))
            self.summing.start()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """`files.disk_errors`; without the folder, orbax fails in many ways and words, or goes on."""
        try:
            with files.disk_errors(self.directory):
                yield
        except Exception as error:
            if not self.held.is_there():
                raise files.disappeared(self.directory) from error
            cause = error.__cause__
            # An OSError, but orbax's own is not of the disk.
            if isinstance(cause, TimeoutError) and cause.errno is None and not processes.alone():
                raise RuntimeError(f"lost connection to another process: {cause}") from cause
            raise

    def _saved_within(self, limit: float) -> bool:
        """Whether the save that was begun ends within so many seconds.

        Where the folder has disappeared, orbax waits for ever: for another process, or for the file
        system.
        """
        deadline = time.monotonic() + limit
        while self.manager.is_saving_in_progress():
            if self._fails() or time.monotonic() > deadline or not self.held.is_there():
                return False
            time.sleep(0.005)
        return not self._fails()

    def _complete(self, folder: Path) -> None:
        """Writes the checksums of a checkpoint; carries it, and what the run has logged, into a store."""
        _write_sums(folder)
        if not self.mirrored:
            return
        try:
            # First: what was logged before the checkpoint belongs to it.
            remote.push_small(self.directory.parent)
            transfer.push(folder)
            transfer.prune(self.directory, self.keep)
        except Exception as error:
            self.push_error = error

    def _fails(self) -> bool:
        """Whether the save has failed in this process, one of several."""
        return bool(_thread_errors) and not processes.alone()

    def _raise_push_error(self) -> None:
        error, self.push_error = self.push_error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self.summing is not None:
            self.summing.join()
            self.summing = None

    def restore(self, like: Parts) -> tuple[int, dict[str, PyTree]] | None:
        """The newest checkpoint that is whole, on the shardings of `like`.

        Others (changed bits, cut short by a full disk, a copy or a crash) are logged, and renamed to
        unreadable-STEP once an older one was read.

        Args:
            like: shapes with shardings, part by part.

        Returns:
            (step, parts), the weights alone if nothing else was saved (`save_weights`); or None when
            there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another network; or there are some, and all unreadable.
        """
        # Process 0's listing for all: on a network file system the others may see an older one.
        steps = processes.from_leader("listing steps", lambda: saved_steps(self.directory.parent))
        if not steps:
            return None
        step, parts, unreadable = _read_newest(self.directory, steps, like)
        self.base = base.reference_of(self.directory / str(step))
        if unreadable:
            _set_aside(self.directory, unreadable)
        if unreadable or self.mirrored:  # the one read was fetched
            self.manager.reload()
        if self.mirrored and processes.is_leader():
            transfer.remove_unfinished(self.directory)
        return step, parts


def _where_it_is(directory: Path, name: str, work: Callable[[], None]) -> None:
    """Calls `work` for a folder in process 0; in all if each of them has its own, in the mirror."""
    if remote.is_mirrored(directory):
        work()
    else:
        processes.from_leader(name, work)


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Has orbax save in this process alone, into a folder that no other one sees."""
    if processes.alone():
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


def _all_processes() -> ocp.options.MultiprocessingOptions:
    """Naming all processes lets orbax wait through the coordination service, with a time limit.

    Otherwise it waits by a collective of the devices, in a thread, between those of the steps.
    """
    if processes.alone():
        return ocp.options.MultiprocessingOptions()
    everyone = set(range(jax.process_count()))
    return ocp.options.MultiprocessingOptions(active_processes=everyone)


def _read_newest(
    directory: Path, steps: Sequence[int], like: Parts | None
) -> tuple[int, dict[str, PyTree], list[int]]:
    """(step, its parts, the newer steps that cannot be read); see `_read` for `like`."""
    unreadable: list[int] = []
    for step in reversed(steps):
        parts: dict[str, PyTree] = {}
        error = None
        folder = directory / str(step)
        try:
            if damage := _check_or_fetch(folder, whole=like is not None):
                raise ValueError(damage)
            parts = _read(folder, like)
        except UserError:
            raise
        # Whatever damaged files make the readers raise: a missing piece, JSON, decompression.
        except Exception as caught:
            error = caught
        reason = "" if error is None else _one_line(error)
        reasons = processes.exchange(f"reading checkpoint {step}", reason, RESTORE_LIMIT)
        if not any(reasons):
            return step, parts, unreadable
        unreadable.append(step)
        # max: processes that could read it have the reason "".
        log(f"checkpoint {step} in {directory} cannot be read ({max(reasons)}); skipped")
    raise UserError(
        f"No checkpoint in {directory} can be read (tried {unreadable}): {max(reasons)}. Copy them "
        "again, or move the folder away to start from scratch."
    ) from error


def _check_or_fetch(folder: Path, whole: bool) -> str:
    """What is wrong with a checkpoint, '' if nothing is; one in a store is fetched into the mirror.

    Args:
        folder: of the checkpoint.
        whole: all of it, or its weights alone.
    """
    problem = functools.partial(find_damage, folder, PARTS if whole else ())
    if not remote.is_mirrored(folder):
        return processes.from_leader("checking a checkpoint", problem, RESTORE_LIMIT)
    transfer.fetch(folder, whole=whole)
    if damage := problem():  # perhaps on the way
        transfer.fetch(folder, whole=whole)
        damage = problem()
    return damage


def _one_line(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0][:200]


def _write_sums(folder: Path) -> None:
    """Writes the checksums of a checkpoint; an error is only logged, as the checkpoint itself is whole."""
    try:
        files.write_sums(folder)
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        log(f"warning: {folder} has no checksums ({reason}); damage to it would go unnoticed")


def find_damage(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """What is wrong with a checkpoint, '' if nothing is.

    Checksums are compared where it has some; those saved by older versions have none.

    Args:
        folder: of the checkpoint.
        parts: those that must be there, unless weights alone were saved; () to read the weights, of
            which alone the checksums are compared then.

    Raises:
        UserError: the base that it refers to is missing or has changed: not this checkpoint alone.
    """
    try:
        saved = read_json(folder / base.METADATA)["item_handlers"].keys()
    except (UserError, KeyError, TypeError, AttributeError):  # unreadable, or of another form
        return f"its {base.METADATA} is missing or damaged"
    weights_alone = saved == {"weights"} and folder.name == "0"
    for name in ("weights",) if weights_alone else parts or ("weights",):
        if name not in saved or not (folder / name).is_dir():
            advice = "" if name == "weights" else " (init_from starts from its weights)"
            return f"it has no {name}{advice}"
    try:
        damage = files.check_sums(folder, lambda name: bool(parts) or name.startswith("weights/"))
    except OSError as error:  # of the disk
        return f"{error.filename}: {error.strerror}"
    if damage is None:
        _tell_unverified(folder.parent)
    if not damage:
        base.check(folder)
    return damage or ""


def is_verified(folder: Path) -> bool:
    """Whether a checkpoint has checksums, so that `find_damage` compared them."""
    return (folder / files.SUMS).exists()


@functools.cache
def _tell_unverified(directory: Path) -> None:
    log(
        f"{directory} has checkpoints without checksums, saved by an older version or just before a kill: "
        "not verified"
    )


def _read(folder: Path, like: Parts | None) -> dict[str, PyTree]:
    """The parts of one checkpoint as `like` has them; without `like` the weights, as numpy arrays."""
    handler, found = ocp.PyTreeCheckpointHandler(), {}
    with ocp.Checkpointer(handler, multiprocessing_options=_all_processes()) as reader:
        for path in (folder / name for name in (like or ["weights"])):
            if not path.is_dir():  # weights alone were saved
                continue
            stored = base.folder_of(folder) if path.name == "weights" else None
            places = [path] if stored is None else [path, stored / base.WEIGHTS]
            saved = [handler.metadata(place).tree for place in places]
            if like is not None:
                _check_fit(like[path.name], functools.reduce(operator.or_, saved), path)
            pieces = []
            for place, tree in zip(places, saved, strict=True):
                how = _restore_args(tree, None if like is None else like[path.name])
                pieces.append(reader.restore(place, ocp.args.PyTreeRestore(restore_args=how)))
            found[path.name] = functools.reduce(operator.or_, pieces)
    return found


def _restore_args(saved: PyTree, like: PyTree | None) -> PyTree:
    """How orbax reads a saved tree: as numpy arrays, or as `like` has its fields."""
    if like is None:  # the devices that saved it need not exist here
        return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    fields = {name: like[name] if jax.tree.leaves(saved[name]) else {} for name in saved}
    return ocp.checkpoint_utils.construct_restore_args(fields)


def _check_fit(like: PyTree, saved: PyTree, path: Path) -> None:
    """Refuses a checkpoint of another network, naming the arrays that differ."""
    here, there = (
        {path_of(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (like, saved)
    )
    wrong = [
        f"  {name}: {there.get(name, 'absent')} saved, {here.get(name, 'absent')} wanted"
        for name in sorted(dict(here.items() ^ there.items()))
    ]
    if wrong:
        raise UserError(
            f"{path} is of another network; {len(wrong)} arrays differ:\n"
            + "\n".join(wrong[:8])
            + "\nUse the config that the run was started with, or another workdir."
        )


def _set_aside(directory: Path, unreadable: Sequence[int]) -> None:
    """Renames unreadable checkpoints, so that their steps can be saved again and nothing is lost."""

    def rename() -> None:
        with files.disk_errors(directory):
            if remote.is_mirrored(directory):  # their names are taken
                for path in set_aside_before(directory.parent):
                    path.mkdir(parents=True, exist_ok=True)
            for step in unreadable:
                aside = files.set_aside(directory / str(step), f"unreadable-{step}")
                if remote.is_mirrored(aside) and processes.is_leader():
                    remote.push(aside)
                    transfer.remove(directory / str(step))

    _where_it_is(directory, "setting unreadable checkpoints aside", rename)


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps with a checkpoint, ascending; none before a run has saved anything.

    Other names, such as 003, are no checkpoints: opened by its number, each would be another folder.
    """
    directory = Path(workdir).absolute() / FOLDER
    if remote.is_mirrored(directory):
        return transfer.stored_steps(directory)
    if not directory.is_dir():
        return []
    # One that is not complete has a name beside its number.
    return sorted(
        int(path.name) for path in directory.iterdir() if transfer.STEP.fullmatch(path.name)
    )


def set_aside_before(workdir: str | os.PathLike) -> list[Path]:
    """The checkpoints that could not be read and were renamed."""
    directory = Path(workdir).absolute() / FOLDER
    if remote.is_mirrored(directory):
        names = {name.split("/")[0] for name in remote.listing(directory)}
        return sorted(directory / name for name in names if name.startswith("unreadable-"))
    return sorted(directory.glob("unreadable-*"))


def open_for_reading(
    workdir: str | os.PathLike, step: int | None = None
) -> tuple[int, SavedWeights]:
    """The weights of a checkpoint, without touching the run (it may be training).

    Args:
        workdir: the run's directory.
        step: which checkpoint; None: the newest that can be read.

    Returns:
        (step, weights), numpy arrays, for `state.ema_variables` and `state.raw_variables`.

    Raises:
        UserError: there is no such checkpoint.
    """
    directory = Path(workdir).absolute() / FOLDER

    def list_steps() -> list[int]:
        if not directory.is_dir() and not (remote.is_mirrored(directory) and saved_steps(workdir)):
            raise UserError(
                f"{workdir} has no checkpoints (looked for {directory}). Give the workdir of a "
                "training run that has saved one."
            )
        return saved_steps(workdir)

    steps = processes.from_leader("listing checkpoints", list_steps)
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"{directory} has no checkpoint{'' if step is None else f' {step}'}; there are: "
            f"{', '.join(map(str, steps)) or 'none yet'}."
        )
    step, parts, _ = _read_newest(directory, steps if step is None else [step], None)
    if remote.is_mirrored(directory):
        shutil.rmtree(directory)  # an evaluation reads one after the other
    return step, SavedWeights(**{name: parts["weights"].get(name, {}) for name in WEIGHTS})


def to_parts(state: TrainState, metrics: PyTree) -> dict[str, PyTree]:
    """A training state and its running metrics as plain nested dictionaries, part by part."""
    fields = flax.serialization.to_state_dict(state)
    weights = {name: fields.pop(name) for name in WEIGHTS}
    return {
        "weights": weights,
        "optimizer": fields,
        "interval": flax.serialization.to_state_dict(metrics),
    }


def from_parts(parts: Parts, state: TrainState, metrics: PyTree) -> tuple[TrainState, PyTree]:
    """The inverse of `to_parts`; what `parts` lacks is taken from the state and metrics given."""
    present = flax.serialization.to_state_dict(state)
    present = present | parts.get("weights", {}) | parts.get("optimizer", {})
    if "interval" in parts:
        metrics = flax.serialization.from_state_dict(metrics, parts["interval"])
    return flax.serialization.from_state_dict(state, present), metrics


def save_weights(workdir: str | os.PathLike, weights: SavedWeights) -> None:
    """Writes a checkpoint of weights alone, step 0, for sampling to read and training to start from."""
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, {"weights": flax.serialization.to_state_dict(weights)})
