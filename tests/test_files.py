"""Files that appear whole or not at all, locks, and disk errors in plain words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes.evaluate import newest_change
from lora_diffusion_jax.outputs import Output
from tests.small import deep_folders


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail_half_way():
        with files.atomic(path) as temporary:
            temporary.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def lose(folder, error):
    folder.rmdir()
    raise error


def test_disk_errors_become_plain(tmp_path):
    with pytest.raises(UserError, match="no space left on device"), files.disk_errors("/dev/full"):
        Path("/dev/full").write_text("x")
    with pytest.raises(UserError, match="no space left"), files.disk_errors(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device [source 17]")
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="x has disappeared"), files.disk_errors(tmp_path / "x"):
        lose(tmp_path / "x", ValueError("whatever a library says"))
    with pytest.raises(ValueError, match="a bug"), files.disk_errors(tmp_path):
        raise ValueError("a bug")
    with pytest.raises(UserError, match="as it is"), files.disk_errors(tmp_path):
        raise UserError("as it is")


def test_a_folder_created_anew_is_not_the_one_held(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = files.Held(folder)
    (folder / "a").write_text("changes inside do not matter")
    assert held.is_there()
    folder.rename(tmp_path / "elsewhere")
    assert not held.is_there()
    folder.mkdir()
    assert not held.is_there()
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert held.is_there()
    shutil.rmtree(folder)
    folder.mkdir()  # the file system may give it the number of the first
    assert not held.is_there()
    held.close()


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), RuntimeError("no memory")])
def test_what_is_not_there_yet_has_not_disappeared(tmp_path, error):
    with pytest.raises(type(error)), files.disk_errors(tmp_path / "new" / "file"):
        raise error
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(UserError, match="run has disappeared"),
        files.disk_errors(tmp_path / "run" / "new" / "file"),
    ):
        lose(tmp_path / "run", error)


HOLD = """
import sys
from lora_diffusion_jax.files import Lock
with Lock(sys.argv[1], "taken", holder="a test"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_dies(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="taken by a test"):
            files.Lock(path, "taken by {holder}")
    finally:
        holder.kill()
        holder.wait()
    with files.Lock(path, "taken") as lock:
        lock.release(remove=True)
    assert not path.exists()


LINKS = {
    "to a file": lambda path, outside: path.symlink_to(outside),
    "to nothing": lambda path, outside: path.symlink_to(outside.with_name("new")),
    "a second name": lambda path, outside: os.link(outside, path),
    "a pipe": lambda path, outside: os.mkfifo(path),
}
WRITERS = {
    "lock": lambda path: files.Lock(path, "taken", holder="me"),
    "append": lambda path: files.append(path, b"x"),
    "write_text": lambda path: files.write_text(path, "x"),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, kind, writer):
    outside, path = tmp_path / "precious", tmp_path / "run" / "file"
    outside.write_text("precious")
    path.parent.mkdir()
    LINKS[kind](path, outside)
    if writer == "write_text":  # replaces the link
        WRITERS[writer](path)
        assert path.read_text() == "x"
        assert not path.is_symlink()
    else:
        with pytest.raises(UserError, match="file is a link, or neither|Cannot use"):
            WRITERS[writer](path)
    assert outside.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "run"]


def test_a_folder_below_another_is_no_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")  # the user's own choice
    (tmp_path / "real").mkdir()
    folder = files.make_folder(tmp_path / "run" / "a" / "b", tmp_path / "run")
    assert folder.is_dir()
    (folder / "c").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="c is a link"):
        files.make_folder(folder / "c" / "d", tmp_path / "run")
    assert not list((tmp_path / "outside").iterdir())


def test_every_flipped_bit_of_a_line_is_noticed(tmp_path):
    path, records = tmp_path / "x.jsonl", [{"step": k, "a": 0.5 + k, "b": "word"} for k in range(3)]
    for record in records:
        files.append(path, files.checked_line(json.dumps(record)))
    assert files.read_lines(path) == (records, [])
    whole = path.read_bytes()
    length = whole.index(b"\n") + 1
    for bit in range(8 * (length - 1)):
        data = bytearray(whole)
        data[length + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        good, damaged = files.read_lines(path)
        assert damaged
        assert good == [records[0], records[2]]


def test_old_lines_and_endless_brackets(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"[" * 200_000 + b"\n5\n\xff\n")
    good, damaged = files.read_lines(path)
    assert good == [{"a": 1}]
    assert len(damaged) == 3


def test_a_line_after_a_torn_one_stands_alone(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"torn")
    files.append(path, b"next\n")
    files.append(path, b"last\n")
    assert path.read_bytes() == b"torn\nnext\nlast\n"


def test_checksums_are_those_of_sha256sum_and_notice_changes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"abc")
    (tmp_path / "y").write_bytes(b"")
    assert files.check_sums(tmp_path) is None
    files.write_sums(tmp_path)
    # FIPS 180-2, appendix B.1, and the digest of nothing
    assert (tmp_path / files.SUMS).read_text() == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a/x\n"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  y\n"
    )
    assert files.check_sums(tmp_path) == ""
    (tmp_path / "y").write_bytes(b"\0")
    assert "y does not have the content" in files.check_sums(tmp_path)
    assert files.check_sums(tmp_path, lambda name: name.startswith("a/")) == ""
    (tmp_path / "y").unlink()
    assert files.check_sums(tmp_path) == "y is missing"
    (tmp_path / files.SUMS).write_text("ba78")
    assert files.check_sums(tmp_path) == "SHA256SUMS is damaged"


@pytest.mark.parametrize(
    "work",
    [files.write_sums, newest_change, lambda folder: Output(folder, np.zeros(1, int), None, "")],
)
def test_folders_deeper_than_python_recurses_are_refused(tmp_path, work):
    inside = pytest.raises(UserError, match="folders inside one another; expected at most 100")
    with deep_folders(tmp_path, "a"), inside:
        work(tmp_path)


def test_what_is_set_aside_keeps_its_content(tmp_path):
    for n, name in ((1, "bad"), (2, "bad-2"), (3, "bad-3")):
        (tmp_path / "x").write_text(str(n))
        assert files.set_aside(tmp_path / "x", "bad").name == name
        assert (tmp_path / name).read_text() == str(n)


def test_paths_are_expanded_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/disk")
    monkeypatch.delenv("NOPE", raising=False)
    assert files.expand("~/x") == f"{tmp_path}/x"
    assert files.expand("${PLACE}/$PLACE") == "/disk//disk"
    assert files.expand("a/~b c") == "a/~b c"
    assert files.expand("") == ""
    for text, words in (
        ("gs://bucket/x", "--out=gs://bucket/x is a URL"),
        ("https:/host/x", "is a URL"),
        ("file:///x", "is a URL"),
        ("$NOPE/x", "variable NOPE is not set"),
        ("~no_such_user_here/x", "no home directory"),
    ):
        with pytest.raises(UserError) as error:
            files.expand(text, "--out")
        assert words in str(error.value)
