"""Files of runs in an object store, on this machine: `MIRROR/gs/bucket/run` for gs://bucket/run.

A program reads and writes the mirror as it does any folder. `fetch` and `push` carry whole files between it
and the store, so that an object appears whole or not at all; for paths elsewhere, `push` does nothing.
Each process has a mirror of its own, which it removes at its end; what one that was killed has left is
removed by the next.
"""

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError, needs_package, printable

# Scheme -> the package that fsspec needs for it, and our extra that brings it.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Of a run, only fetched where they are read: large, or written and never read again.
LARGE = re.compile("checkpoints|events|samples|base(-[0-9]+)?")
_CARRIED_APART = re.compile(r"checkpoints|base(-[0-9]+)?|\..*")  # by those who write them
_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]*):/")
_PREFIX = "lora_diffusion_jax_mirror_"
_LOCK = ".lock"  # held while the mirror's process lives
_ADVICE = (
    "Check the bucket's name, the network and the credentials, then run the same command again."
)

# Below the mirror: the size and time of change of each file as the store has it.
_pushed: dict[Path, tuple[int, int]] = {}
_fetched: set[str] = set()  # URLs whose small files are here
_fences: dict[Path, Callable[[], None]] = {}  # folder of a run -> raises if its lease is lost


# Names.


def is_url(path: str | os.PathLike) -> bool:
    """Whether this is a URL of whatever scheme, rather than a path."""
    return bool(_URL.match(os.fspath(path)))


def check_url(url: str, name: str) -> str:
    """A URL of a run, without a slash at its end.

    Args:
        url: as the user gives it.
        name: the flag or config field that it comes from, for the message.

    Raises:
        UserError: of a scheme that is not supported, or whose package is not installed; without a bucket or
            a path in it; or with a part that no folder could have.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES or not rest:
        raise UserError(
            f"{name}={url} is a URL of a kind that is not supported; give a path on this machine, or "
            f"{' or '.join(f'{known}://BUCKET/PATH' for known in SCHEMES)}."
        )
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(needs_package(f"{name}={url}", package, f"train,{extra}"))
    parts = rest.rstrip("/").split("/")
    if len(parts) < 2 or not all(map(_is_plain, parts)):
        raise UserError(
            f"{name}={url} does not name a folder in a bucket; expected {scheme}://BUCKET/PATH, without "
            "empty parts, '.', '..' and the characters * ? [ ]."
        )
    files.check_depth(parts, url)
    return f"{scheme}://{'/'.join(parts)}"


def _is_plain(part: str) -> bool:
    """Whether a part of an object's name can be that of a file, and stands for itself in patterns."""
    return part not in ("", ".", "..") and part.isprintable() and not set(part) & set("*?[]\\")


@functools.cache
def _mirror() -> Path:
    """The mirror of this process, created at the first call."""
    _remove_left()
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix=_PREFIX)))
    lock = files.Lock(folder / _LOCK, f"{folder} is another process's.")
    atexit.register(close)
    _mirror_locks.append(lock)
    return folder


_mirror_locks: list[files.Lock] = []


