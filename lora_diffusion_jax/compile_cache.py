"""The persistent compilation cache: compiled programs are kept for the next start."""

import atexit
import contextlib
import grp
import importlib
import io
import itertools
import os
import platform
import pwd
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax

from lora_diffusion_jax import files, host
from lora_diffusion_jax.errors import UserError

MIN_COMPILE_SECONDS = 0.1  # faster ones are not stored: reading an entry takes some 10 ms
MAX_GIB = 5.0
MAX_UNPACKED = 2**30  # bytes of a compiled program; real ones have some megabytes
_NEVER = 1e9  # seconds, more than any program takes to compile
_PART = 2**20  # bytes unpacked at a time
_MAX_LINKS = 40  # that Linux follows in one path
_ZSTD = b"\x28\xb5\x2f\xfd"  # a frame begins with this, and a byte of flags
_HAS_CHECKSUM = 4  # one of them
_STAMP = ".checked"  # entries older than this file are known to be whole


def cache_dir() -> str:
    """Where compiled programs go: $JAX_COMPILATION_CACHE_DIR, else below $XDG_CACHE_HOME or ~/.cache.

    Returns '' where JAX_ENABLE_COMPILATION_CACHE turns the cache off.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false", "f", "off"):
        return ""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        given = os.environ["JAX_COMPILATION_CACHE_DIR"]
        return given if "://" in given else files.expand(given, "JAX_COMPILATION_CACHE_DIR")
    home = Path(files.expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME"))
    # CPU programs run only on the kind of processor they were compiled for, and are split among as many
    # cores as there were. Machines of several kinds may share a home directory.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    kind = f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
    machine = kind if host.has_accelerator() else f"{kind}-{host.usable_cores()}"
    return str(home / "lora_diffusion_jax" / "compiled" / machine)


def max_bytes() -> int:
    """The cache's size limit in bytes, from LORA_DIFFUSION_CACHE_GIB."""
    text = os.environ.get("LORA_DIFFUSION_CACHE_GIB", str(MAX_GIB))
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 2**30:
        raise UserError(f"LORA_DIFFUSION_CACHE_GIB={text} is not a size in GiB, such as 5.")
    return int(gib * 2**30)


def use_compilation_cache() -> str:
    """Turns the cache on and tidies it; returns its folder, '' if it is off.

    A folder that cannot be written to is a warning; what it holds is still read. One that others can
    write to is not used, since a compiled program runs with all rights of this process.
    """
    folder = cache_dir()
    # GPU processes that compile share the search for fast kernels: one that found the program in a
    # cache of its own host would leave the others waiting.
    own_caches = jax.distributed.is_initialized() and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    if own_caches and jax.default_backend() == "gpu":
        folder = ""
    min_seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", MIN_COMPILE_SECONDS)
    if folder and "://" not in folder:  # a bucket has rules of its own
        if problem := find_other_writer(Path(folder)):
            print(f"warning: {problem}", file=sys.stderr)
            jax.config.update("jax_compilation_cache_dir", None)
            return ""
        try:
            tidy(Path(folder), max_bytes())
        except OSError as error:
            print(
                f"warning: compiled programs cannot be stored in {folder} ({error.strerror}), so every "
                "start compiles again. Set JAX_COMPILATION_CACHE_DIR to a writable folder.",
                file=sys.stderr,
            )
            min_seconds = _NEVER
            folder = folder if Path(folder).is_dir() else ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(min_seconds))
    if folder and min_seconds != _NEVER and "://" not in folder:
        atexit.register(_tidy_at_exit, Path(folder), max_bytes())
    return folder


def _tidy_at_exit(folder: Path, limit: int) -> None:
    """Checks what this process stored before anything can happen to it."""
    with contextlib.suppress(OSError, UserError):
        tidy(folder, limit)


def note_warning(text: str) -> None:
    """Has all entries checked again, if the warning is JAX's of one that it could not read."""
    if "reading persistent compilation cache entry" in text:
        with contextlib.suppress(OSError):
            Path(cache_dir(), _STAMP).unlink()


def find_other_writer(folder: Path) -> str:
    """Says who else could put programs into the cache; '' if nobody can.

    Whoever can write to a folder above it, or owns one, can put another in its place; the sticky bit
    keeps others from that. The folders that links lead through count as well.
    """
    real = Path(os.path.realpath(folder))
    for place in _on_the_way(folder.absolute()):
        found = place.lstat()
        if place == real:
            writers = stat.S_IWGRP | stat.S_IWOTH
        elif stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
            writers = 0
        else:
            writers = stat.S_IWOTH | (0 if _is_private(found.st_gid) else stat.S_IWGRP)
        if found.st_uid not in (os.geteuid(), 0):
            problem = f"belongs to another user (uid {found.st_uid})"
        elif found.st_mode & writers:
            problem = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
        else:
            continue
        which = "" if place == folder.absolute() else f"lies below {place}, which "
        return (
            f"the compilation cache {folder} {which}{problem}, who could place programs there, so it is not "
            f"used. Set JAX_COMPILATION_CACHE_DIR to a folder of your own, or run: chmod go-w {place}"
        )
    return ""


