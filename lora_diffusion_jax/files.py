"""Files that appear whole or not at all, locks between programs, and disk errors in plain words."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lora_diffusion_jax.errors import UserError

# A library may wrap the system's error in one of its own: these are looked for in its text.
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
_ADVICE = (
    "What was saved before is untouched; free space or permit writing, then run the same command "
    "again, or choose another place."
)


@contextlib.contextmanager
def atomic(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, then moves it into place.

    A reader, or a kill at any moment, meets the old file or the new one, never a part. Nothing is
    left behind when writing fails. Several processes may do this at the same time; the last wins.
    The folder must exist.

    Args:
        path: the file.
        sync: wait until it is on disk. Without, a crash of the machine may leave an empty file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:  # the content must be on disk before the name is
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, advice: str = _ADVICE) -> Iterator[None]:
    """Turns a full, read-only, forbidden or vanished disk into a UserError that names the path.

    Args:
        path: what is used, for errors that do not name a file themselves.
        advice: what to do, as a sentence.

    Raises:
        UserError: instead of an OSError, or of a library's error caused by one.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise cannot_use(error.filename or path, error.strerror or str(error), advice) from error
    except Exception as error:
        for code in _DISK_CODES:
            if os.strerror(code) in str(error):
                raise cannot_use(path, os.strerror(code), advice) from error
        if not Path(path).exists():
            raise disappeared(path) from error
        raise


def cannot_use(path: str | os.PathLike, reason: str, advice: str = _ADVICE) -> UserError:
    """The error for a path that cannot be read or written."""
    return UserError(f"Cannot use {path}: {reason[0].lower() + reason[1:]}. {advice}")


def disappeared(path: str | os.PathLike) -> UserError:
    """The error for a file or folder of a run that existed before."""
    return UserError(
        f"{path} has disappeared: it was removed, or its file system is no longer mounted. Restore it "
        "and rerun the same command; without it the run cannot be resumed."
    )


class Lock:
    """A lock file that other programs respect; the system frees it when the process dies.

    It is a POSIX record lock, which children do not inherit: a leftover data worker does not hold it.
    Used as a context manager, or freed by `release`.

    Args:
        path: the lock file, created where missing; its folder must exist.
        taken: the error's message when another process holds the lock; `{holder}` in it is replaced
            by what that process wrote.
        holder: what to write into the file for others to read.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """

    def __init__(self, path: str | os.PathLike, taken: str, holder: str = ""):
        self.path = Path(path)
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file: IO[bytes] = os.fdopen(descriptor, "rb+", buffering=0)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = self._file.read(1000).decode(errors="replace").strip() or "unknown"
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"Cannot lock {self.path}: {error.strerror}. This file system has no locks; "
                    "choose a place on one that has."
                ) from error
            raise UserError(taken.replace("{holder}", found)) from error
        if holder:
            with disk_errors(self.path):
                self._file.truncate(0)
                self._file.write(holder.encode())

    def release(self, *, remove: bool = False) -> None:
        """Frees the lock, and removes its file if asked."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
