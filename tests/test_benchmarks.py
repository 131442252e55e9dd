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


def test_sizes():
    counts = {size: gpu.parameters(cpu.config_of(size)) for size in cpu.BATCH}
    assert counts == {"digits": 1_045_261, "small": 1_046_703, "full": 57_746_907}
