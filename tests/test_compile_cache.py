"""The compilation cache: where it is, what is removed from it, and what is said when it fails."""

import collections
import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_diffusion_jax import compile_cache
from lora_diffusion_jax.errors import UserError

PROGRAM = """
import jax
from lora_diffusion_jax import compile_cache
print(compile_cache.use_compilation_cache())
print(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((3, 5))))
"""


def start(program=PROGRAM, **environment):
    """(lines printed, errors printed) of a program that compiles."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    least = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, **least, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


def test_it_is_on_by_default_and_replaces_truncated_entries(tmp_path):
    lines, errors = start(XDG_CACHE_HOME=tmp_path)
    assert errors == ""
    (place,) = (tmp_path / "lora_diffusion_jax" / "compiled").iterdir()
    assert lines == [str(place), "45.0"]
    whole = {path: path.read_bytes() for path in place.glob("*-cache")}
    assert whole
    for path, data in whole.items():  # as a kill or a full disk leaves them
        path.write_bytes(data[: len(data) // 2])
    assert start(XDG_CACHE_HOME=tmp_path) == (lines, "")
    for path, data in whole.items():  # compiled again; a few bytes more or less
        assert path.stat().st_size > 0.9 * len(data)


def test_a_folder_that_cannot_be_created_is_one_warning(tmp_path):
    (tmp_path / "file").touch()
    lines, errors = start(JAX_COMPILATION_CACHE_DIR=tmp_path / "file" / "cache")
    assert lines == ["", "45.0"]
    assert len(errors.splitlines()) == 1
    assert "Set JAX_COMPILATION_CACHE_DIR to a writable folder" in errors


def test_the_least_recently_used_entries_go_first(tmp_path):
    for age in range(4):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(zlib.compress(os.urandom(1000), level=0))
        os.utime(path, (1e9 - age, 1e9 - age))
    size = path.stat().st_size
    (tmp_path / "other").write_bytes(b"x" * 9000)
    compile_cache.tidy(tmp_path, 2 * size)
    assert {p.name for p in tmp_path.glob("*")} == {"0-cache", "1-cache", "other", ".checked"}


def test_an_entry_that_unpacks_without_end_is_removed(tmp_path, monkeypatch):
    """Before JAX unpacks it, and without taking its memory here."""
    monkeypatch.setattr(compile_cache, "MAX_UNPACKED", 8 << 20)
    packer = zlib.compressobj()
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    tracemalloc.start()
    assert not compile_cache._is_whole(bomb)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    exact = zlib.compress(bytes(8 << 20))
    entries = {"bomb": bomb, "exact": exact, "short": exact[:-1], "empty": b"", "text": b"text"}
    entries["noise"] = zlib.compress(os.urandom(3 << 20))
    for name, data in entries.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
    compile_cache.tidy(tmp_path, 1 << 30)
    assert {p.name for p in tmp_path.glob("*-cache")} == {"exact-cache", "noise-cache"}


THROUGH_CLI = f"""
from lora_diffusion_jax import cli
def work(argv):
    exec(argv[0])
    return 0
cli.run(work, [{PROGRAM!r}])
"""


def test_rot_in_an_entry_is_told_once_and_compiled_again(tmp_path):
    """Whether JAX packs by zlib or by zstd; the entry's time does not show it."""
    lines, errors = start(THROUGH_CLI, XDG_CACHE_HOME=tmp_path)
    assert (lines[1], errors) == ("45.0", "")
    (place,) = (tmp_path / "lora_diffusion_jax" / "compiled").iterdir()
    for path in place.glob("*-cache"):
        kept, data = path.stat(), bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns - 10 * 10**9))
    again, errors = start(THROUGH_CLI, XDG_CACHE_HOME=tmp_path)
    assert again == lines
    assert "warning: Error reading persistent compilation cache entry" in errors
    assert start(THROUGH_CLI, XDG_CACHE_HOME=tmp_path) == (lines, "")  # removed as it ended
    assert start(THROUGH_CLI, XDG_CACHE_HOME=tmp_path) == (lines, "")


ZSTD = compile_cache._zstd_module()


def test_an_entry_of_zstd_is_left_to_environments_that_have_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_zstd_module", lambda: None)
    path = tmp_path / "a-cache"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    compile_cache.tidy(tmp_path, 1 << 30)
    assert path.read_bytes() == b"\x28\xb5\x2f\xfd" + bytes(9)


