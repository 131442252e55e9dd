"""What --mode=info says of a run before it starts."""

import json
import re
import subprocess
import sys

import jax
import pytest

from lora_diffusion_jax.factory import networks, training
from lora_diffusion_jax.modes import estimate, measure
from tests.modes.running import TINY, run, train
from tests.small import ROOT, config_flags, fast_compile_env, small_config

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86_400.0}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.2)


def value_of(text):
    number, unit = text.split()
    return float(number.replace(",", "")) * UNITS[unit]


def rows(text):
    """Row -> (bytes or seconds, the words behind them)."""
    lines = text.partition("What this run takes")[2].splitlines()[1:]
    pattern = r"  ( *\S.*?)  +(?:about |at least )?([\d.,]+ \w+)(?:  (.*))?"
    found = [re.fullmatch(pattern, line) for line in lines]
    return {m[1].strip(): (value_of(m[2]), m[3] or "") for m in found}


def info(data_dir, *more, measured="auto"):
    flags = config_flags(data__data_dir=data_dir, train__total_images=96)
    return run("--mode=info", *TINY, *flags, f"--measure={measured}", *more)


def test_the_table_of_a_small_run_adds_up(data_dir):
    text = info(data_dir, "--config.eval.num_samples=20", "--config.eval.final_num_samples=30")
    found = rows(text)
    assert found["training"][0] == pytest.approx(6 * found["a step of 16 images"][0], rel=0.02)
    assert found["training"][1] == "6 steps, 96 images"
    nfe, seconds, images = re.search(
        r"(\d) evaluations of the network, (\S+ \S+) for (\d+) images", text
    ).groups()
    assert nfe == "5"  # Heun's method, 3 steps
    each = 5 * value_of(seconds) / int(images)
    assert found["sampling 50,000 images"][0] == pytest.approx(50_000 * each, rel=0.02)
    # one grid, and one evaluation at the end
    assert found["grids and evaluations"][0] == pytest.approx((80 + 30) * each, rel=0.02)
    parts = [found[name][0] for name in ("compiling the step", "training", "grids and evaluations")]
    assert found["the whole run"][0] == pytest.approx(sum(parts), rel=0.02)

    count = int(re.search(r"Total parameters: ([\d,]+)", text)[1].replace(",", ""))
    state = found["weights, moments, EMA"][0]
    assert state == pytest.approx(16 * count, rel=0.02)  # four float32 a parameter
    assert found["disk"][0] == pytest.approx(2 * 16 * count, rel=0.02)  # at 48 and 96 images
    data = found["data set and batch"][0]
    assert data == pytest.approx(1500 * (64 + 4), rel=0.02)  # on the device, with labels
    assert found["gradients, activations"][0] > 4 * count
    total = state + data + found["gradients, activations"][0]
    assert found["memory of each device"] == (
        pytest.approx(total, rel=0.02),
        found["memory of each device"][1],
    )
    assert "fits into" in found["memory of each device"][1]


def test_off_measures_nothing(data_dir):
    text = info(data_dir, measured="off")
    assert "Total parameters" in text
    assert "What this run takes" not in text


@pytest.mark.slow
def test_a_large_step_is_not_compiled_on_a_cpu_unless_asked_for(data_dir, monkeypatch):
    monkeypatch.setattr(estimate, "CPU_AUTO", 0.0)
    compiled = rows(info(data_dir, measured="step"))
    text = info(data_dir)
    traced = rows(text)
    assert "compiling the step" in compiled
    assert "compiling the step" not in traced
    assert traced["a step of 16 images"][1].startswith("derived: 4 evaluations an image")
    assert "--measure=step" in text
    name = "weights, moments, EMA"
    assert traced[name] == compiled[name]
    # What the backward pass keeps is the larger part of what a compiled step needs.
    name = "gradients, activations"
    assert compiled[name][0] / 3 < traced[name][0] < 3 * compiled[name][0]


