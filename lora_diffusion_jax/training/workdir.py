"""A run's directory: its lock and its config.json."""

import contextlib
import datetime
import fnmatch
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from lora_diffusion_jax import files, processes, remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.writers import log
from lora_diffusion_jax.untrusted import is_text, read_json

CONFIG = "config.json"
CONFIG_SUM = "config.json.sha256"  # beside it, to notice damage
LOCK = ".lock"


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    may_change: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda saved: saved,
) -> Iterator[Path]:
    """Creates the directory where it is missing, locks it, and writes or compares its config.json.

    Nothing is written through links in it.

    Only process 0 takes the lock, which the system frees when the process dies. Of a run in an object store
    the directory is its mirror, a lease takes the place of the lock, and what is written is carried there at
    the end.

    Args:
        path: the directory.
        config: what config.json holds, JSON types alone.
        may_change: patterns of config fields that may change between runs; see `differences`.
        complete: gives a config, saved or this run's, the fields that were added since it was saved, and all
            fields the values they stand for; what it returns is compared.

    Raises:
        UserError: the directory cannot be written, another run is using it, or it holds a run with
            another config; or the processes have different configs.
    """
    _check_text(config)
    processes.check_same("the config", json.dumps(config, sort_keys=True))
    directory = Path(path).absolute()
    with contextlib.ExitStack() as stack:

        def create_and_lock() -> None:
            with files.disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            taken = (
                f"Another run is using {directory} ({{holder}}). Wait for it or stop it, or "
                "choose another workdir."
            )
            if remote.is_mirrored(directory):
                stack.enter_context(remote.Lease(directory, taken, this_process()))
            else:
                stack.enter_context(files.Lock(directory / LOCK, taken, this_process()))

        processes.from_leader("opening the workdir", create_and_lock)
        if remote.is_mirrored(directory):
            directory.mkdir(parents=True, exist_ok=True)
            remote.fetch_small(directory)  # as the run before this one has left them
        deadline = time.monotonic() + 60  # NFS may cache for a while that it was missing
        while not directory.is_dir() and time.monotonic() < deadline:
            time.sleep(0.5)
        if not directory.is_dir():
            raise UserError(
                f"{directory}, which process 0 created, is not visible to process "
                f"{jax.process_index()}. Choose a workdir that all processes share."
            )
        reconcile_config(directory, config, may_change, complete)
        try:
            yield directory
        except BaseException:
            with contextlib.suppress(UserError):  # the first error is the one to report
                push_small(directory)
            raise
        push_small(directory)


def push_small(directory: Path) -> None:
    """Carries what has changed of a run, but for its checkpoints, into its store if it lives in one."""
    if processes.is_leader():
        remote.push_small(directory)


def this_process() -> str:
    """What a lock file says of the process that holds it."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def _check_text(config: Mapping[str, Any]) -> None:
    """Raises UserError for text that could be written, and never read again."""
    for field, value in traverse_util.flatten_dict(dict(config), sep=".").items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and not is_text(text):
                raise UserError(
                    f"{field} is {text[:200]!a}, which is no UTF-8 and could not be read from "
                    f"{CONFIG} again. Rename what it names, or link to it by another name."
                )


def reconcile_config(
    directory: Path,
    config: Mapping[str, Any],
    may_change: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda saved: saved,
) -> None:
    """Writes config.json, or compares the one that is there with this run's.

    Raises:
        UserError: a field differs that may not change, with both values; or the file is damaged.
    """

    def reconcile() -> None:
        path = directory / CONFIG
        if path.exists():
            free = check_config(directory, config, may_change, complete)
            for name, (old, new) in free.items():
                log(f"config: {name} changes from {old!r} to {new!r}")
            if not free:
                return
        with files.disk_errors(path):
            checksum = directory / CONFIG_SUM
            checksum.unlink(missing_ok=True)  # a kill leaves none rather than a wrong one
            files.write_text(path, json.dumps(config, indent=2, allow_nan=True) + "\n")
            files.write_text(checksum, f"{files.sha256(path)}  {CONFIG}\n")

    processes.from_leader("reading config.json", reconcile)


def check_config(
    directory: Path,
    config: Mapping[str, Any],
    may_change: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda saved: saved,
) -> dict[str, tuple[Any, Any]]:
    """Compares a run's config.json with a config; returns the fields that differ and may: (old, new).

    Raises:
        UserError: a field differs that may not change, with both values; or the file is damaged.
    """
    fixed, free = differences(complete(read_config(directory)), complete(dict(config)), may_change)
    if fixed:
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in fixed.items()]
        raise UserError(
            f"{directory} holds a run with another config:\n" + "\n".join(lines) + "\n"
            "Give these fields their old values to resume it, or choose another workdir."
        )
    return free


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str] = ()
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Compares two configs field by field.

    Args:
        old: nested dictionaries of JSON types; tuples count as lists.
        new: likewise.
        may_change: patterns (fnmatch) of dotted names that may change, such as 'train.*_every'.

    Returns:
        Two dictionaries, of the fields that may not and that may change: name -> (old value, new
        value), where a missing field is the word 'absent'.
    """
    before, after = (
        traverse_util.flatten_dict(json.loads(json.dumps(tree)), keep_empty_nodes=True, sep=".")
        for tree in (old, new)
    )
    fixed: dict[str, tuple[Any, Any]] = {}
    free: dict[str, tuple[Any, Any]] = {}
    for name in sorted(before.keys() | after.keys()):
        values = before.get(name, "absent"), after.get(name, "absent")
        if values[0] != values[1]:
            allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)
            (free if allowed else fixed)[name] = values
    return fixed, free


def has_changed(directory: str | os.PathLike) -> bool:
    """Whether config.json differs from what a run wrote; older versions wrote no checksum."""
    checksum = Path(directory) / CONFIG_SUM
    if not checksum.exists():
        return False
    return checksum.read_bytes()[:64] != files.sha256(Path(directory) / CONFIG).encode()


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a run; if it has changed since it was written, that is logged once.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(directory) / CONFIG
    with files.disk_errors(path):
        if not path.exists():
            raise UserError(
                f"{directory} is not a run: it has no {CONFIG}. Give the workdir of a training run."
            )
    advice = "It is damaged: restore it from the config that started the run."
    config = read_json(path, infinite=True, advice=advice)  # noise levels may be infinite
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no fields. {advice}")
    if has_changed(directory):
        _tell_changed(path)
    return config


@functools.cache
def _tell_changed(path: Path) -> None:
    log(
        f"warning: {path} has changed since it was written. If you did not edit it, restore it; if you "
        f"did, delete {CONFIG_SUM} beside it."
    )
