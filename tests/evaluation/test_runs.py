import numpy as np

from lora_diffusion_jax.evaluation.runs import Network
from lora_diffusion_jax.generate import Batch


class Generator:
    """Images of a constant, their seed."""

    call_size = 8

    def __init__(self):
        self.begun = []

    def batches(self, variables, seeds):
        for start in range(0, len(seeds), self.call_size):
            part = np.asarray(seeds[start : start + self.call_size])
            self.begun.append(int(part[0]))
            yield Batch(part[:, None, None, None].astype(np.uint8), part, part)


def test_a_resumed_evaluation_samples_the_batches_of_an_undisturbed_one():
    network = Network(Generator(), {}, {})
    for skip, begun in ((0, [0, 8, 16]), (8, [8, 16]), (13, [8, 16]), (19, [16])):
        network.generator.begun.clear()
        images = np.concatenate(list(network.images(range(20), skip)))
        assert images.ravel().tolist() == list(range(skip, 20))
        assert network.generator.begun == begun
