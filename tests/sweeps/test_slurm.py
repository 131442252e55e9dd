"""Runs as jobs of submitit, whose local executor behaves like Slurm's."""

import os
import signal
import sys
import time

import pytest
from ml_collections import ConfigDict

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes import sweep
from lora_diffusion_jax.sweeps import local, plan, slurm, state
from tests.small import ROOT
from tests.sweeps.pretend import CONFIG


def test_settings_are_those_of_submitit_or_options_of_sbatch():
    found = slurm.parse_settings("partition=gpu; timeout_min=600;gpus_per_node=1;slurm_qos=x")
    assert found == {
        "slurm_partition": "gpu",
        "timeout_min": 600,
        "gpus_per_node": 1,
        "slurm_qos": "x",
    }
    assert slurm.parse_settings("") == {}
    for text, words in (
        ("partition", "is no setting"),
        ("a b=1", "no setting"),
        ("cluster=x", "'x'"),
    ):
        with pytest.raises(UserError, match=words):
            slurm.parse_settings(text)


def test_without_submitit_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'lora-diffusion-jax\[train,eval,slurm\]'"):
        slurm.submit(tmp_path, {}, {}, None)


def submit(folder, entries, **settings):
    settings = {"cluster": "local", "timeout_min": 5, **settings}
    return slurm.submit(folder, entries, settings, None)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def entry(folder, name, what):
    command = [sys.executable, "-m", "tests.sweeps.pretend", str(folder / name), "3", what]
    return state.Entry({}, command)


@pytest.fixture
def submitit(monkeypatch):
    monkeypatch.chdir(ROOT)
    return pytest.importorskip("submitit", reason="submitit is not installed")


def test_an_array_of_jobs_makes_the_runs(tmp_path, submitit):
    entries = {name: entry(tmp_path, name, "ends") for name in "abc"}
    entries["b"].state = "done"
    assert submit(tmp_path, entries) == ["a", "c"]
    assert [e.state for e in entries.values()] == ["submitted", "done", "submitted"]
    assert entries["a"].job.startswith("local:")
    wait_for(lambda: all(state.is_done(tmp_path / name, CONFIG) for name in "ac"))
    assert not (tmp_path / "b").exists()


def test_a_job_that_is_preempted_saves_and_goes_back_into_the_queue(tmp_path, submitit):
    """submitit's signal comes; the run stops as it would for SIGTERM, and the job goes on later."""
    executor = submitit.AutoExecutor(str(tmp_path / slurm.FOLDER), cluster="local")
    executor.update_parameters(timeout_min=5)
    waits = entry(tmp_path, "a", "waits")
    job = executor.submit(slurm.Job(waits.command, str(tmp_path), "a"))
    log = tmp_path / "a" / local.LOG
    wait_for(lambda: len(list((tmp_path / "a").glob("checkpoints/*"))) == 2)
    os.kill(int(log.read_text().split("parent ")[1].split()[0]), signal.SIGUSR2)  # as Slurm does
    wait_for(lambda: log.read_text().count("$ ") == 2)
    assert "saved and stopped" in log.read_text()
    (tmp_path / "a" / "go").touch()
    wait_for(lambda: state.is_done(tmp_path / "a", CONFIG))
    assert job.result() is None


def test_a_run_that_fails_is_a_job_that_fails(tmp_path, submitit):
    executor = submitit.AutoExecutor(str(tmp_path / slurm.FOLDER), cluster="local")
    fails = entry(tmp_path, "a", "fails")
    job = executor.submit(slurm.Job(fails.command, str(tmp_path), "a"))
    with pytest.raises(submitit.core.utils.FailedJobError, match="a mind of its own"):
        job.result()


def test_a_failed_job_is_reported_with_its_last_lines(tmp_path, submitit, capsys):
    """By the same command again, which submits it again; on the page and on standard output."""
    entries = {"a": entry(tmp_path, "a", "fails")}
    runs = [plan.Run("a", {}, (), ConfigDict(CONFIG))]
    commands = {"a": entries["a"].command}
    settings = {"cluster": "local", "timeout_min": 5}

    def again():
        sweep.update(tmp_path, entries, runs, commands)
        sweep.submit(tmp_path, entries, runs, settings, None)
        return capsys.readouterr().out

    assert "a: job" not in again()
    first = entries["a"].job.partition(":")[2]
    wait_for(lambda: (tmp_path / "a" / slurm.FAILED).exists())
    text = again()
    assert f"a: job {first} failed: exit status 2" in text
    assert "    error: the loss has a mind of its own" in text
    page = (tmp_path / "index.html").read_text()
    assert f"job {first} failed" in page
    assert "a mind of its own" in page
    assert entries["a"].state == "submitted"
    assert entries["a"].job.partition(":")[2] != first


def test_a_job_that_slurm_killed_shows_what_it_had_printed(tmp_path):
    assert slurm.failure(tmp_path, "a", "") == ""
    assert "sacct -j 7" in slurm.failure(tmp_path, "a", "slurm:7")
    (tmp_path / slurm.FOLDER).mkdir()
    (tmp_path / slurm.FOLDER / "7_0_log.err").write_text("srun: error: node down\n")
    assert slurm.failure(tmp_path, "a", "slurm:7").endswith("did\nsrun: error: node down")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / local.LOG).write_text("$ x\nold\n$ x\nstep 3\nslurmstepd: oom-kill\n")
    found = slurm.failure(tmp_path, "a", "slurm:7")
    assert found == "job 7 ended before the run did\nstep 3\nslurmstepd: oom-kill"


def test_a_setting_that_submitit_refuses_is_a_plain_error(tmp_path, submitit):
    entries = {"a": entry(tmp_path, "a", "ends")}
    with pytest.raises(UserError, match="submitit could not submit the jobs"):
        submit(tmp_path, entries, gpus_per_node="many")
    assert entries["a"].state == "waiting"