def _remove_left() -> None:
    """Removes the mirrors of processes that were killed: nobody holds their lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, UserError):  # another user's, or in use
            about = folder.lstat()  # a new one may not have its lock yet
            if about.st_uid == os.getuid() and time.time() - about.st_mtime > 60:
                with files.Lock(folder / _LOCK, "in use"):
                    shutil.rmtree(folder)


def close() -> None:
    """Removes the mirror of this process; later calls begin a new one."""
    if _mirror.cache_info().currsize:
        shutil.rmtree(_mirror(), ignore_errors=True)
        _mirror.cache_clear()
        for lock in _mirror_locks:
            lock.release()
        for known in (_mirror_locks, _pushed, _fetched, _fences):
            known.clear()


def is_mirrored(path: str | os.PathLike) -> bool:
    """Whether a path lies in the mirror."""
    return bool(_mirror.cache_info().currsize) and _mirror() in Path(path).parents


def url_of(path: str | os.PathLike) -> str:
    """The URL that a path in the mirror stands for; any other path as it is."""
    return named(os.fspath(path))


def named(text: str) -> str:
    """A text with the URLs in the place of paths in the mirror; for all that is printed or recorded."""
    if not _mirror.cache_info().currsize or str(_mirror()) not in text:
        return text
    schemes = "|".join(SCHEMES)
    return re.sub(rf"{re.escape(str(_mirror()))}/({schemes})(?=/)", r"\1:/", text)


def local(path: str | os.PathLike, name: str = "path") -> str:
    """A path on this machine for what the user names: a path, or the URL of a run or a file.

    Of a run the small files are fetched, once in a process; its checkpoints are when they are opened. What
    does not exist there does not exist here either.

    Args:
        path: as the user gives it; a path that this function returned stays as it is.
        name: the flag or config field that it comes from, for the message.

    Raises:
        UserError: see `check_url`, `files.expand`; or the store cannot be used.
    """
    text = os.fspath(path)
    if not is_url(text):
        return files.expand(text, name)
    url = check_url(text, name)
    scheme, _, rest = url.partition("://")
    folder = _mirror() / scheme / rest
    if url not in _fetched:
        fetch_small(folder)
        if not folder.exists():
            _fetch_file(folder)
        _fetched.add(url)
    return str(folder)


# The store.


def _open(path: Path) -> tuple[Any, str]:
    """The file system of a path in the mirror, and the path's name there."""
    scheme, *rest = path.relative_to(_mirror()).parts
    return _file_system(scheme), "/".join(rest)


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec  # the package of the scheme brings it

    for name in ("gcsfs", "s3fs"):  # they log what they raise, with stack traces
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Others write there, too: a listing must be that of this moment.
    return fsspec.filesystem(scheme, use_listings_cache=False)