@pytest.mark.slow
def test_a_step_too_large_to_try_is_cut(data_dir, monkeypatch):
    flops = networks.forward_flops(config := small_config(), networks.build_denoiser(config))
    monkeypatch.setattr(estimate, "CPU_STEP", 4 * 3 * flops)
    text = info(data_dir, measured="step")
    found = rows(text)
    cut = int(re.search(r"derived from a measured step of (\d+) images", text)[1])
    assert 1 <= cut < 16
    assert f"of a step of {cut} images" in found["memory of each device"][1]


def test_what_does_not_fit_is_not_run(data_dir, monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda mesh: 100_000)
    monkeypatch.setattr(measure, "_run", lambda *_: pytest.fail("it was run"))
    found = rows(info(data_dir))
    assert "DOES NOT FIT into the 100 kB there are" in found["memory of each device"][1]
    assert found["a step of 16 images"][1].startswith("derived")


def exhaust(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


def test_a_device_that_runs_out_of_memory_is_said_to(data_dir, monkeypatch):
    monkeypatch.setattr(measure.loop, "jit_step", exhaust)
    found = rows(info(data_dir))
    assert "DOES NOT FIT" in found["memory of each device"][1]
    assert "gradients, activations" not in found
    monkeypatch.setattr(measure, "seconds_of", exhaust)
    assert "An evaluation of 100 images does not fit" in info(data_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch", "least", "most"), [(8, 0.5, 0.75), (2, 0.1, 0.4)])
def test_accumulation_needs_less(microbatch, least, most):
    mesh = training.build_mesh(small_config())

    def work(**changes):
        config = small_config(train__batch_size=16, **changes)
        denoiser = networks.build_denoiser(config)
        return measure.trace_step(config, denoiser, mesh, 0).memory.work

    assert least <= work(train__microbatch=microbatch) / work() <= most


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("mesh.fsdp=3", "Choose sizes whose product is 1"),
        ("train.microbatch=5", "must divide batch_size 16"),
    ],
)
def test_a_config_for_other_devices_is_described_without(data_dir, change, says):
    text = info(data_dir, f"--config.{change}")
    assert "Total parameters" in text
    assert says in text.partition("What this run takes here is not known: ")[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1.5, "1.5 s"),
        (119.4, "119 s"),
        (150, "2.5 min"),
        (7199, "120 min"),
        (9000, "2.5 h"),
        (86_400 * 1600.4, "1,600 days"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert estimate.duration(seconds) == text


@pytest.mark.slow
def test_the_estimate_holds_for_a_real_run(data_dir, tmp_path, monkeypatch):
    """Within a factor of two, in one of three trials: other programs may take the machine between the two."""
    monkeypatch.setattr(measure, "SECONDS", 3.0)
    found = []
    for trial in range(3):
        expected = rows(info(data_dir))["a step of 16 images"][0]
        path = tmp_path / str(trial)
        few = config_flags(train__log_every=800, train__checkpoint_every=1600)
        train(path, data_dir, 1600, *few)
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        rates = [line["perf/images_per_sec"] for line in lines if "perf/images_per_sec" in line]
        found.append(expected / (16 / rates[-1]))
        if 0.5 < found[-1] < 2:
            return
    pytest.fail(f"the estimate is {found} times the time of a step")


@pytest.mark.slow
def test_several_devices_share_the_state(data_dir):
    """Large arrays are split over fsdp, and each device's memory is named."""
    # wide enough that its kernels are split: fewer than 2^14 entries stay whole
    wide = [*TINY, "--config.model.channels=64", f"--config.data.data_dir={data_dir}"]
    env = fast_compile_env("--xla_force_host_platform_device_count=4")
    state = {}
    for fsdp in (1, 4):
        command = [sys.executable, "main.py", "--mode=info", *wide, f"--config.mesh.fsdp={fsdp}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "What this run takes on 4 x CPU" in done.stdout
        state[fsdp] = rows(done.stdout)["weights, moments, EMA"][0]
    assert state[1] / 4 < state[4] < 0.6 * state[1]
