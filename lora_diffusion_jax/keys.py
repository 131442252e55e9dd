"""The purposes of all random keys, and the one way to derive a key.

The key of a purpose is fold_in(key(seed), purpose). INIT, LATENT and CLASS use it as it is; TRAIN, CHURN,
CLASSIFIER, LIKELIHOOD and ANALYSIS fold in one more number, which counts steps or images. Images in
sampling have their own seeds, so image k is the same in any batch. A purpose never changes its value:
that would change every run that resumes. The order of the training batches has no key here:
`data.pipeline.epoch_order`.
"""

import jax

INIT = 0  # fresh weights; seed: train.seed
TRAIN = 1  # number: the step; its sigma, augmentation, noise and dropout are split from it
LATENT = 2  # unit normal noise that sampling starts from; seed: the image's
CLASS = 3  # class of a sample for which none was requested; seed: the image's
CHURN = 4  # noise added by stochastic samplers; seed: the image's, number: the step
CLASSIFIER = 5  # the feature network; seed: its settings', number: 0 its weights, k its step k - 1
LIKELIHOOD = 6  # noise of the bound, dequantisation and trace; seed: 0, number: the image's
ANALYSIS = 7  # noise of the losses that are compared; seed: 0, number: the image's


def purpose_key(seed: int | jax.Array, purpose: int) -> jax.Array:
    """The key of one purpose, into which the purposes with a number fold that."""
    return jax.random.fold_in(jax.random.key(seed), purpose)