@contextlib.contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns whatever a store's client raises into a UserError that names the URL.

    Raises:
        FileExistsError: as it is, of exclusive writing.
        UserError: any other error.
    """
    try:
        yield
    except (UserError, FileExistsError):
        raise
    except OSError as error:
        if error.filename and is_mirrored(error.filename):  # of this machine
            raise files.cannot_use(
                error.filename, error.strerror or "error", "Set TMPDIR to a disk with more room."
            ) from error
        raise _cannot_use(path, error) from error
    except Exception as error:
        raise _cannot_use(path, error) from error


def _cannot_use(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{url_of(path)}: there is no such bucket or object. {_ADVICE}")
    reason = (str(error).strip().splitlines() or ["without a message"])[0]
    text = printable(f"{type(error).__name__}: {reason}", 300)
    return UserError(f"Cannot use {url_of(path)} ({text}). {_ADVICE}")


def listing(folder: Path) -> dict[str, int]:
    """The objects below a folder of the mirror: name within the folder -> bytes; none if there is no such.

    Raises:
        UserError: the store cannot be used, or an object has a name that no file could have.
    """
    system, base = _open(folder)
    with store_errors(folder):
        try:
            found = system.find(base, detail=True)
        except FileNotFoundError:  # no such bucket, which writing will tell
            return {}
    names = {}
    for path, about in found.items():
        name = path.removeprefix(f"{base}/")
        if name in (path, ""):  # an object of the folder's own name
            continue
        if name.endswith("/"):  # which some programs put in the place of folders
            continue
        parts = name.split("/")
        if not all(part not in ("", ".", "..") and "\0" not in part for part in parts):
            raise UserError(
                f"{url_of(folder)} holds an object named {printable(name, 200)!r}, which no file can be "
                "named; remove it."
            )
        files.check_depth(parts, url_of(folder))
        names[name] = about["size"] or 0
    return names


def fetch(folder: Path, names: Iterable[str]) -> None:
    """Brings objects below a folder into the mirror, over what is there.

    Raises:
        UserError: one is missing, or the store cannot be used.
    """
    system, base = _open(folder)
    wanted = sorted(names)
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if wanted:
        with store_errors(folder):
            system.get([f"{base}/{n}" for n in wanted], [str(folder / n) for n in wanted])
    for name in wanted:
        _pushed[folder / name] = _signature(folder / name)


def _fetch_file(path: Path) -> None:
    """Brings one object, if there is one of exactly this name."""
    system, base = _open(path)
    with store_errors(path):
        if system.isfile(base):
            path.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(base, str(path))


def fetch_small(folder: Path) -> None:
    """Brings the files of a run but for those in LARGE and hidden ones, as the store has them now."""
    fetch(folder, [name for name in listing(folder) if _is_small(name)])


def _is_small(name: str) -> bool:
    parts = name.split("/")
    return not LARGE.fullmatch(parts[0]) and not any(part.startswith(".") for part in parts)


def fetch_configs(folder: Path, config: str) -> None:
    """Brings the small files of all runs below a folder: of those that have a file named `config`."""
    if not is_mirrored(folder):
        return
    runs = [
        name.removesuffix(f"/{config}") for name in listing(folder) if name.endswith(f"/{config}")
    ]
    for run in runs:
        local(url_of(folder / run))


def _signature(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def push(path: Path, last: Sequence[str] = ()) -> None:
    """Carries files from the mirror into the store, each whole; does nothing for a path elsewhere.

    Args:
        path: a file, or a folder with all files in it.
        last: files of the folder, by their path in it, that are carried behind all others, in this order.

    Raises:
        UserError: the store cannot be used, or the run's lease is lost.
    """
    if not is_mirrored(path):
        return
    if path.is_file():
        _push(path.parent, [path.name])
        return
    found = (Path(parent, name) for parent, _, below in files.walk(path) for name in below)
    names = {str(file.relative_to(path)) for file in found}
    _push(path, sorted(names - set(last)))
    for name in last:
        _push(path, sorted(names & {name}))


def _push(path: Path, names: Sequence[str]) -> None:
    """Carries these files of a folder of the mirror into the store."""
    if not names:
        return
    _check_fence(path)
    system, base = _open(path)
    before = {name: _signature(path / name) for name in names}
    with store_errors(path):
        system.put([str(path / n) for n in names], [f"{base}/{n}" for n in names])
    for name in names:
        _pushed[path / name] = before[name]


def push_lines(path: Path) -> None:
    """Carries a file of lines into the store, behind the lines that others have added there meanwhile.

    Does nothing for a path elsewhere.
    """
    if not is_mirrored(path):
        return
    system, name = _open(path)
    ours = path.read_bytes().splitlines(keepends=True)
    with store_errors(path):
        try:
            data = system.cat_file(name)
        except FileNotFoundError:
            data = b""
    theirs = data.splitlines(keepends=True)
    known = set(theirs)
    lines = [*theirs, *(line for line in ours if line not in known)]
    if lines != ours:
        with files.atomic(path) as temporary:
            temporary.write_bytes(b"".join(lines))
    push(path)


def push_small(folder: Path) -> None:
    """Carries what has changed of a run, but for its checkpoints and hidden files, into the store.

    A file that grows meanwhile arrives as it was at one moment.
    """
    if not is_mirrored(folder):
        return
    _check_fence(folder)
    system, base = _open(folder)
    for parent, children, names in files.walk(folder):
        children[:] = [child for child in children if not _CARRIED_APART.fullmatch(child)]
        for path in (Path(parent, name) for name in sorted(names) if name[0] != "."):
            signature = _signature(path)
            if _pushed.get(path) != signature:
                with store_errors(path):
                    system.pipe_file(f"{base}/{path.relative_to(folder)}", path.read_bytes())
                _pushed[path] = signature


def remove(folder: Path, names: Iterable[str]) -> None:
    """Removes objects below a folder from the store, in this order; those that are gone are no error."""
    _check_fence(folder)
    system, base = _open(folder)
    with store_errors(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(f"{base}/{name}")


def check_writable(folder: Path) -> None:
    """Raises UserError unless objects can be written and removed below a folder of the mirror."""
    system, base = _open(folder)
    with store_errors(folder):
        name = f"{base}/.probe-{secrets.token_hex(8)}"
        system.pipe_file(name, b"")
        system.rm_file(name)


def set_fence(run: Path, check: Callable[[], None] | None) -> None:
    """Has every write to a run call `check` first, which raises an error when the run's lease is lost."""
    if check is None:
        _fences.pop(run, None)
    else:
        _fences[run] = check


def _check_fence(path: Path) -> None:
    for folder in (path, *path.parents):
        if folder in _fences:
            _fences[folder]()
