"""Paths that users give; files that appear whole or not at all, with checksums, never behind a link.

A workdir may be untrusted, with a link where a run would write. So files are
replaced or opened without following a link, and folders of a run are refused if they are one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lora_diffusion_jax.errors import UserError, printable

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
HUB = "hf://"  # begins an address of weights on the Hugging Face Hub (`interop.hub`)
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")
_UNSET = re.compile(r"\$(\w+|\{[^}]*\})")
_CHECKSUM = re.compile(rb', "[^"]*": "[0-9a-f]{8}"\}$')  # the end of a line of JSON
# In a folder: the checksums of all files in it, as `sha256sum --check` reads them.
SUMS = "SHA256SUMS"
MAX_FOLDERS = 100  # inside one another


# Paths that users give.


def expand(path: str | os.PathLike, name: str = "path") -> str:
    """A path as a user gives it, with ~ and environment variables replaced.

    Args:
        path: may begin with ~ or ~user, and hold $NAME or ${NAME}.
        name: the flag or config field that it comes from, for the message.

    Raises:
        UserError: a URL, or a user or a variable that does not exist.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise UserError(
            f"{name}={text} is a URL; only paths on this machine can be used. Copy or mount it first."
        )
    found = os.path.expandvars(text)
    if (unset := _UNSET.search(found)) and not os.path.lexists(found):
        raise UserError(
            f"{name}={text}: the environment variable {unset[1]} is not set; set it first."
        )
    found = os.path.expanduser(found)
    if found.startswith("~") and not os.path.lexists(found):
        raise UserError(
            f"{name}={text}: no home directory of that name is known; write the path out (./~ for a "
            "name that begins with ~)."
        )
    return found


def check_depth(parts: Sequence[str], where: str | os.PathLike) -> None:
    """Raises UserError for a path below `where`, given by its parts, in more than MAX_FOLDERS folders."""
    if len(parts) > MAX_FOLDERS + 1:
        raise UserError(
            f"{where} holds {printable('/'.join(parts), 200)!r}, in {len(parts) - 1:,} folders inside one "
            f"another; expected at most {MAX_FOLDERS}. Move or remove it."
        )


def walk(folder: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, which recurses before Python 3.12, with the bound of `check_depth`."""
    for parent, children, names in os.walk(folder, **options):
        check_depth(Path(parent).relative_to(folder).parts, folder)
        yield parent, children, names


# Writing.


def make_folder(path: str | os.PathLike, root: str | os.PathLike) -> Path:
    """Creates a folder below `root` where it is missing; `root` itself may be a link.

    Raises:
        UserError: a part of the path below `root` is a link.
        OSError: it cannot be created.
    """
    root = Path(root)
    folder = root
    folder.mkdir(parents=True, exist_ok=True)
    for part in Path(path).relative_to(root).parts:
        folder = folder / part
        if folder.is_symlink():
            raise _is_link(folder)
        folder.mkdir(exist_ok=True)
    return folder


def open_own(path: str | os.PathLike, flags: int) -> int:
    """Opens a file to change it in place, created where missing; returns the descriptor.

    Args:
        path: the file.
        flags: os.O_RDWR, or os.O_WRONLY | os.O_APPEND, for example.

    Raises:
        UserError: a link (symbolic, or one of several names of one file), or no regular file.
        OSError: it cannot be opened.
    """
    safe = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
    try:
        descriptor = os.open(path, flags | safe, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_link(path) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _is_link(path)
    return descriptor


def _is_link(path: str | os.PathLike) -> UserError:
    return UserError(
        f"{path} is a link, or neither a file nor a folder, and writing to it would change something "
        "elsewhere. Remove it, or choose another place."
    )


@contextlib.contextmanager
def atomic(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, then moves it into place.

    A reader, or a kill at any moment, meets the old file or the new one, never a part. Nothing is
    left behind when writing fails. Several processes may do this at the same time; the last wins.
    The folder must exist. A link at `path` is replaced, not followed.

    Args:
        path: the file.
        sync: wait until it is on disk. Without, a crash of the machine may leave an empty file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
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


def append(path: str | os.PathLike, data: bytes, *, sync: bool = False) -> None:
    """Appends to a file, created where missing, on a line of its own."""
    descriptor = open_own(path, os.O_RDWR | os.O_APPEND)
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a crash
        file.write((b"\n" if torn else b"") + data)
        if sync:
            os.fsync(file.fileno())


# Lines of JSON, each with a checksum.


def checked_line(text: str) -> bytes:
    """A JSON object's text as a line whose last field is the CRC-32 of what stands before it."""
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The JSON objects in a file's lines, without their checksums; and the damaged lines.

    Lines without a checksum are those of older versions. Without a file there are no lines.
    """
    path = Path(path)
    good: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        if not line:
            continue
        try:
            record = json.loads(line)
            crc = record.pop("crc32", None)
            end = _CHECKSUM.search(line)  # whatever its name has become
            body = line[: end.start()] + b"}" if end else line
            if (end or crc) and crc != f"{zlib.crc32(body):08x}":
                raise ValueError
        # RecursionError: brackets without end; AttributeError, TypeError: no object.
        except (ValueError, RecursionError, AttributeError, TypeError):
            damaged.append(line)
        else:
            good.append(record)
    return good, damaged


# Checksums.


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Writes the checksums of all files in a folder into its file SUMS."""
    found = (Path(parent, name) for parent, _, names in walk(folder) for name in names)
    paths = sorted(path for path in found if path.is_file() and path != folder / SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder)}\n" for path in paths]
    write_text(folder / SUMS, "".join(lines))


