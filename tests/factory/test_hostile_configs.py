"""An untrusted config.json of a run: a network or one sentence."""

import copy
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.pretrained import config_from_dict
from lora_diffusion_jax.training.workdir import read_config
from tests.small import small_config
from tests.test_untrusted import mutate

CONFIG = small_config().to_dict()
VALUES = [None, True, -1, 10**17, 1.5, "", "x", [], ["a"], [[1]], {}, {"a": 1}]


def damaged(count):
    """Copies with single fields or groups replaced, and with bytes overwritten."""
    rng = np.random.default_rng(0)
    paths = list(flatten_dict(CONFIG, keep_empty_nodes=True))
    for i in range(count):
        if i % 2:
            yield mutate(json.dumps(CONFIG).encode(), rng)
            continue
        path = paths[rng.integers(len(paths))]
        config = copy.deepcopy(CONFIG)
        group = config
        for name in path[: -1 if len(path) > 1 and rng.integers(4) else 0]:
            group = group[name]
        group[path[-1] if group is not config else path[0]] = VALUES[rng.integers(len(VALUES))]
        yield json.dumps(config).encode()


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_configs_never_raise_anything_but_a_user_error(tmp_path, count):
    refused = 0
    for data in damaged(count):
        (tmp_path / "config.json").write_bytes(data)
        try:
            build_denoiser(config_from_dict(read_config(tmp_path)))
        except UserError:
            refused += 1
    assert count / 2 < refused < count
