"""Sampling: where a resumed run begins, and weights and images that are not finite."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import generate, outputs
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import check_finite, load_workdir
from lora_diffusion_jax.modes import sample
from lora_diffusion_jax.training import checkpoint
from tests.modes.running import run
from tests.small import small_config


class Generator:
    """Images that show their seed; records the seeds of every call."""

    call_size, num_classes = 4, 0

    def __init__(self):
        self.calls = []

    def choose_labels(self, seeds, classes):
        return np.full(len(seeds), -1, np.int32)

    def batches(self, variables, seeds, labels, **_):
        for start in range(0, len(seeds), self.call_size):
            part = slice(start, start + self.call_size)
            self.calls.append(seeds[part].tolist())
            images = np.tile(seeds[part][:, None, None, None], (1, 2, 2, 1)).astype(np.uint8)
            yield generate.Batch(images, seeds[part], labels[part], seeds[part] != 99)


def test_a_resumed_run_begins_its_batches_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    """An image's place in its batch can change a byte of it."""
    generator = Generator()
    monkeypatch.setattr(sample, "open_generator", lambda *_: generator)
    network = types.SimpleNamespace(config=small_config(), sampled_variables={})
    seeds = np.arange(10, 21)
    identity = json.dumps({"of": sample.tree_hash(({}, seeds, np.full(11, -1, np.int32)))})
    stopped = outputs.Output(tmp_path, seeds, np.full(11, -1), identity)
    stopped.write(np.zeros((6, 2, 2, 1), np.uint8))
    stopped.lock.release()
    (tmp_path / "000011.png").unlink()
    sample.sample(network, seeds, None, tmp_path, {})
    assert generator.calls == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20]]
    shown = [int(outputs.read_png(tmp_path / f"{seed:06d}.png")[0, 0, 0]) for seed in seeds]
    assert shown == [0, 11, 0, 0, 0, 0, 16, 17, 18, 19, 20]  # 0: what was there stays


def test_an_image_that_is_not_finite_is_an_error_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "open_generator", lambda *_: Generator())
    network = types.SimpleNamespace(config=small_config(), sampled_variables={})
    with pytest.raises(UserError, match=r"1 of 3 images hold NaN or infinity \(seeds 99\)"):
        sample.sample(network, [98, 99, 100], None, tmp_path, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value):
    variables = {"params": {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.ones(4)}}
    check_finite(variables, "x.pkl")
    variables["params"]["a"]["kernel"][1, 2] = value
    with pytest.raises(UserError, match=r"x.pkl: params/a/kernel holds NaN .* \(1 of 6 values\)"):
        check_finite(variables, "x.pkl")


def test_a_run_with_damaged_weights_is_refused_by_every_reader(workdir, tmp_path):
    """Sampling, export, init_from: the tensor is named."""
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    _, weights = checkpoint.open_for_reading(workdir)
    ema = jax.tree.map(np.array, weights.ema)
    ema["model"]["enc"]["8x8_conv"]["kernel"][0, 0] = np.nan
    checkpoint.save_weights(tmp_path, weights.replace(ema=ema))
    with pytest.raises(UserError, match="params/model/enc/8x8_conv/kernel holds NaN"):
        load_workdir(tmp_path)
    assert load_workdir(tmp_path, weights="raw")
    for arguments in (
        ["--mode=sample", f"--out={tmp_path / 'x'}"],
        ["--mode=export", f"--out={tmp_path / 'y.safetensors'}"],
    ):
        assert "holds NaN" in run(*arguments, f"--workdir={tmp_path}", status=2)
        assert not (tmp_path / "x").exists()


def test_images_that_are_not_finite_are_counted():
    """uint8 shows NaN as black and infinity as white."""

    def sampler(denoise, latents, *, key):
        bad = jnp.arange(latents.shape[0])[:, None, None, None] == 1
        return jnp.where(bad, jnp.nan, latents)

    generator = generate.Generator(
        denoiser=types.SimpleNamespace(apply=None, precond=None),
        sampler=sampler,
        image_shape=(2, 2, 1),
        num_classes=0,
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)),
        batch_size=3,
    )
    (batch,) = generator.batches({}, [5, 6, 7])
    assert batch.not_finite() == [6]


@pytest.mark.parametrize(
    "out", ["run", "run/checkpoints", "run/checkpoints/5/new", "run/checkpoints/x.npz", "link"]
)
def test_a_run_and_its_checkpoints_are_no_place_for_samples(tmp_path, out):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=f"--out=.*{out} is a run or lies among its checkpoints"):
        sample.check_out(tmp_path / out, np.arange(2), 0)
    sample.check_out(tmp_path / "run" / "samples" / "new", np.arange(2), 0)


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_a_folder_with_the_name_of_a_file_is_noticed_before_sampling(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, but .{name[2:]} names a file"):
        sample.check_out(tmp_path / name, np.arange(2), 0)
