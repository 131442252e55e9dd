import json
import subprocess
import sys

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.workdir import (
    differences,
    has_changed,
    open_workdir,
    read_config,
    reconcile_config,
)

CONFIG = {
    "model": {"channels": 32, "mult": (1, 2)},
    "train": {"lr": 1e-3, "log_every": 10},
    "e": {},
}


def test_config_is_written_then_compared(tmp_path, capsys):
    with open_workdir(tmp_path, CONFIG) as directory:
        assert directory == tmp_path
    assert read_config(tmp_path) == json.loads(json.dumps(CONFIG))
    reconcile_config(tmp_path, CONFIG)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", ["/data/\udcff", ("cat", "\udcff")])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    config = {**CONFIG, "data": {"x": value}}
    with (
        pytest.raises(UserError, match=r"^data\.x is '.*\\udcff', which is no UTF-8"),
        open_workdir(tmp_path / "run", config),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_difference_that_matters_is_an_error_with_both_values(tmp_path):
    reconcile_config(tmp_path, CONFIG)
    other = {
        "model": {"channels": 64, "mult": (1, 2)},
        "train": {"lr": 2e-3, "log_every": 10},
        "n": 1,
    }
    with pytest.raises(UserError) as caught:
        reconcile_config(tmp_path, other, ("train.*_every",))
    message = str(caught.value)
    assert "model.channels: 32 there, 64 now" in message
    assert "train.lr: 0.001 there, 0.002 now" in message
    assert "n: 'absent' there, 1 now" in message
    assert "another workdir" in message
    assert read_config(tmp_path)["model"]["channels"] == 32


def test_a_field_that_may_change_is_logged_and_kept(tmp_path, capsys):
    reconcile_config(tmp_path, CONFIG)
    other = {**CONFIG, "train": {"lr": 1e-3, "log_every": 20}}
    reconcile_config(tmp_path, other, ("train.*_every",))
    assert capsys.readouterr().out == "config: train.log_every changes from 10 to 20\n"
    assert read_config(tmp_path)["train"]["log_every"] == 20


def test_differences_see_lists_tuples_and_empty_groups_alike():
    assert differences({"a": [1, 2], "b": {}}, {"a": (1, 2), "b": {}}) == ({}, {})
    assert differences({"a": [1, 2]}, {"a": [2, 1]}) == ({"a": ([1, 2], [2, 1])}, {})


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "\0\1", "[" * 100_000])
def test_a_damaged_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        reconcile_config(tmp_path, CONFIG)


def test_a_changed_config_is_told_of_once(tmp_path, capsys):
    reconcile_config(tmp_path, CONFIG)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("32", "33"))
    assert read_config(tmp_path)["model"]["channels"] == 33
    read_config(tmp_path)
    assert capsys.readouterr().out.count("config.json has changed since it was written") == 1
    (tmp_path / "config.json.sha256").unlink()
    assert not has_changed(tmp_path)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        read_config(tmp_path)


def test_a_workdir_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"Cannot use {path}"), open_workdir(path, {}):
            pass


HOLD = """
import sys
from lora_diffusion_jax.training.workdir import open_workdir
with open_workdir(sys.argv[1], {}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_keeps_a_second_run_out_until_the_first_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=rf"Another run .* \(process {holder.pid} on "),
            open_workdir(tmp_path, {}),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with open_workdir(tmp_path, {}) as directory:
        assert directory == tmp_path
