"""A run of a discrete process from the command line, and likelihoods of both kinds of network."""

import json
import signal
from time import monotonic, sleep

import numpy as np
import pytest

from benchmarks import survival
from lora_diffusion_jax.training.checkpoint import saved_steps
from tests.modes.running import run, start, train, train_command
from tests.small import config_flags

PROCESS = config_flags(
    precond__name="ddpm",
    precond__num_steps=20,
    augment__p=0.0,
    lora__adapter="time",
    train__ema_rampup_ratio=0.0,
    train__learning_rate=1e-3,
    train__rampup_images=0,
    sampler__name="ddpm",
    sampler__num_steps=5,
)


@pytest.fixture(scope="module")
def discrete(tmp_path_factory, data_dir):
    """A run of 6 steps of a network with 20 timesteps and TimeLoRA."""
    path = tmp_path_factory.mktemp("discrete") / "digits"
    train(path, data_dir, 96, *PROCESS)
    return path


def result(text):
    return json.loads(text.splitlines()[-1])


def test_the_loss_is_logged_by_quarter_of_the_timesteps(discrete, workdir):
    lines = [json.loads(line) for line in (discrete / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    assert [line["images"] for line in lines] == [32, 64, 96]
    assert lines[0]["train/learning_rate"] == pytest.approx(1e-3)  # no ramp-up
    for line in lines:
        for name in ("loss", "mse", "vb"):
            quarters = [line[f"train/{name}_q{i}"] for i in range(4)]
            assert np.isfinite(quarters).all()
            assert min(quarters) <= line[f"train/{name}"] <= max(quarters)
        assert line["train/mse"] + line["train/vb"] == pytest.approx(line["train/loss"], rel=1e-5)
    assert "train/loss_q" not in (workdir / "metrics.jsonl").read_text()
    table = (discrete / "parameters.txt").read_text()
    assert "(21, 3)" in table  # T follows the process


@pytest.mark.slow
def test_a_killed_run_of_a_discrete_process_ends_with_the_same_bits(data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    images, steps = 16 * 18, 18
    train(whole, data_dir, images, *PROCESS)
    process, deadline = start(*train_command(killed, data_dir, images, *PROCESS)), monotonic() + 600
    while not saved_steps(killed) and process.poll() is None and monotonic() < deadline:
        sleep(0.01)
    process.kill()
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert 0 < max(saved_steps(killed)) < steps
    assert "resuming from the checkpoint of step " in train(killed, data_dir, images, *PROCESS)
    assert survival.state_of(killed, steps) == survival.state_of(whole, steps)
    lines = survival.metrics_of(whole)
    assert survival.metrics_of(killed) == lines
    assert "train/vb_q3" in lines[0]


def test_a_discrete_run_is_sampled_in_steps_of_its_process_or_of_edm(discrete, tmp_path):
    sample = ["--mode=sample", f"--workdir={discrete}", "--seeds=0-3", "--class_id=1"]
    images = {}
    for name, settings, nfe in (
        ("ddpm", [], 5),  # of the run's config
        ("ddim", ["--config.sampler.num_steps=0", "--config.sampler.respacing=ddim10"], 10),
        ("edm", ["--config.sampler.num_steps=3"], 5),
    ):
        out = tmp_path / f"{name}{nfe}.npz"
        text = run(*sample, f"--config.sampler.name={name}", *settings, f"--out={out}")
        assert result(text)["nfe"] == nfe
        with np.load(out) as file:
            images[name, nfe] = file["images"]
    again = tmp_path / "again.npz"
    run(*sample[:2], "--seeds=2,0", "--class_id=1", f"--out={again}")
    with np.load(again) as file:
        difference = file["images"].astype(int) - images["ddpm", 5][[2, 0]]
        assert np.abs(difference).max() <= 1
    assert len({array.tobytes() for array in images.values()}) == len(images)


@pytest.mark.slow
def test_likelihoods_of_a_discrete_network_by_both_routes(discrete):
    command = ["--mode=likelihood", f"--workdir={discrete}", "--num=6"]
    bound = result(run(*command))
    assert {k: bound[k] for k in ("num", "of", "nfe", "weights", "step")} == {
        **{"num": 6, "of": 297, "nfe": 20},
        **{"weights": "ema", "step": 6},
    }
    # A network that has learned next to nothing: worse than the 8 bits of uniform gray levels.
    assert 2 < bound["bpd_vlb"] < 100
    assert 0 < bound["standard_error"] < bound["bpd_vlb"]
    # What is drawn depends on the image, not on the batch.
    small = result(run(*command, "--config.sampler.batch_size=4"))
    assert small["bpd_vlb"] == pytest.approx(bound["bpd_vlb"], rel=1e-4)
    assert "/nope does not exist" in run(*command, "--config.data.eval_path=/nope", status=2)
    flow = result(run(*command, "--route=ode"))
    assert flow["nfe"] == 2 * 18  # between the 19 levels below 80
    assert 2 < flow["bpd_ode"] < 100


@pytest.mark.slow
def test_likelihood_of_a_continuous_network(workdir):
    command = ["--mode=likelihood", f"--workdir={workdir}", "--num=2"]
    found = result(run(*command))
    assert found["nfe"] == 512
    assert 0 < found["bpd_ode"] < 20
    assert "precond.name=edm; use --route=ode" in run(*command, "--route=vlb", status=2)
    assert "there are 297 held-out images" in run(*command, "--num=298", status=2)
    ddpm = ["--mode=sample", f"--workdir={workdir}", "--config.sampler.name=ddpm", "--out=x.npz"]
    assert "use sampler.name=edm, or ddim" in run(*ddpm, status=2)
