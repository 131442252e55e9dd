"""Runs in an object store, end to end, by real processes that talk to a real server."""

import json
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_diffusion_jax import remote
from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.modes.running import run, start, train_command
from tests.processes.test_processes import STAND_IN, Job
from tests.processes.test_processes import train as train_together
from tests.remote.servers import BUCKET, serving
from tests.small import config_flags
from tests.training.stand_in import train_lines
from tests.training.test_survival import STEPS, Run

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path):
    """An undisturbed run of the stand-in on this machine: its digest and its lines."""
    done = Run(tmp_path / "here")
    assert done.end() == 0, done.output
    about = json.loads((tmp_path / "here.json").read_text())
    return about["digest"], train_lines(tmp_path / "here")


def fetched(url):
    """A run's small files as they are in the store now."""
    remote.close()
    return Path(remote.local(url))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_stopped_and_resumed_it_ends_with_the_bits_of_a_local_run(scheme, tmp_path, here):
    with serving(scheme):
        url, about = f"{scheme}://{BUCKET}/runs/killed", tmp_path / "about.json"

        # kill -9 from within, while the checkpoint of step 10 is being carried over or just was
        run = Run(url, "--about", about, "--die-at", 11)
        assert run.end() == -signal.SIGKILL
        assert set(saved_steps(fetched(url))) <= {5, 10}

        # SIGTERM: the step is finished, saved, and in the store when the process ends
        run = Run(url, "--about", about, "--pause", 0.1)
        run.wait_for("batch 17")
        second = Run(url, "--about", about)  # meanwhile a second one is refused
        run.process.send_signal(signal.SIGSTOP)
        assert second.end() == 2
        assert re.search(
            rf"Another run is using {url} \(process {run.process.pid} on .*; its lease lasts until "
            r"\d\d:\d\d:\d\d\)",
            second.output,
        ), second.output
        run.process.send_signal(signal.SIGCONT)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.output
        stopped_at = max(saved_steps(fetched(url)))
        assert stopped_at >= 17

        # kill -9 from outside
        run = Run(url, "--about", about, "--pause", 0.05)
        run.wait_for(f"resuming from the checkpoint of step {stopped_at}")
        run.wait_for(f"batch {stopped_at + 6}")
        run.process.kill()
        assert run.end() == -signal.SIGKILL

        run = Run(url, "--about", about)
        assert run.end() == 0, run.output
        assert json.loads(about.read_text())["digest"] == here[0]
        workdir = fetched(url)
        assert train_lines(workdir) == here[1]
        assert saved_steps(workdir)[-1] == STEPS
        remote.close()


def test_two_processes_train_there_and_resume_to_the_same_bits(gcs, base, tmp_path, monkeypatch):
    """Each has a mirror of its own; process 0 gets all arrays, which fsdp spreads over both."""
    layout = ("--fsdp", 2, "--data", 1, "--freeze")
    train_together(tmp_path / "here", 2, *layout)
    about = tmp_path / "about.json"
    with Job(2, *STAND_IN, base, "--about", about, *layout, "--die-at", 22) as job:
        job.end()
    workdir = fetched(base)
    assert saved_steps(workdir)
    assert any(name.startswith("base/weights/") for name in remote.listing(workdir))
    outputs = train_together(base, 2, *layout, "--about", about)
    assert "resuming from the checkpoint of step " in outputs[0]
    expected = json.loads((tmp_path / "here.json").read_text())
    assert json.loads(about.read_text())["digest"] == expected["digest"]
    assert train_lines(fetched(base)) == train_lines(tmp_path / "here")