def _is_private(group: int) -> bool:
    """Whether a group is this user's own, for which many systems let new folders be writable."""
    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def _on_the_way(path: Path) -> Iterator[Path]:
    """The files and folders that opening an absolute path passes, links included, as far as they exist."""
    parts, here, links = list(path.parts[1:]), Path(path.anchor), 0
    yield here
    while parts:
        name = parts.pop(0)
        here = here.parent if name == ".." else here / name
        if not os.path.lexists(here):
            return
        yield here
        if here.is_symlink():
            target = here.readlink()
            parts = [*target.parts[target.is_absolute() :], *parts]
            here = Path(here.anchor) if target.is_absolute() else here.parent
            links += 1
            if links > _MAX_LINKS:  # a ring, which the system refuses as well
                return


def tidy(folder: Path, limit: int) -> None:
    """Removes damaged and oversized entries, and the least recently used ones beyond `limit` bytes.

    Entries of zstd, which JAX packs without a checksum, get one: unpacking them later compares it.

    JAX does neither well (0.10.2, tried): it never replaces an entry that a kill truncated, but warns
    and compiles again at every start. Its own limit, `jax_compilation_cache_max_size`, needs the
    package filelock, and once an entry lacks its `-atime` file (a kill between the two, or an entry
    stored without a limit) every later write fails.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = folder / _STAMP
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    with os.fdopen(files.open_own(stamp, os.O_WRONLY), "wb") as file:
        file.write(b"1")
    os.utime(stamp)
    with contextlib.suppress(OSError):  # another process may tidy at the same time
        entries = [(path.stat(), path) for path in folder.glob("*-cache")]
        entries.sort(key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime), reverse=True)
        total = 0
        for stat, path in entries:
            total += stat.st_size
            data = path.read_bytes() if stat.st_mtime >= checked - 1 else None
            if total > limit or (data is not None and not _is_whole(data)):
                path.unlink(missing_ok=True)
            elif data and data.startswith(_ZSTD) and not data[4] & _HAS_CHECKSUM:
                _add_checksum(path, data)


def _is_whole(data: bytes) -> bool:
    """Whether an entry unpacks, to at most MAX_UNPACKED bytes, which are not kept."""
    broken: tuple[type[BaseException], ...] = (zlib.error, OSError, EOFError)
    sizes = _zlib_sizes(data)
    if data.startswith(_ZSTD):
        module = _zstd_module()
        if module is None:  # of another environment: JAX cannot read it here
            return True
        sizes, broken = _zstd_sizes(module, data), (*broken, module.ZstdError)
    try:
        return all(total <= MAX_UNPACKED for total in itertools.accumulate(sizes))
    except broken:
        return False


def _zlib_sizes(data: bytes) -> Iterator[int]:
    """The sizes of an entry's parts, unpacked one at a time."""
    unpacker = zlib.decompressobj()
    for start in range(0, len(data), _PART):
        packed = data[start : start + _PART]
        while packed and not unpacker.eof:
            yield len(unpacker.decompress(packed, _PART))
            packed = unpacker.unconsumed_tail
    while not unpacker.eof:
        if not (part := unpacker.decompress(b"", _PART)):
            raise EOFError
        yield len(part)


def _zstd_sizes(module: ModuleType, data: bytes) -> Iterator[int]:
    total = 0
    with module.open(io.BytesIO(data), "rb") as file:
        while part := file.read(_PART):
            total += len(part)
            yield len(part)
    if module.__name__ == "zstandard":
        size = module.get_frame_parameters(data).content_size
    else:
        size = module.get_frame_info(data).decompressed_size
    if total != size:  # the package ends quietly where a truncated frame ends
        raise EOFError


def _add_checksum(path: Path, data: bytes) -> None:
    """Packs a zstd entry again, with a checksum of its content."""
    module = _zstd_module()
    if module is None:
        return
    if module.__name__ == "zstandard":
        content = module.ZstdDecompressor().decompress(data)
        packed = module.ZstdCompressor(write_checksum=True).compress(content)
    else:
        options = {module.CompressionParameter.checksum_flag: 1}
        packed = module.compress(module.decompress(data), options=options)
    with files.atomic(path, sync=False) as temporary:
        temporary.write_bytes(packed)


def _zstd_module() -> ModuleType | None:
    """What JAX unpacks zstd with: Python 3.14 has it, older ones the package zstandard."""
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None
