"""Arrays of NumPy as data sets: latents, fields, and images of any number of channels."""

import pickle

import numpy as np
import pytest

from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.data.pipeline import Batches
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.data import complete
from lora_diffusion_jax.factory.networks import build_denoiser
from tests.small import small_config

RNG = np.random.default_rng(0)
LATENTS = RNG.normal(3, 5, (20, 8, 8, 4)).astype(np.float32)
BYTES = RNG.integers(0, 256, (20, 8, 8, 2), np.uint8)
LABELS = np.arange(20) % 3


def save(path, array, **more):
    if path.suffix == ".npz":
        np.savez(path, images=array, **more)
    else:
        np.save(path, array)
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_used_as_they_are(tmp_path, name, dtype):
    array = LATENTS.astype(dtype)
    source = open_source(path=save(tmp_path / name, array))
    assert (source.image_shape, source.dtype, source.num_classes) == ((8, 8, 4), np.float32, 0)
    batch = source.read([19, 3])
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["image"], array[[19, 3]].astype(np.float32))
    assert "8x8 with 4 channels, floats" in summarize(source)


@pytest.mark.parametrize(
    ("mean", "std"), [((3.0,), (5.0,)), ((1.0, 2.0, 3.0, 4.0), (2.0,)), ((), (2,))]
)
def test_floats_are_centred_and_scaled_if_asked(tmp_path, mean, std):
    source = open_source(path=save(tmp_path / "a.npy", LATENTS), mean=mean, std=std)
    expected = (LATENTS - np.array(mean or 0.0)) / np.array(std)
    np.testing.assert_allclose(source.read(range(20))["image"], expected, rtol=1e-5, atol=1e-5)
    moments = expected.mean(), expected.std()
    np.testing.assert_allclose(source.moments(), moments, rtol=1e-4, atol=1e-6)


def test_bytes_of_any_number_of_channels_are_images(tmp_path):
    source = open_source(path=save(tmp_path / "a.npy", BYTES))
    batch = source.read([5])["image"]
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, BYTES[[5]])
    np.testing.assert_allclose(source.moments()[0], BYTES.mean() / 127.5 - 1, rtol=1e-5)


def test_channels_first_is_declared_and_not_guessed(tmp_path):
    path = save(tmp_path / "a.npy", LATENTS.transpose(0, 3, 1, 2))
    with pytest.raises(UserError, match="set data.layout=NCHW"):
        open_source(path=path)
    source = open_source(path=path, layout="NCHW")
    np.testing.assert_array_equal(source.read([7])["image"], LATENTS[[7]])
    with pytest.raises(UserError, match="set data.layout=NHWC"):
        open_source(path=save(tmp_path / "b.npy", LATENTS), layout="NCHW")
    fields = save(tmp_path / "c.npy", LATENTS.reshape(20, 16, 4, 4))  # an honest 16x4
    assert open_source(path=fields, layout="NHWC").image_shape == (16, 4, 4)


def test_labels_lie_in_the_npz_or_beside_the_npy(tmp_path):
    both = save(tmp_path / "a.npz", LATENTS, labels=LABELS, other=1 - LABELS % 2)
    single = save(tmp_path / "b.npy", LATENTS)
    np.save(tmp_path / "b.labels.npy", LABELS)
    for source in (open_source(path=both), open_source(path=single)):
        np.testing.assert_array_equal(source.labels(), LABELS)
        assert source.read([4])["label"] == LABELS[4]
        assert source.num_classes == 3
    assert open_source(path=both, label_key="other").num_classes == 2
    samples = save(tmp_path / "c.npz", LATENTS, labels=np.full(20, -1))  # of an unconditional run
    assert open_source(path=samples).num_classes == 0


def test_a_large_file_stays_on_disk_and_batches_resume(tmp_path):
    source = open_source(path=save(tmp_path / "a.npy", LATENTS))
    assert isinstance(source._array, np.memmap)
    sent = pickle.dumps(source)
    assert len(sent) < LATENTS.nbytes / 4
    whole = Batches(source, 6, seed=1, memory_limit=10**9)
    assert whole.images.dtype == np.float32
    streamed = Batches(pickle.loads(sent), 6, seed=1, memory_limit=LATENTS.nbytes - 1)
    assert streamed.images is None
    batches = streamed.iterate(start_step=5)
    for step in (5, 6):
        np.testing.assert_array_equal(next(batches)["image"], whole[step]["image"])
    batches.close()