def test_commands_work_there_as_they_do_here(base, store, tmp_path):
    data_dir, local = tmp_path / "tfds", tmp_path / "local"
    run(*train_command(local, data_dir, 96))
    printed = run(*train_command(base, data_dir, 96))
    assert "/tmp" not in printed
    assert {"config.json", "metrics.jsonl", "index.html", "parameters.txt"} <= {
        name.rsplit("/")[-1] for name in store.find(base)
    }
    assert any(name.endswith("samples/0000000096.png") for name in store.find(base))
    for name in ("config.json", "metrics.jsonl", "index.html"):
        assert b"mirror" not in store.cat_file(f"{base}/{name}")
    found = {}
    for name, where in (("local", local), ("there", base)):
        remote.close()
        out = tmp_path / f"{name}.npz"
        run("--mode=sample", f"--workdir={where}", "--seeds=0-3", f"--out={out}")
        found[name] = np.load(out)["images"]
        run("--mode=export", f"--workdir={where}", f"--out={tmp_path / name}.safetensors")
        found[f"{name} file"] = load_file(tmp_path / f"{name}.safetensors")
    np.testing.assert_array_equal(found["local"], found["there"])
    jax.tree.map(np.testing.assert_array_equal, found["local file"], found["there file"])
    assert "No problems found" in run("--mode=doctor", f"--workdir={base}")
    assert "Adapter parameters" in run("--mode=info", f"--workdir={base}")
    run("--mode=analyze", f"--workdir={base}", f"--out={tmp_path / 'analysis'}", "--num=4")
    printed = run("--mode=likelihood", f"--workdir={base}", "--num=4")
    assert json.loads(printed.splitlines()[-1])["num"] == 4

    # Another run starts from it, and an import reads an exported file there.
    store.put_file(str(tmp_path / "there.safetensors"), f"{base}/there.safetensors")
    run(
        "--mode=import",
        f"--source={base}/there.safetensors",
        f"--workdir={base}-imported",
    )
    remote.close()
    run(*train_command(f"{base}-on", data_dir, 32, *config_flags(init_from=f"{base}-imported")))

    # A damaged object is told, and the checkpoint before is used.
    largest = max(store.find(f"{base}/checkpoints/6/weights", detail=True).items(),
                  key=lambda item: item[1]["size"])[0]  # fmt: skip
    data = bytearray(store.cat_file(largest))
    data[len(data) // 2] ^= 1
    store.pipe_file(largest, bytes(data))
    printed = run("--mode=doctor", f"--workdir={base}", status=1)
    assert "does not have the content that was saved" in printed
    printed = run("--mode=sample", f"--workdir={base}", "--seeds=0-3", f"--out={tmp_path}/d.npz")
    assert f"checkpoint 6 in {base}/checkpoints cannot be read" in printed
    assert json.loads(printed.splitlines()[-1])["step"] == 3
    run("--mode=train", f"--workdir={base}")
    printed = run("--mode=doctor", f"--workdir={base}", status=1)
    assert f"{base}/checkpoints/unreadable-6 could not be read" in printed
    run("--mode=sample", f"--workdir={base}", "--seeds=0-3", f"--out={tmp_path}/again.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["images"], found["local"])


def test_a_program_that_is_killed_leaves_a_run_that_goes_on(base, tmp_path):
    """main.py itself, killed once its first checkpoint is there."""
    data_dir = tmp_path / "tfds"
    command = train_command(base, data_dir, 240)
    process = start(*command)
    folder = Path(remote.local(base))
    deadline = time.monotonic() + 300
    while not saved_steps(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    output = process.communicate()[0]
    assert saved_steps(folder), output
    assert saved_steps(folder)[-1] < 15, "it ended before it could be killed"
    remote.close()
    assert "resuming from the checkpoint of step " in run("--mode=train", f"--workdir={base}")
    run(*train_command(tmp_path / "here", data_dir, 240))
    images = []
    for where in (base, tmp_path / "here"):
        for weights in ("ema", "raw"):
            out = tmp_path / f"{weights}{len(images)}.npz"
            run("--mode=sample", f"--workdir={where}", "--seeds=0-3", f"--out={out}",
                f"--weights={weights}")  # fmt: skip
            images.append(np.load(out)["images"])
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[3])
