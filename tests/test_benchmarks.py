"""The benchmarks beside PyTorch run on this side, on a tiny network."""

import json

import pytest

from benchmarks import cpu, gpu
from tests.small import small_config


def tiny():
    config = small_config(class_conditional=True, data__num_classes=10)
    config.train.batch_size = config.sampler.batch_size = 2
    config.sampler.num_steps = 2
    return config


def tiny_at(precision, batch):
    config = tiny()
    config.dtype = precision if precision == "bfloat16" else "float32"
    config.train.batch_size = config.sampler.batch_size = batch
    return config


@pytest.mark.slow
def test_calls_that_are_timed():
    """They sample and train: images of the right shape, and a loss."""
    calls, compiling = gpu.ours(tiny(), "float32")
    assert calls["sampling"]().shape == (2, 8, 8, 1)
    for _ in range(2):  # the step takes over its state
        assert calls["training"]().compute()["loss"] > 0
    took = gpu.compare(calls, rounds=1)
    assert set(took) == set(compiling) == {"sampling", "training"}
    assert min(took.values()) > 0


@pytest.mark.slow
def test_lines_of_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "config_of", lambda size: tiny())
    monkeypatch.setattr(cpu.jax.config, "update", lambda name, value: None)  # this process goes on
    monkeypatch.setattr("sys.argv", ["cpu", "--sizes=digits", "--rounds=1"])
    cpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["what"], x["who"]) for x in lines] == [("sampling", "ours"), ("training", "ours")]
    assert all(x["seconds"] > 0 and x["cores"] >= 1 for x in lines)


@pytest.mark.slow
def test_lines_of_the_gpu(monkeypatch, capsys):
    """bfloat16 departs from float32, which departs from itself by nothing and has no line."""
    monkeypatch.setattr(gpu, "config_of", tiny_at)
    given = [
        "gpu",
        "--what=accuracy,run",
        "--precisions=float32,bfloat16",
        "--images=3",
        "--batch=2",
    ]
    monkeypatch.setattr("sys.argv", given)
    gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["what"], x["precision"]) for x in lines] == [
        ("accuracy", "bfloat16"),
        ("run", "float32"),
        ("run", "bfloat16"),
    ]
    assert 0 < lines[0]["difference"] < 0.1
    assert all(x["seconds"] > 0 for x in lines[1:])


@pytest.mark.parametrize(
    ("program", "option"),
    [
        (gpu, "--what=trainig"),
        (gpu, "--precisions=fp32"),
        (cpu, "--sizes=digits,"),
        (cpu, "--what="),
    ],
)
def test_misspelt_names(program, option, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", option])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert "expected" in said
    assert option.partition("=")[0] in said


def test_sizes():
    counts = {size: gpu.parameters(cpu.config_of(size)) for size in cpu.BATCH}
    assert counts == {"digits": 1_045_261, "small": 1_046_703, "full": 57_746_907}
