"""A state dict of improved-diffusion on the command line: adapted, exported, rejoined and measured."""

import json

import jax
import numpy as np
import pytest

from lora_diffusion_jax import cli, lora
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.interop import to_state_dict
from lora_diffusion_jax.paths import path_of
from tests.interop import openai
from tests.interop.test_names import network_variables
from tests.modes.running import TINY, run, train
from tests.modes.test_discrete_runs import PROCESS
from tests.small import config_flags

NETWORK = [
    *PROCESS,
    *config_flags(model__name="improved", model__channels=32, model__num_heads=2),
    *config_flags(lora__adapter="time_class"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The file of a conditional network with learned variances."""
    baseline = config_flags(lora__mode="baseline")
    config = cli.override(cli.load_config("digits")[0], [*TINY[1:], *NETWORK, *baseline])
    variables = jax.tree.map(lambda v: 0.1 * v, network_variables(config))
    weights = to_state_dict(variables, config)
    return openai.write(tmp_path_factory.mktemp("openai") / "net.pt", weights)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["with_lora", "only_lora"])
def test_adapters_train_alone_and_rejoin_their_state_dict(source, data_dir, tmp_path, mode):
    official, tuned, joined = (tmp_path / name for name in ("official", "tuned", "joined"))
    run("--mode=import", *TINY, *NETWORK, f"--source={source}", f"--workdir={official}")
    start = config_flags(init_from=source, train__freeze_base=True, lora__mode=mode)
    far = config_flags(train__learning_rate=0.1, train__ema_halflife_images=10)
    train(tuned, data_dir, 48, *NETWORK, *start, *far)
    base, adapters = lora.split(load_workdir(tuned, weights="raw").variables["params"])
    before = dict(jax.tree_util.tree_leaves_with_path(load_workdir(official).variables["params"]))
    for path, value in jax.tree_util.tree_leaves_with_path(base):
        np.testing.assert_array_equal(value, before[path])
    ups = [
        value
        for path, value in jax.tree_util.tree_leaves_with_path(adapters)
        if path_of(path).endswith("/up/kernel")
    ]
    assert len(ups) == 2 * 2 * 4  # adapters, layers and attention blocks
    assert all(map(np.any, ups))  # zeros at the start

    alone = tmp_path / "adapters.safetensors"
    run("--mode=export", f"--workdir={tuned}", f"--out={alone}", "--adapters_only")
    run("--mode=import", f"--source={alone}", f"--base={source}", f"--workdir={joined}")
    images, bits = {}, {}
    data = config_flags(data__name="digits", data__data_dir=data_dir)
    sampler = config_flags(sampler__name="ddpm", sampler__num_steps=5)
    for folder in (official, tuned, joined):
        out = tmp_path / "x.npz"
        run("--mode=sample", f"--workdir={folder}", "--seeds=0-3", f"--out={out}", *sampler)
        with np.load(out) as file:
            images[folder] = file["images"]
        for route in ("vlb", "ode"):
            command = ["--mode=likelihood", f"--workdir={folder}", "--num=3", f"--route={route}"]
            found = json.loads(run(*command, *data).splitlines()[-1])
            bits[folder, route] = found[f"bpd_{route}"]
            assert 0 < found["standard_error"] < found[f"bpd_{route}"] < 200
    np.testing.assert_array_equal(images[joined], images[tuned])
    assert np.any(images[official] != images[tuned])
    for route in ("vlb", "ode"):
        assert bits[joined, route] == bits[tuned, route] != bits[official, route]
