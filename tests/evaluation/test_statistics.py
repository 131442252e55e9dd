import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.references import Reference, load_reference, save_reference
from lora_diffusion_jax.evaluation.statistics import Moments


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(1733, 12)) @ rng.normal(size=(12, 12)) + 5).astype(np.float32)


def moments_of(batches, dim):
    moments = Moments(dim)
    for batch in batches:
        moments.add(batch)
    return moments


def batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_moments_equal_numpy(rows):
    mu, sigma = moments_of(batches(rows, 100), 12).result()
    # float64 sums of 1733 terms in another order
    np.testing.assert_allclose(mu, rows.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 500, 1733])
def test_moments_do_not_depend_on_the_batch_size(rows, size):
    expected = moments_of(batches(rows, 64), 12).result()
    for got, want in zip(moments_of(batches(rows, size), 12).result(), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_large_mean_loses_no_digits(rows):
    shifted = rows.astype(np.float64) + 1e6
    sigma = moments_of(batches(shifted, 100), 12).result()[1]
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False, dtype=np.float64), rtol=1e-4)


def test_going_on_from_a_saved_state_is_exact(rows):
    first = moments_of(batches(rows[:801], 50), 12)
    second = Moments.from_state(first.state())
    second.add(rows[801:])
    for got, want in zip(second.result(), moments_of([rows], 12).result(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_bad_rows_are_named(rows):
    moments = moments_of([rows[:10]], 12)
    broken = rows[10:20].copy()
    broken[3, 5] = np.nan
    with pytest.raises(UserError, match="image 13 are not finite"):
        moments.add(broken)
    with pytest.raises(UserError, match="at least 2"):
        moments_of([rows[:1]], 12).result()


def test_reference_files_are_edm_readable_and_round_trip(rows, tmp_path):
    mu, sigma = moments_of([rows], 12).result()
    path = tmp_path / "new" / "ref.npz"
    save_reference(path, Reference(mu, sigma, {"n": 1733}))
    with np.load(path) as file:  # what EDM's fid.py does
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_array_equal(file["mu"], mu)
    loaded = load_reference(path)
    np.testing.assert_array_equal(loaded.sigma, sigma)
    assert loaded.meta == {"n": 1733}
    assert [p.name for p in path.parent.iterdir()] == ["ref.npz"]


def test_broken_reference_files_are_plain_errors(tmp_path):
    with pytest.raises(UserError, match="no reference file"):
        load_reference(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(UserError, match="is not a whole npz file"):
        load_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="--images"):
        load_reference(tmp_path / "images.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match="expected"):
        load_reference(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match="NaN"):
        load_reference(tmp_path / "nan.npz")
