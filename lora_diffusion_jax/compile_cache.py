"""The persistent compilation cache: compiled programs are kept for the next start."""

import contextlib
import os
import platform
import stat
import sys
import zlib
from pathlib import Path

import jax

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError

MIN_COMPILE_SECONDS = 0.1  # faster ones are not stored: reading an entry takes some 10 ms
MAX_GIB = 5.0


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
    # CPU programs run only on the kind of processor they were compiled for, and machines of several
    # kinds may share a home directory.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    machine = f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
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
            min_seconds = 1e9  # never write
            folder = folder if Path(folder).is_dir() else ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(min_seconds))
    return folder


def find_other_writer(folder: Path) -> str:
    """Says who else could put programs into the cache; '' if nobody can, or it does not exist yet."""
    if not folder.exists():
        return ""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        problem = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return ""
    return (
        f"the compilation cache {folder} {problem}, who could place programs there, so it is not used. "
        "Set JAX_COMPILATION_CACHE_DIR to a folder of your own, or run: chmod go-w " + str(folder)
    )


def tidy(folder: Path, limit: int) -> None:
    """Removes truncated entries, and the least recently used ones beyond `limit` bytes.

    JAX does neither well (0.10.2, tried): it never replaces an entry that a kill truncated, but warns
    and compiles again at every start. Its own limit, `jax_compilation_cache_max_size`, needs the
    package filelock, and once an entry lacks its `-atime` file (a kill between the two, or an entry
    stored without a limit) every later write fails.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = folder / ".checked"  # older entries are known to be whole
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
            if total > limit or (stat.st_mtime >= checked - 1 and not _is_whole(path.read_bytes())):
                path.unlink(missing_ok=True)


def _is_whole(data: bytes) -> bool:
    if data.startswith(b"\x28\xb5\x2f\xfd"):  # zstd, used where zstandard is installed: not checked
        return True
    try:
        zlib.decompress(data)
    except zlib.error:
        return False
    return True
