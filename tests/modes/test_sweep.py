"""`--mode=sweep` from the command line; most runs only pretend to train."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from lora_diffusion_jax import cli
from lora_diffusion_jax.modes.sweep import Checker
from lora_diffusion_jax.sweeps import local, state
from tests.modes.running import TINY, run, start
from tests.small import ROOT

STEPS = 3
# Stands in for main.py: what a run does follows from its seed.
PROGRAM = """
import sys
from tests.sweeps import pretend
folder = next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
failing = any(a == "--config.train.seed=7" for a in sys.argv)
sys.argv = ["", folder, "3", "fails" if failing else "ends"]
pretend.main()
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch, data_dir):
    """The beginning of a sweep's command, whose runs pretend to train."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(cli, "program", lambda: [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return [
        *("--mode=sweep", "--config=digits", f"--workdir={tmp_path / 'sweep'}", "--jobs=2"),
        *("--config.train.batch_size=10", "--config.train.total_images=30"),
        *("--config.eval.num_samples=0", f"--config.data.data_dir={data_dir}"),
    ]


def states(folder):
    return {name: entry.state for name, entry in state.read(folder).items()}


def starts(folder):
    """How often each run was started."""
    return {
        path.parent.name: path.read_text().count("$ ") for path in folder.glob(f"*/{local.LOG}")
    }


def test_a_sweep_makes_what_is_missing_reports_what_failed_and_grows(pretended, tmp_path):
    folder = tmp_path / "sweep"
    text = run(*pretended, "--sweep=train.seed=1,7;lora.rank=1,2", status=1)
    assert text.splitlines()[0].startswith("4 runs, 4 of them to do, 2 at a time")
    first = {"seed=1,rank=1": "done", "seed=1,rank=2": "done"}
    failed = {"seed=7,rank=1": "failed", "seed=7,rank=2": "failed"}
    assert states(folder) == first | failed
    assert "seed=7,rank=1 failed: exit status 2" in text
    assert "error: the loss has a mind of its own" in text
    assert "2 of 4 runs are not done" in text
    page = (folder / "index.html").read_text()
    assert "the loss has a mind of its own" in page
    assert len((folder / "table.csv").read_text().splitlines()) == 5

    # A value more; those that failed are tried again, and the rest is left alone.
    run(*pretended, "--sweep=train.seed=1,7;lora.rank=1,2,4", status=1)
    assert states(folder) == first | failed | {"seed=1,rank=4": "done", "seed=7,rank=4": "failed"}
    again = {"seed=1,rank=1": 1, "seed=1,rank=2": 1, "seed=7,rank=1": 2, "seed=7,rank=2": 2}
    assert starts(folder) == again | {"seed=1,rank=4": 1, "seed=7,rank=4": 1}

    # Fewer values: the others stay, and are not started.
    text = run(*pretended, "--sweep=train.seed=1;lora.rank=1,2")
    assert text.startswith("2 runs, 0 of them to do")
    assert states(folder)["seed=7,rank=1"] == "failed"
    assert not state.read(folder)["seed=7,rank=1"].listed


def test_the_states_of_a_killed_sweep_are_set_right(pretended, tmp_path):
    folder = tmp_path / "sweep"
    run(*pretended, "--sweep=train.seed=1,2")
    entries = state.read(folder)
    entries["seed=1"].state = entries["seed=2"].state = "running"  # as a kill -9 leaves it
    state.write(folder, entries)
    text = run(*pretended, "--sweep=train.seed=1,2,3")
    assert text.startswith("3 runs, 1 of them to do")
    assert set(states(folder).values()) == {"done"}
    assert set(starts(folder).values()) == {1}


def test_print_writes_commands_and_nothing_else(pretended, tmp_path, monkeypatch):
    monkeypatch.undo()
    text = run(*pretended, "--sweep=lora.sites='.*/(qkv|proj)',.*/qkv", "--launcher=print")
    commands = [shlex.split(line) for line in text.splitlines()]
    assert [command[-1] for command in commands] == [
        "--config.lora.sites=.*/(qkv|proj)",
        "--config.lora.sites=.*/qkv",
    ]
    for command in commands:
        assert command[:3] == [sys.executable, str(ROOT / "main.py"), "--mode=train"]
    assert not (tmp_path / "sweep").exists()


def test_mistakes_are_found_before_anything_is_written(pretended, tmp_path):
    folder = tmp_path / "sweep"
    for arguments, words in (
        (["--sweep=lora.rang=1"], "Did you mean lora.rank?"),
        (["--sweep=lora.rank=1,x"], "expected a value of type int"),
        (["--sweep=lora.rank=1,0"], "Run rank=0: lora.rank is 0"),
        (["--sweep=dtype=float32,float16"], "Run dtype=float16: Training in float16"),
        (["--sweep=model.channel_mult=(1,2),(1,1,1,1,1)"], "multiples of 16"),
        (["--sweep=sampler.num_steps=18,1"], "num_steps is 1"),
        (["--sweep=data.name=digits,nowhere"], "Run data.name=nowhere"),
        (["--sweep=train.seed=1", "--jobs=0"], "--jobs is 0"),
        (["--sweep=train.seed=1", "--num_processes=2"], "--num_processes is for a single run"),
        (["--sweep=train.seed=1", "--launcher=slurm", "--slurm=x"], "'x' is no setting"),
        (
            ["--sweep=train.seed=1", "--slurm=partition=x"],
            "--slurm holds settings of --launcher=slurm",
        ),
        (["--sweep=train.batch_size=1"], "swept over and overridden"),
        ([], "no function sweep(add)"),
    ):
        text = run(*pretended, *arguments, status=2)
        assert text.startswith("error: "), text
        assert words in text, text
        assert not folder.exists()
    assert "needs --config" in run("--mode=sweep", f"--workdir={folder}", status=2)


def test_a_run_of_another_config_is_refused_and_so_is_a_second_sweep(pretended, tmp_path):
    folder = tmp_path / "sweep"
    run(*pretended, "--sweep=train.seed=1")
    overrides = [argument for argument in pretended if argument.startswith("--config.")]
    config = cli.override(cli.load_config("digits")[0], [*overrides, "--config.train.seed=1"])
    config = Checker(needs_data=True)(config)
    (folder / "seed=1" / "config.json").write_text(json.dumps(config.to_dict()))
    run(*pretended, "--sweep=train.seed=1")
    text = run(*pretended, "--sweep=train.seed=1", "--config.model.channels=16", status=2)
    assert "seed=1 holds a run with another config" in text
    assert "model.channels: 32 there, 16 now" in text
    arguments = [a for a in pretended if not a.startswith("--workdir")]
    text = run(*arguments, f"--workdir={folder / 'seed=1'}", "--sweep=train.seed=1", status=2)
    assert "holds a run, and a sweep makes its runs below" in text
    script = (
        "import sys, time; from lora_diffusion_jax import files;"
        f"lock = files.Lock({str(folder / '.lock')!r}, '', 'process 1');"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        text = run(*pretended, "--sweep=train.seed=1", status=2)
        other.kill()
    assert "Another sweep is at work" in text


def test_planning_leaves_the_devices_to_the_runs(data_dir, tmp_path):
    """A sweep never asks JAX for the platform that its environment names."""
    command = ["--mode=sweep", "--config=digits", f"--workdir={tmp_path / 'x'}", "--launcher=print"]
    found = subprocess.run(
        [
            sys.executable,
            "main.py",
            *command,
            "--sweep=train.seed=0-1",
            f"--config.data.data_dir={data_dir}",
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 2


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_stopped_goes_on_and_ends(tmp_path, data_dir):
    """kill -9 of the sweep leaves its runs at work; the same command waits for them; SIGTERM stops all."""
    folder = tmp_path / "sweep"
    command = ["--mode=sweep", *TINY, f"--workdir={folder}", "--jobs=2", "--sweep=train.seed=0-3"]
    command += ["--config.train.total_images=96", f"--config.data.data_dir={data_dir}"]

    def wait(process, condition):
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

    first = start(*command)
    wait(first, lambda: sum(bool(state.holder(folder / f"seed={k}")) for k in range(4)) == 2)
    first.kill()
    first.communicate()
    at_work = [name for name in states(folder) if state.holder(folder / name)]
    assert len(at_work) == 2

    second = start(*command)
    wait(second, lambda: list(states(folder).values()).count("done") >= 1)
    second.send_signal(signal.SIGTERM)
    text = second.communicate(timeout=300)[0]
    assert second.returncode == 128 + signal.SIGTERM, text
    for name, found in states(folder).items():
        assert (found == "running") == bool(state.holder(folder / name)), text

    text = run(*command)
    assert set(states(folder).values()) == {"done"}, text
    assert [starts(folder)[name] for name in at_work] == [
        1,
        1,
    ]  # what was left at work was not disturbed
    assert (folder / "index.html").exists()
    assert (folder / "seed=0" / "index.html").exists()
