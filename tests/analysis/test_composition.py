"""Composition weights over noise levels and classes, against tables, algebra and single calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.analysis import composition
from lora_diffusion_jax.diffusion.precond import DDPM, EDM, IDDPM, VE, VP
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables
from tests.small import fast_jit, random_variables, small_config

X = jnp.zeros((1, 8, 8, 1))


def network(**changes):
    config = small_config(class_conditional=True, data__num_classes=4, **changes)
    return config, build_denoiser(config)


def test_levels_of_edm_are_a_geometric_grid_of_its_sampler_range():
    levels = composition.noise_levels(EDM(), 9)
    np.testing.assert_allclose(levels, np.geomspace(0.002, 80, 9), rtol=1e-5)  # float32 logarithms


@pytest.mark.parametrize("precond", [VP(), VE(), IDDPM(num_steps=50), DDPM(num_steps=50)])
def test_levels_are_known_to_the_network_and_even_in_its_time(precond):
    levels = composition.noise_levels(precond, 8)
    np.testing.assert_allclose(levels, precond.round_sigma(levels), rtol=1e-6)
    assert levels[0] == pytest.approx(precond.sigma_min, rel=1e-5)
    assert levels[-1] == pytest.approx(precond.sigma_max, rel=1e-5)
    time = precond.time(precond.coefficients(jnp.asarray(levels, jnp.float32)).noise)
    # A discrete process has a step of 1/50, half of which rounding may move a time.
    np.testing.assert_allclose(np.diff(time), np.ptp(time) / 7, atol=0.02)


def test_a_process_of_few_steps_has_no_more_levels():
    process = DDPM(num_steps=20)
    np.testing.assert_array_equal(composition.noise_levels(process, 64), process.process.sigmas)


def test_a_fresh_time_table_is_linear_between_its_anchors():
    settings = {"precond__name": "ddpm", "precond__num_steps": 20, "lora__adapter": "time_class"}
    config, denoiser = network(**settings)
    variables = fast_jit(lambda key: init_variables(config, denoiser, key))(jax.random.key(0))
    sigmas = denoiser.precond.process.sigmas
    found = composition.composition_table(denoiser, variables, sigmas, jnp.eye(4))
    tables = composition.by_adapter(found)
    assert set(tables) == {"time", "class"}
    assert list(tables["time"]) == lora.list_sites(variables["params"])
    linear = [np.interp(np.arange(20), [0, 10, 20], row) for row in np.eye(3)]
    for table in tables["time"].values():
        for k in range(4):
            np.testing.assert_allclose(table[:, k], np.transpose(linear), atol=1e-6)
    for table in tables["class"].values():
        np.testing.assert_array_equal(table, np.broadcast_to(np.eye(4), (20, 4, 4)))


def test_a_table_holds_what_single_calls_give():
    _, denoiser = network()
    variables = random_variables(denoiser, X, jnp.ones(1), jnp.eye(4)[:1])
    sigmas = np.array([0.1, 2.0, 30.0])
    tables = composition.composition_table(denoiser, variables, sigmas, jnp.eye(4)[:2])
    single = fast_jit(
        lambda sigma, label: lora.composition_weights(denoiser, variables, X + 1, sigma, label)
    )
    for n, sigma in enumerate(sigmas):
        for k in range(2):
            expected = single(jnp.float32(sigma), jnp.eye(4)[k : k + 1])
            assert expected.keys() == tables.keys()
            for site, omega in expected.items():
                np.testing.assert_allclose(tables[site][n, k], omega[0], rtol=1e-4, atol=1e-5)


def test_similarity_is_the_cosine_of_the_angle():
    angles = np.array([0.0, 0.3, 2.0])
    omega = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [5.0], [0.1]])
    expected = np.cos(angles[:, None] - angles)
    found = composition.cosine_similarity(np.stack([omega, omega[::-1]]))
    np.testing.assert_allclose(found, [expected, expected[::-1, ::-1]], atol=1e-12)
    zero = composition.cosine_similarity(np.array([[0.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_array_equal(zero, [[0, 0], [0, 1]])


def test_components_of_a_plane_keep_its_distances():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(7, 2)) * [3.0, 1.0]
    basis = np.linalg.qr(rng.normal(size=(5, 2)))[0]
    scores, shares = composition.principal_components(plane @ basis.T + rng.normal(size=5))

    def distances(points):
        return np.linalg.norm(points[:, None] - points, axis=-1)

    np.testing.assert_allclose(distances(scores), distances(plane), atol=1e-12)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] > shares[1] > 0
    assert (scores[-1] >= 0).all()


@pytest.mark.parametrize("omega", [np.arange(4.0)[:, None], np.outer(np.arange(4.0), [0, 1, 0])])
def test_components_of_a_line_are_one(omega):
    scores, shares = composition.principal_components(omega)
    np.testing.assert_allclose(scores, [[-1.5, 0], [-0.5, 0], [0.5, 0], [1.5, 0]], atol=1e-12)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-12)


def test_weights_that_never_change_have_components_without_a_share():
    scores, shares = composition.principal_components(np.ones((4, 3)))
    np.testing.assert_array_equal(scores, np.zeros((4, 2)))
    np.testing.assert_array_equal(shares, [0, 0])
