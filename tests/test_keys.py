"""Keys of different purposes, seeds and numbers never coincide."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax import keys
from tests.small import fast_jit

PURPOSES = [value for name, value in vars(keys).items() if name.isupper()]


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_purposes_keep_their_numbers():
    """A run that resumes, and an image made again, need the numbers of before."""
    names = ("INIT", "TRAIN", "LATENT", "CLASS", "CHURN", "CLASSIFIER", "LIKELIHOOD", "ANALYSIS")
    assert [getattr(keys, name) for name in names] == PURPOSES == list(range(8))


def test_no_two_purposes_or_seeds_share_a_key():
    """Among them training with seed 2 and the images of seeds 0 and 1."""
    purposes, seeds, numbers = (
        jnp.asarray(v, jnp.uint32) for v in (PURPOSES, range(300), range(8))
    )

    @fast_jit
    def all_keys():
        def numbered(key):
            return jnp.append(jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers), key)

        by_purpose = jax.vmap(keys.purpose_key, (None, 0))
        return jax.vmap(lambda s: jax.vmap(numbered)(by_purpose(s, purposes)))(seeds)

    rows = data(all_keys()).reshape(-1, 2)
    assert len(rows) == len(PURPOSES) * 300 * 9
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_traced_and_python_seeds_agree():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    traced = fast_jit(jax.vmap(lambda s: keys.purpose_key(s, keys.LATENT)))
    both = zip(seeds, traced(np.asarray(seeds, np.uint32)), strict=True)
    for seed, key in both:
        np.testing.assert_array_equal(data(keys.purpose_key(seed, keys.LATENT)), data(key))
    for a, b in itertools.combinations(seeds, 2):
        assert (data(keys.purpose_key(a, 0)) != data(keys.purpose_key(b, 0))).any()
