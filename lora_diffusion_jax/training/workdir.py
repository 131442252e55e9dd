"""A run's directory: config.json, the lock against a second run, plain words for disk errors."""

import contextlib
import datetime
import errno
import fcntl
import fnmatch
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_diffusion_jax import processes
from lora_diffusion_jax.errors import UserError

CONFIG = "config.json"
LOCK = ".lock"
Say = Callable[[str], None]

# What a library may hide inside an error of its own, as it stands in the system's messages.
_DISK_CODES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
)


@contextlib.contextmanager
def plain_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns a full, read-only, forbidden or vanished disk into a UserError that names the path."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        place = error.filename or path
        raise UserError(_disk_message(place, error.strerror or str(error))) from error
    except Exception as error:
        for code in _DISK_CODES:
            if os.strerror(code) in str(error):
                raise UserError(_disk_message(path, os.strerror(code))) from error
        if not Path(path).exists():
            raise gone(path) from error
        raise


def gone(path: str | os.PathLike) -> UserError:
    """The error for a file or folder of the run that was there and is not any more."""
    return UserError(
        f"{path} is gone: it was removed, or its file system is not mounted any more. Bring it back "
        "and run the same command again; without it the run cannot be resumed."
    )


def _disk_message(path: str | os.PathLike, reason: str) -> str:
    return (
        f"Cannot use {path}: {reason[0].lower() + reason[1:]}. What was saved before is untouched; "
        "free space or permit writing, then run the same command again, or choose another workdir."
    )


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike) -> Iterator[Path]:
    """Creates the directory where it is missing, and holds its lock.

    The lock is a POSIX record lock: it dies with the process, however that dies, and is not passed
    on to children, so that a leftover data worker does not hold it. Only process 0 takes it.

    Raises:
        UserError: the directory cannot be written, or another run is using it.
    """
    directory, descriptors = Path(path).absolute(), []

    def open_and_lock() -> None:
        with plain_disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            descriptors.append(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        _take_lock(directory, descriptors[0])

    try:
        processes.from_leader("opening the workdir", open_and_lock)
        if not _appears(directory):
            raise UserError(
                f"{directory}, which process 0 made, is not there in process "
                f"{jax.process_index()}. Choose a workdir that all processes share."
            )
        yield directory
    finally:
        for descriptor in descriptors:
            os.close(descriptor)  # which also frees the lock


def _appears(directory: Path, limit: float = 60.0) -> bool:
    """Waits for a directory that another machine made: NFS may remember for a while that it was not."""
    deadline = time.monotonic() + limit
    while not directory.is_dir() and time.monotonic() < deadline:
        time.sleep(0.5)
    return directory.is_dir()


def _take_lock(directory: Path, descriptor: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"Cannot lock {directory / LOCK}: {error.strerror}. This file system has no locks; "
                "choose a workdir on one that has."
            ) from error
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "unknown"
        raise UserError(
            f"Another run is using {directory} ({holder}). Wait for it or stop it, or choose "
            "another workdir."
        ) from error
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with plain_disk_errors(directory):
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0
        )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], harmless: Sequence[str] = ()
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Compares two configs field by field.

    Args:
        old: nested dictionaries, as read from JSON.
        new: likewise; tuples count as lists.
        harmless: patterns (fnmatch) of dotted names whose change does not matter, 'train.*_every'.

    Returns:
        Two dictionaries, what matters and what does not: name -> (old value, new value), where a
        missing field is the word 'absent'.
    """
    before, after = _flatten(old), _flatten(json.loads(json.dumps(new)))
    matters, rest = {}, {}
    for name in sorted(before.keys() | after.keys()):
        values = before.get(name, "absent"), after.get(name, "absent")
        if values[0] != values[1]:
            free = any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
            (rest if free else matters)[name] = values
    return matters, rest


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def reconcile_config(
    directory: Path, config: Mapping[str, Any], harmless: Sequence[str], say: Say
) -> None:
    """Writes config.json, or checks the one that is there against this run's.

    Raises:
        UserError: a field that matters differs, with both values; or the file is damaged.
    """
    processes.from_leader(
        "reading config.json", lambda: _reconcile_config(directory, config, harmless, say)
    )


def _reconcile_config(
    directory: Path, config: Mapping[str, Any], harmless: Sequence[str], say: Say
) -> None:
    path = directory / CONFIG
    if path.exists():
        matters, rest = differences(read_config(directory), config, harmless)
        if matters:
            lines = [
                f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in matters.items()
            ]
            raise UserError(
                f"{directory} holds a run with another config:\n" + "\n".join(lines) + "\n"
                "Give these fields their old values to resume it, or choose another workdir."
            )
        for name, (old, new) in rest.items():
            say(f"config: {name} changes from {old!r} to {new!r}")
        if not rest:
            return
    with plain_disk_errors(path):
        write_atomically(path, json.dumps(config, indent=2, allow_nan=True) + "\n")


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a run: it has no {CONFIG}. Give the workdir of a training run."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged ({error}). Restore it from the config that started the run."
        ) from error
    except OSError as error:
        raise UserError(_disk_message(path, error.strerror or str(error))) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged (it holds no fields). Restore it from the config that started the run."
        )
    return config


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, meets the old text or the new, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