def check_sums(folder: Path, chosen: Callable[[str], bool] = lambda name: True) -> str | None:
    """Compares the files in a folder with its file SUMS.

    Args:
        folder: of `write_sums`.
        chosen: which files are compared, by their path in the folder.

    Returns:
        What is wrong, '' if nothing is, or None without checksums.
    """
    sums = folder / SUMS
    if not sums.exists():
        return None
    *lines, rest = sums.read_bytes().split(b"\n")
    if rest or not lines:
        return f"{SUMS} is damaged"
    for line in lines:
        digest, _, name = line.decode(errors="replace").partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name:
            return f"{SUMS} is damaged"
        path = folder / name
        if not chosen(name):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} does not have the content that was saved"
    return ""


def set_aside(path: Path, name: str) -> Path:
    """Renames a damaged file or folder to `name`, or `name`-2, ... beside it; returns the new path."""
    taken = (f"{name}-{n}" if n > 1 else name for n in range(1, 10**6))
    target = next(t for t in map(path.with_name, taken) if not os.path.lexists(t))
    path.rename(target)
    return target


# Errors and locks.


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, advice: str = _ADVICE) -> Iterator[None]:
    """Turns a full, read-only, forbidden or vanished disk into a UserError that names the path.

    Args:
        path: what is used, for errors that do not name a file themselves.
        advice: what to do, as a sentence.

    Raises:
        UserError: instead of an OSError, or of a library's error caused by one.
    """
    before = next((p for p in (Path(path), *Path(path).parents) if os.path.exists(p)), None)
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
        if before and not before.exists():
            raise disappeared(before) from error
        raise


def cannot_use(path: str | os.PathLike, reason: str, advice: str = _ADVICE) -> UserError:
    """The error for a path that cannot be read or written."""
    return UserError(f"Cannot use {path}: {reason[:1].lower() + reason[1:]}. {advice}")


def disappeared(path: str | os.PathLike) -> UserError:
    """The error for a file or folder of a run that existed before."""
    return UserError(
        f"{path} has disappeared: it was removed, or its file system is no longer mounted. Restore it "
        "and rerun the same command; without it the run cannot be resumed."
    )


class Held:
    """A folder kept open, so that its disappearance shows even if a library creates another in its place."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def is_there(self) -> bool:
        """Whether the path still leads to this folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._descriptor)


class TakenError(UserError):
    """Another process holds a lock."""


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
        TakenError: another process holds it.
        UserError: the file system has no locks.
    """

    def __init__(self, path: str | os.PathLike, taken: str, holder: str = ""):
        self.path = Path(path)
        with disk_errors(self.path):
            descriptor = open_own(self.path, os.O_RDWR)
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
            raise TakenError(taken.replace("{holder}", found)) from error
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