def test_the_fingerprint_is_of_content_and_scale(tmp_path):
    one = open_source(path=save(tmp_path / "a.npy", LATENTS))
    copy = open_source(path=save(tmp_path / "b.npz", LATENTS))
    scaled = open_source(path=save(tmp_path / "c.npy", LATENTS), std=(2.0,))
    changed = open_source(path=save(tmp_path / "d.npy", LATENTS + np.float32(1)))
    assert one.fingerprint() == copy.fingerprint()
    assert len({s.fingerprint() for s in (one, scaled, changed)}) == 3


def with_value(value):
    array = LATENTS.copy()
    array[11, 2, 3, 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "settings", "words"),
    [
        (with_value(np.nan), {}, "Example 11 of .* NaN or infinity"),
        (with_value(-np.inf), {}, "Example 11"),
        (with_value(0).astype(np.float64) * 1e300, {}, "Example 0 .* too large for float32"),
        (LATENTS.astype(np.int32), {}, "holds int32 .* convert to uint8"),
        (LATENTS > 0, {}, "holds bool .* float32"),
        (LATENTS + 1j, {}, "complex.* as channels"),
        (np.full((2, 4, 4, 1), "x"), {}, "holds <U1"),
        (np.array([[None]]), {}, "Python objects"),
        (LATENTS[..., 0], {}, "add an axis for the channel"),
        (LATENTS[:0], {}, "none of them 0"),
        (LATENTS, {"std": (0.0,)}, "data.std=.* positive"),
        (LATENTS, {"mean": (1.0, 2.0)}, "one for each of 4"),
        (LATENTS, {"mean": (float("nan"),)}, "finite"),
        (BYTES, {"std": (2.0,)}, "are for floats"),
        (LATENTS, {"layout": "HWCN"}, "data.layout is HWCN"),
        (LATENTS, {"image_key": "x"}, "of a .npz"),
        (LATENTS, {"class_folders": True}, "class_folders is for folders"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, array, settings, words):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=words):
        open_source(path=str(tmp_path / "a.npy"), **settings)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": LATENTS}, "no array 'images', only x"),
        ({"images": LATENTS, "labels": LABELS[:5]}, "one for each of 20"),
        ({"images": LATENTS, "labels": LABELS - 1}, "from -1 to 1"),
        ({"images": LATENTS, "labels": LABELS / 2}, "whole numbers"),
        ({"images": np.array([None])}, "objects"),
    ],
)
def test_mistakes_in_an_npz_are_one_sentence(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=words):
        open_source(path=str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"text"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_damaged_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="xpected an array"):
        open_source(path=str(tmp_path / name))
    (tmp_path / name).unlink()
    np.save(tmp_path / "a.npy", LATENTS)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be"):
        open_source(path=str(tmp_path / "a.npy"))


def test_settings_of_arrays_are_for_arrays(tmp_path):
    for settings in ({"layout": "NCHW"}, {"mean": (1.0,)}, {"std": (1.0,)}):
        with pytest.raises(UserError, match="are for arrays"):
            open_source(path=str(tmp_path), **settings)
    with pytest.raises(UserError, match="data.label_key names a column"):
        open_source(path=str(tmp_path), label_key="x")


@pytest.mark.parametrize(
    ("array", "changes", "words"),
    [
        (LATENTS, {"augment__p": 0.1}, "an array of floats: augmentation"),
        (BYTES, {"augment__p": 0.1}, "an array of 2 channels: augmentation"),
        (LATENTS, {"precond__name": "ddpm", "augment__p": 0}, "images of 8 bits"),
        (BYTES, {"data__floats": True}, "data.floats=True, but .* has False"),
    ],
)
def test_what_is_for_images_alone_is_refused(tmp_path, array, changes, words):
    config = small_config(data__channels=0, **changes)
    source = open_source(path=save(tmp_path / "a.npy", array))
    with pytest.raises(UserError, match=words):
        build_denoiser(complete(config, source))
