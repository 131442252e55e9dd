"""Files that appear whole or not at all, locks, and disk errors in plain words."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError


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


def test_disk_errors_become_plain(tmp_path):
    with pytest.raises(UserError, match="no space left on device"), files.disk_errors("/dev/full"):
        Path("/dev/full").write_text("x")
    with pytest.raises(UserError, match="no space left"), files.disk_errors(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device [source 17]")
    with pytest.raises(UserError, match="x has disappeared"), files.disk_errors(tmp_path / "x"):
        raise ValueError("NOT_FOUND")
    with pytest.raises(ValueError, match="a bug"), files.disk_errors(tmp_path):
        raise ValueError("a bug")
    with pytest.raises(UserError, match="as it is"), files.disk_errors(tmp_path):
        raise UserError("as it is")


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
