import numpy as np
import pytest

from lora_diffusion_jax.evaluation import neighbours
from lora_diffusion_jax.evaluation.neighbours import manifold_metrics, memorisation


def direct(real, fake, near=3, dense=5):
    """The definitions, written with full distance matrices and loops."""

    def d(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def radius(x, k):
        return np.sort(d(x, x), axis=1)[:, k]

    d_rf = d(real, fake)
    r3, f3, r5 = radius(real, near), radius(fake, near), radius(real, dense)
    return {
        "precision": np.mean([any(d_rf[:, j] <= r3) for j in range(len(fake))]),
        "recall": np.mean([any(d_rf[i] <= f3) for i in range(len(real))]),
        "density": np.mean([sum(d_rf[:, j] < r5) for j in range(len(fake))]) / dense,
        "coverage": np.mean([d_rf[i].min() < r5[i] for i in range(len(real))]),
    }


@pytest.mark.parametrize("block", [7, 1000])
def test_equals_the_definitions(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    rng = np.random.default_rng(0)
    real = rng.normal(size=(150, 6)).astype(np.float32) + 30
    fake = (rng.normal(size=(90, 6)) * 0.8 + 0.4).astype(np.float32) + 30
    expected = direct(real.astype(np.float64), fake.astype(np.float64))
    assert 0 < expected["recall"] < 1
    assert manifold_metrics(real, fake) == pytest.approx(expected, rel=1e-12)


def test_extremes():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(200, 4))
    far = real + 100
    assert manifold_metrics(real, far) == dict.fromkeys(
        ("precision", "recall", "density", "coverage"), 0.0
    )
    assert manifold_metrics(real, real)["precision"] == 1.0
    one_mode = np.repeat(real[:1], 50, axis=0) + 1e-3 * rng.normal(size=(50, 4))
    dropped = manifold_metrics(real, one_mode)
    assert dropped["precision"] == 1.0
    assert dropped["recall"] < 0.05


def test_memorisation_finds_copies():
    rng = np.random.default_rng(2)
    train = rng.normal(size=(300, 8))
    fresh = rng.normal(size=(100, 8))
    copies = train[:25] + 1e-4 * rng.normal(size=(25, 8))
    assert memorisation(fresh, train)["memorised"] <= 0.02
    found = memorisation(np.concatenate([fresh[:75], copies]), train)
    assert 0.25 <= found["memorised"] <= 0.27
    d = np.linalg.norm(train[:, None] - train[None], axis=-1) + 1e9 * np.eye(300)
    assert found["nearest_distance_real"] == pytest.approx(np.median(d.min(1)), rel=1e-10)
    nearest = np.linalg.norm(fresh[:, None] - train[None], axis=-1).min(1)
    assert memorisation(fresh, train)["nearest_distance"] == pytest.approx(
        np.median(nearest), rel=1e-10
    )
