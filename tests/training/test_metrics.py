import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.training.metrics import (
    HybridMetrics,
    TrainMetrics,
    check_names,
    to_scalars,
)


def measure(loss, sigma, good=True, **values):
    loss = np.asarray(loss, np.float32)
    scalars = {"grad_norm": 1.0, "lora_grad_norm": np.nan, "param_norm": 1.0, "update_norm": 1.0}
    scalars |= {"learning_rate": 0.1} | values
    return TrainMetrics.single_from_model_output(
        mask=jnp.array([good]),
        loss=jnp.array([loss.mean()]),
        image_losses={"loss": jnp.array(loss)},
        sigma=jnp.array(sigma, jnp.float32),
        **{name: jnp.float32(v)[None] for name, v in scalars.items()},
    )


def test_loss_per_noise_level_is_a_mean_over_images_not_over_steps():
    sigma = np.exp([-9.0, -4.5, -3.5, 0.5, 0.7, 12.0])
    first = measure([1, 3, 5, 7, 8, 9], sigma)
    second = measure([10, 20], np.exp([0.1, -0.5]))
    scalars = to_scalars(jax.device_get(first.merge(second)))
    bins = {k: v for k, v in scalars.items() if k.startswith("train/loss_sigma")}
    expected = {0: 2, 1: 5, 4: 20, 5: (7 + 8 + 10) / 3, 9: 9}
    assert bins == pytest.approx({f"train/loss_sigma_{i}": v for i, v in expected.items()})
    assert scalars["train/loss"] == pytest.approx((5.5 + 15) / 2)


def test_terms_per_quartile_are_means_over_images_and_skip_empty_ones():
    """Two steps, whose images fall into different quartiles; none into the last one."""

    def step(quartile, mse, vb, good=True):
        losses = {"mse": np.float32(mse), "vb": np.float32(vb)}
        losses["loss"] = losses["mse"] + losses["vb"]
        others = ("grad_norm", "lora_grad_norm", "param_norm", "update_norm", "learning_rate")
        return HybridMetrics.single_from_model_output(
            mask=jnp.array([good]),
            image_losses=losses,
            sigma=jnp.ones(len(mse)),
            quartile=jnp.array(quartile),
            **{name: jnp.ones(1) for name in others},
            **{name: jnp.array([value.mean()]) for name, value in losses.items()},
        )

    steps = [
        step([0, 0, 1], [1, 2, 6], [10, 20, 30]),
        step([0, 2, 2], [6, 1, 3], [30, 40, 60]),
        step([0, 1, 3], [np.nan, 0, 0], [0, 0, 0], good=False),
    ]
    scalars = to_scalars(jax.device_get(steps[0].merge(steps[1]).merge(steps[2])))
    found = {k.removeprefix("train/"): v for k, v in scalars.items() if "sigma" not in k}
    expected = {
        **{"mse": 19 / 6, "mse_q0": 3, "mse_q1": 6, "mse_q2": 2},
        **{"vb": 190 / 6, "vb_q0": 20, "vb_q1": 30, "vb_q2": 50},
        **{"loss": 209 / 6, "loss_q0": 23, "loss_q1": 36, "loss_q2": 52},
    }
    assert {k: v for k, v in found.items() if k.split("_")[0] in ("mse", "vb", "loss")} == (
        pytest.approx(expected)
    )
    check_names(scalars)


def test_means_and_last_values_skip_bad_steps():
    steps = [
        measure([1.0], [1.0], grad_norm=2.0, learning_rate=0.1),
        measure([np.nan], [1.0], good=False, grad_norm=np.nan, learning_rate=0.2),
        measure([3.0], [1.0], grad_norm=4.0, learning_rate=0.3),
    ]
    total = TrainMetrics.empty()
    for step in steps:
        total = total.merge(step)
    scalars = to_scalars(jax.device_get(total))
    assert scalars["train/loss"] == 2
    assert scalars["train/grad_norm"] == 3
    assert scalars["train/learning_rate"] == pytest.approx(0.3)
    assert "train/lora_grad_norm" not in scalars  # a net without adapters
    assert to_scalars(jax.device_get(TrainMetrics.empty())) == {}


def test_names_outside_the_vocabulary_are_refused():
    check_names(["train/loss", "train/loss_sigma_9", "perf/eta_sec", "eval/fd_classifier_1k"])
    with pytest.raises(ValueError, match="train/los"):
        check_names(["train/los"])
