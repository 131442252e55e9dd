"""What a program does before anything compiles: it turns the persistent compilation cache on."""

import os
import platform
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from lora_diffusion_jax.errors import UserError

# Programs that compile faster are not stored: reading one back costs some 10 ms as well.
MIN_COMPILE_SECONDS = 0.1
MAX_BYTES = 5 * 2**30  # the default of LORA_DIFFUSION_CACHE_GIB
NAMED, SIZE = "JAX_COMPILATION_CACHE_DIR", "LORA_DIFFUSION_CACHE_GIB"
_ENTRY = "*-cache"  # of JAX
_STAMP = ".checked"  # its time: entries older than it are known to be whole
_ZSTD = b"\x28\xb5\x2f\xfd"


def cache_place(environment: Mapping[str, str] = os.environ) -> str:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, else a folder of this machine
    below $XDG_CACHE_HOME or ~/.cache; '' where JAX_ENABLE_COMPILATION_CACHE turns it off.

    CPU programs run on the kind of processor they were compiled for, and a home may be shared by
    several kinds: hence a folder for each.
    """
    if environment.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false", "f", "off"):
        return ""
    if NAMED in environment:
        return environment[NAMED]
    home = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return str(home / "lora_diffusion_jax" / "compiled" / _machine())


def _machine() -> str:
    """A name for this kind of processor: x86_64-1a2b3c4d."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def use_compilation_cache() -> str:
    """Lets JAX keep compiled programs for the next start; returns where, '' for nowhere.

    Entries that a kill or a full disk cut short are removed, and the least recently used ones
    beyond LORA_DIFFUSION_CACHE_GIB (5). JAX's own bound is not used: it locks and writes on every
    read, and a kill between its two files leaves an error at every later start.

    A folder that cannot be written is a warning; what lies there is still read.
    """
    place = cache_place()
    if not place or (NAMED not in os.environ and _may_differ_between_hosts()):
        jax.config.update("jax_compilation_cache_dir", None)
        return ""
    jax.config.update("jax_compilation_cache_dir", place)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if "://" in place:  # a bucket, with rules of its own
        return place
    problem = writing_problem(Path(place))
    if problem:
        print(
            f"warning: compiled programs cannot be kept in {place} ({problem}), so every start "
            f"compiles anew. Set {NAMED} to a folder that can be written.",
            file=sys.stderr,
        )
        if not Path(place).is_dir():
            jax.config.update("jax_compilation_cache_dir", None)
            return ""
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # read, never write
        return place
    tidy(Path(place), max_bytes())
    return place


def _may_differ_between_hosts() -> bool:
    """Whether this is one of several GPU processes, whose homes may be of different hosts.

    When they compile, they share the search for fast kernels; one that found the program in its
    cache would leave the others waiting.
    """
    return jax.distributed.is_initialized() and jax.default_backend() == "gpu"


def writing_problem(folder: Path) -> str:
    """Why a folder cannot be made or written, '' if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def max_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The bound of the cache's size in bytes; without LORA_DIFFUSION_CACHE_GIB the default.

    Raises:
        UserError: the variable is no number of at least 0.
    """
    text = environment.get(SIZE)
    if text is None:
        return MAX_BYTES
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < 2**30:
        raise UserError(
            f"{SIZE}={text} is not a size in GiB; give a number such as 5, or unset it."
        )
    return int(size * 2**30)


def entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The compiled programs in a folder; those that another process removes meanwhile are left out."""
    for path in folder.glob(_ENTRY):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue


def tidy(folder: Path, limit: int) -> None:
    """Removes entries that were cut short, then the least recently used ones beyond `limit` bytes.

    Each entry is decompressed once, at the first start after it was written. Removing what another
    process is just writing costs that entry alone.
    """
    stamp = folder / _STAMP
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    try:
        stamp.touch()
        kept = []
        for path, stat in entries(folder):
            if stat.st_mtime >= checked - 1 and not _is_whole(path):
                path.unlink(missing_ok=True)
            else:
                kept.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
    except OSError as error:  # it can be tidied another time
        print(f"warning: {folder} could not be tidied ({error})", file=sys.stderr)


def _is_whole(path: Path) -> bool:
    """Whether an entry can be decompressed; True where this Python lacks the means to see."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return True
    if data[:4] == _ZSTD:
        return _is_whole_zstd(data)
    reader = zlib.decompressobj()
    try:
        reader.decompress(data)
    except zlib.error:
        return False
    return reader.eof


def _is_whole_zstd(data: bytes) -> bool:
    try:
        import zstandard
    except ImportError:
        return True
    reader = zstandard.ZstdDecompressor().decompressobj()
    try:
        reader.decompress(data)
    except zstandard.ZstdError:
        return False
    return reader.eof