@pytest.mark.skipif(ZSTD is None, reason="neither Python 3.14 nor the package zstandard")
def test_entries_of_zstd_have_the_same_limit_and_get_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_UNPACKED", 8 << 20)
    rng = np.random.default_rng(0)
    program = rng.integers(0, 4, 10_000).astype(np.uint8).tobytes() * 3
    packed = ZSTD.compress(program)
    entries = {"good": packed, "exact": ZSTD.compress(bytes(8 << 20))}
    bad = {"bomb": ZSTD.compress(bytes(9 << 20)), "head": packed[:4], "half": packed[:999]}
    bad |= {"end": packed[:-1], "none": packed[:5] + bytes(999)}
    for name, data in (entries | bad).items():
        (tmp_path / f"{name}-cache").write_bytes(data)
    compile_cache.tidy(tmp_path, 1 << 30)
    assert {p.name for p in tmp_path.glob("*-cache")} == {"good-cache", "exact-cache"}
    sealed = (tmp_path / "good-cache").read_bytes()
    assert ZSTD.decompress(sealed) == program

    def outcomes(data):
        found = collections.Counter()
        for _ in range(300):
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
            try:
                found["silent" if ZSTD.decompress(bytes(flipped)) != program else "harmless"] += 1
            except ZSTD.ZstdError:
                found["told"] += 1
        return found

    assert outcomes(packed)["silent"] > 30  # as JAX packs it
    assert outcomes(sealed)["silent"] == 0
    compile_cache.tidy(tmp_path, 1 << 30)
    assert (tmp_path / "good-cache").read_bytes() == sealed


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"JAX_COMPILATION_CACHE_DIR": "/a", "JAX_ENABLE_COMPILATION_CACHE": "False"}, ""),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_the_environment_decides(environment, place, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compile_cache.cache_dir() == place


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, capsys, monkeypatch):
    """A compiled program is machine code: whoever writes it there has it run."""
    monkeypatch.setattr(jax.config, "update", lambda *setting: settings.append(setting))
    for mode, words in ((0o777, "mode 777"), (0o770, "mode 770"), (0o755, "")):
        settings = []
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        assert compile_cache.use_compilation_cache() == ("" if words else str(folder))
        assert words in capsys.readouterr().err
        if words:
            assert settings == [("jax_compilation_cache_dir", None)]
            assert not list(folder.iterdir())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if folder.stat().st_uid:
        assert "belongs to another user" in compile_cache.find_other_writer(folder)


def test_a_folder_that_others_can_exchange_is_not_used(tmp_path, monkeypatch):
    """By renaming what lies above it, or by a link of their own on the way."""
    folder = tmp_path / "open" / "inner" / "cache"
    folder.mkdir(parents=True)
    assert compile_cache.find_other_writer(folder) == ""
    modes = [
        (0o777, True, True),
        (0o775, False, True),
        (0o775, True, False),
        (0o1777, False, False),
    ]
    for mode, private, found in modes:
        monkeypatch.setattr(compile_cache, "_is_private", lambda group, private=private: private)
        (tmp_path / "open").chmod(mode)
        for place in (folder, folder.parent / "not yet"):
            words = f"lies below {tmp_path}/open, which can be written to by others (mode {mode:o})"
            assert (words in compile_cache.find_other_writer(place)) == found
    (tmp_path / "link").symlink_to("open")  # the way leads through here, whoever made it
    ways = [tmp_path / "link" / "inner" / "cache", tmp_path / "link" / ".." / "open" / "inner"]
    (tmp_path / "open").chmod(0o777)
    assert all("written to by others" in compile_cache.find_other_writer(way) for way in ways)
    (tmp_path / "open").chmod(0o700)
    assert not any(map(compile_cache.find_other_writer, ways))
    of_a_stranger = os.lstat(tmp_path / "link").st_ino
    lstat = Path.lstat

    def owned(path):
        found = lstat(path)
        uid = os.geteuid() + 1 if found.st_ino == of_a_stranger else found.st_uid
        return os.stat_result([*found[:4], uid, *found[5:]])

    monkeypatch.setattr(Path, "lstat", owned)
    for way in ways:
        words = f"lies below {tmp_path}/link, which belongs to another user"
        assert words in compile_cache.find_other_writer(way)
    assert compile_cache.find_other_writer(folder) == ""
    (tmp_path / "ring").symlink_to("ring")
    assert compile_cache.find_other_writer(tmp_path / "ring" / "cache") == ""


def test_the_stamp_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".checked").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=".checked is a link"):
        compile_cache.tidy(tmp_path / "cache", 10**9)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_limit_that_is_no_size_is_a_plain_error(text, monkeypatch):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE_GIB", text)
    with pytest.raises(UserError, match=f"LORA_DIFFUSION_CACHE_GIB={text}"):
        compile_cache.max_bytes()
