"""Shape aliases and the protocols of the seams between packages."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Images = Float[Array, "B H W C"]  # in [-1, 1]
ImagesU8 = UInt8[Array, "B H W C"]
Labels = Float[Array, "B num_classes"]  # one-hot or mixtures
LabelIds = Int[Array, " B"]
Sigma = Float[Array, ""] | Float[Array, " B"]  # noise level, standard deviation
AugmentLabels = Float[Array, "B augment_dim"]
Key = jax.Array  # typed PRNG key
PyTree = Any
Variables = dict[str, PyTree]  # {'params': ..., 'buffers': ...}


class Denoise(Protocol):
    """The seam: everything above sees a network only as D(x; sigma).

    Args of the call: x [B, H, W, C] float32, the clean image plus sigma times unit noise;
    sigma [] or [B] float32 > 0. Returns the expected clean image [B, H, W, C].
    """

    def __call__(self, x: Images, sigma: Sigma) -> Images: ...


class Source(Protocol):
    """A random-access data set of images that all have one size."""

    image_shape: tuple[int, int, int]  # (height, width, channels)
    num_classes: int  # 0: no labels
    class_names: Sequence[str]  # one per class; empty without labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {'image': uint8 [H, W, C], 'label': int32 []}; label is 0 without classes."""
        ...

    def fingerprint(self) -> str:
        """Hex digits that identify the content, wherever it lies."""
        ...
