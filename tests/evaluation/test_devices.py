"""Numbers do not depend on how many devices compute them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.features import extract, tree_hash
from lora_diffusion_jax.evaluation.metrics import frechet_distance
from lora_diffusion_jax.evaluation.statistics import Moments

rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (100, 16, 16, 3), np.uint8) // (1 + k) for k in range(2)]
settings = classifier.Settings(widths=(8, 16), feature_dim=16)
network = classifier.ConvClassifier(4, settings)
params = network.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
recipe = {"name": "rotation", "classes": 4, "image_shape": [16, 16, 3], "settings": vars(settings)}
detector = classifier.rebuild(recipe, {"params": params})
for count in (1, 4):
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(-1, max(1, count // 2)), ("data", "fsdp"))
    rows = [np.concatenate([f for f, _ in extract(detector, [x], mesh=mesh)]) for x in images]
    sums = [Moments(16) for _ in rows]
    [s.add(r) for s, r in zip(sums, rows)]
    value = frechet_distance(*(m for s in sums for m in s.result()))
    print(json.dumps({"devices": count, "hash": tree_hash(rows), "value": value}))
"""


@pytest.fixture(scope="module")
def results():
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_features_are_the_same_bits_on_1_and_4_devices(results):
    assert [r["devices"] for r in results] == [1, 4]
    assert len({r["hash"] for r in results}) == 1


def test_distance_is_the_same_on_1_and_4_devices(results):
    values = [r["value"] for r in results]
    assert values[0] > 0
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
