"""Weights & Biases: offline runs of the real package, read back with its own record types."""

import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes import train as train_mode
from lora_diffusion_jax.training import wandb_sink
from lora_diffusion_jax.training.writers import Writers, read_metrics
from tests.modes.running import TINY, run
from tests.small import ROOT, config_flags, small_config

wandb = pytest.importorskip("wandb")


def records(path):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_runs(workdir):
    """(run's ID, config, history: step -> values) of each offline run, in order."""
    found = []
    for path in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
        identity, config, history = "", {}, {}
        for record in records(path):
            if record.HasField("run"):
                identity = record.run.run_id
                config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
                values = {key: json.loads(i.value_json) for key, i in items.items()}
                history.setdefault(record.history.step.num, {}).update(values)
        found.append((identity, config, history))
    return found


PROGRAM = """
import sys
from lora_diffusion_jax.modes.main import main
sys.exit(main(sys.argv[1:]))
"""


def train(path, data_dir, images):
    """Trains in a process of its own, offline by the environment; returns what it printed."""
    flags = config_flags(
        data__data_dir=data_dir,
        train__total_images=images,
        train__log_every=16,
        log__wandb_project="tests",
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--mode=train", *TINY, *flags, f"--workdir={path}"],
        env={**os.environ, "WANDB_MODE": "offline"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_numbers_pictures_and_the_config_at_their_images(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = wandb_sink.wandb_sink(tmp_path, {"lora": {"rank": 4}}, project="tests")
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 1), np.uint8)
    with Writers(tmp_path, 16, 0, [sink]) as writer:
        writer.write(1, {"train/loss": 1.5, "train/grad_norm": float("nan")})
        writer.write(2, {"samples/grid": picture}, "samples")
    ((identity, config, history),) = offline_runs(tmp_path)
    assert identity == (tmp_path / "wandb_id").read_text().strip()
    assert config["lora"] == {"rank": 4}
    assert (history[16]["train/loss"], history[16]["step"], history[16]["images"]) == (1.5, 1, 16)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/samples/*.png")
    with Image.open(file) as found:
        np.testing.assert_array_equal(np.asarray(found), picture[..., 0])


@pytest.mark.slow
def test_a_run_and_its_resumption_have_what_metrics_jsonl_has(tmp_path):
    path, data_dir = tmp_path / "run", tmp_path / "data"
    text = train(path, data_dir, 32)
    assert "Weights & Biases: run" in text
    train(path, data_dir, 64)
    (first, config, early), (second, _, late) = offline_runs(path)
    assert first == second == (path / "wandb_id").read_text().strip()
    assert config["train"]["batch_size"] == 16
    assert config["lora"]["rank"] == 2
    pictures = 0
    for line in read_metrics(path):
        values = (early if line["images"] <= 32 else late)[line["images"]]
        for name, value in line.items():
            if "/" in name and value is not None:
                assert values[name] == pytest.approx(value, rel=1e-6), (name, line)
        assert (values["step"], values["images"]) == (line["step"], line["images"])
        if line.get("callback") == "samples":
            pictures += values["samples/grid/_type"] == "image-file"
    assert pictures == 2
    assert not set(early) & set(late)


def test_a_service_that_dies_does_not_end_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = wandb_sink.wandb_sink(tmp_path, {"a": 1}, project="tests")
    sink.write(16, 1, {"train/loss": 1.0})
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    ours = [line for line in listed.splitlines() if f"--pid {os.getpid()}" in line]
    assert len(ours) == 1, listed
    os.kill(int(ours[0].split()[0]), signal.SIGKILL)
    for step in range(2, 50):
        sink.write(
            16 * step, step, {"train/loss": 1.0, "samples/grid": np.zeros((4, 4, 1), np.uint8)}
        )
    sink.close(failed=False)
    assert capsys.readouterr().out.count("warning: Weights & Biases failed") == 1


def test_what_was_sent_before_a_kill_is_not_sent_twice(monkeypatch):
    """Of a run whose last checkpoint is older than its last line."""

    class Run:
        starting_step = 33  # the server has 32

        def __init__(self):
            self.steps = []

        def log(self, values, step):
            self.steps.append(step)

    run_there = Run()
    sink = wandb_sink.WandbSink(wandb, run_there)
    for images in (16, 32, 48):
        sink.write(images, images // 16, {"train/loss": 1.0})
    assert run_there.steps == [48]


def test_mistakes_are_found_before_the_training(tmp_path, monkeypatch):
    config = small_config(log__wandb_project="x", log__wandb_mode="sometimes")
    with pytest.raises(UserError, match="log.wandb_mode is 'sometimes'"):
        train_mode.check_training(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = ["--config.log.wandb_project=x", f"--config.data.data_dir={tmp_path}"]
    text = run("--mode=train", *TINY, *flags, f"--workdir={tmp_path / 'run'}", status=2)
    assert "needs the package wandb, which is not installed; pip install" in text
    assert not (tmp_path / "run").exists()
    config = small_config()
    train_mode.check_training(config)  # without it nothing is missing


def test_a_login_that_is_missing_is_one_sentence(tmp_path, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="No API key configured.*log.wandb_mode=offline"):
        wandb_sink.wandb_sink(tmp_path, {}, project="tests")
