"""From seeds to images: image k is a function of seed k alone, whatever the batch and the devices."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from lora_diffusion_jax import processes
from lora_diffusion_jax.array_types import Denoise, Images, Labels, Variables
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.diffusion.samplers import bind, to_uint8
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.keys import CHURN, CLASS, LATENT, purpose_key

MAX_SEED = 2**32 - 1  # JAX would drop the bits above
MAX_SEEDS = 10_000_000  # in one range on the command line, which is expanded in memory
NO_LABEL = -1  # the label of an image from an unconditional network, in files and batches

Sampler = Callable[..., Images]  # (denoise, latents, *, key) -> images in [-1, 1]
Bind = Callable[[Denoiser, Variables, Labels | None], Denoise]


class NotFiniteError(UserError):
    """Generated images hold NaN or infinity."""


class Batch(NamedTuple):
    """Generated images with what made them."""

    images: np.ndarray  # uint8 [N, H, W, C], or what the generator's `finish` makes
    seeds: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N], NO_LABEL without classes; or the rows that were given
    finite: np.ndarray | bool = True  # bool [N]: without NaN or infinity, which no uint8 shows

    def not_finite(self) -> list[int]:
        """The seeds of the images that hold NaN or infinity."""
        return self.seeds[~np.broadcast_to(self.finite, len(self.seeds))].tolist()

    def check_finite(self) -> None:
        """Raises NotFiniteError if an image holds NaN or infinity."""
        if bad := self.not_finite():
            listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise NotFiniteError(
                f"{len(bad)} of {len(self.seeds)} images hold NaN or infinity (seeds {listed}): the "
                "sampler overflowed. Use dtype=float32, more steps (sampler.num_steps), or another "
                "checkpoint (--step)."
            )


@dataclasses.dataclass(frozen=True)
class Generator:
    """Draws images from a denoiser; one compiled, sharded call a batch: seeds in, uint8 out.

    Attributes:
        denoiser: the network.
        sampler: one of `SAMPLERS` with its settings bound.
        image_shape: (height, width, channels).
        num_classes: 0 for an unconditional network.
        mesh: devices; a batch is spread over all of them.
        batch_size: images a call; rounded up to a multiple of the devices.
        bind: makes the D(x; sigma) that is sampled from, with guidance for example.
        bind_shared: the same for batches whose images all have one condition; its labels have one row.
            With adapters folded into the base, for example; None: as `bind`.
        finish: images in [-1, 1] -> what is written; `to_values` for arrays of floats.
    """

    denoiser: Denoiser
    sampler: Sampler
    image_shape: tuple[int, int, int]
    num_classes: int
    mesh: Mesh
    batch_size: int = 64
    bind: Bind = bind
    bind_shared: Bind | None = None
    finish: Callable[[Images], jax.Array] = to_uint8

    @property
    def call_size(self) -> int:
        """Images a call: batch_size rounded up to a multiple of the devices."""
        return -(-self.batch_size // self.mesh.size) * self.mesh.size

    @property
    def _spread(self) -> NamedSharding:
        """Rows over all devices."""
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    @property
    def _whole(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def compiled(
        self,
    ) -> Callable[[Variables, jax.Array, Labels], tuple[jax.Array, jax.Array]]:
        """The whole sampling run as one jitted function.

        It is (variables, seeds [B], labels [B, n]) -> (uint8 [B, H, W, C], bool [B]: finite).

        Kept, so that a training run compiles its sampler once and not at every grid of samples.
        """
        spread = self._spread
        return jax.jit(self.sample, in_shardings=(None, spread, spread), out_shardings=spread)

    @functools.cached_property
    def compiled_shared(
        self,
    ) -> Callable[[Variables, jax.Array, Labels], tuple[jax.Array, jax.Array]]:
        """`compiled` for one label [1, n] that all images share: what depends on it is computed once."""
        spread, sample = self._spread, functools.partial(self.sample, bind=self.bind_shared)
        return jax.jit(sample, in_shardings=(None, spread, self._whole), out_shardings=spread)

    def latents(self, seeds: jax.Array) -> Images:
        """Unit normal noise [B, H, W, C], each image's from its seed."""

        def latent(seed: jax.Array) -> jax.Array:
            return jax.random.normal(purpose_key(seed, LATENT), self.image_shape)

        return jax.vmap(latent)(seeds)

    def one_hot(self, labels: np.ndarray) -> np.ndarray:
        """Labels of `choose_labels` as rows, [B, num_classes] float32; [B, 1] without classes. Rows pass."""
        if labels.ndim == 2:
            return labels.astype(np.float32)
        return np.eye(max(self.num_classes, 1), dtype=np.float32)[np.maximum(labels, 0)]

    def sample(
        self,
        variables: Variables,
        seeds: jax.Array,
        labels: Labels,
        bind: Bind | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        churn = jax.vmap(functools.partial(purpose_key, purpose=CHURN))(seeds)
        # Weights that training splits (`training.sharding.gathered` says why) are used whole.
        variables = jax.lax.with_sharding_constraint(variables, self._whole)
        denoise = (bind or self.bind)(
            self.denoiser, variables, labels if self.num_classes else None
        )
        images = self.sampler(denoise, self.latents(seeds), key=churn)
        return self.finish(images), jnp.isfinite(images).all(axis=(1, 2, 3))

    def batches(
        self,
        variables: Variables,
        seeds: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        progress: bool = False,
        between: Callable[[], None] = lambda: None,
        shared: bool | None = None,
    ) -> Iterator[Batch]:
        """Yields the images of the seeds in order; a short last batch is padded and cut.

        With several processes all must iterate alike, and each gets all images.

        Args:
            variables: of the network.
            seeds: integers in [0, 2^32).
            labels: from `choose_labels`, for seeds from `check_seeds`; None calls both. Or rows
                [N, num_classes], which may mix classes.
            progress: show a bar, on a terminal.
            between: called ahead of every batch; it may raise to stop.
            shared: whether all have one condition; None: as these labels do, or as the network does if
                they are drawn. A part of a run says what the whole run does, to round as it does.

        Raises:
            UserError: without labels, a seed out of range.
        """
        if labels is None:
            shared = not self.num_classes if shared is None else shared
            seeds = check_seeds(seeds)
            labels = self.choose_labels(seeds)
        seeds, labels = np.asarray(seeds, np.int64), np.asarray(labels)
        labels = labels if labels.ndim == 2 else labels.astype(np.int32)
        shared = share_condition(labels) if shared is None else shared
        variables = jax.tree.map(  # host arrays go to the devices once, not every call
            lambda v: v if isinstance(v, jax.Array) else processes.place(v, self._whole), variables
        )
        hidden = None if progress else True  # None: only on a terminal
        with tqdm(total=len(seeds), unit="img", desc="sampling", disable=hidden) as bar:
            for start in range(0, len(seeds), self.call_size):
                between()
                part = slice(start, start + self.call_size)
                yield self._run(variables, seeds[part], labels[part], shared)
                bar.update(len(seeds[part]))

    def _run(
        self, variables: Variables, seeds: np.ndarray, labels: np.ndarray, shared: bool
    ) -> Batch:
        inputs = processes.place_rows(seeds.astype(np.uint32), self.call_size, self._spread)
        if shared:
            row = processes.place(self.one_hot(labels[:1]), self._whole)
            made = processes.call(self.compiled_shared, variables, inputs, row)
        else:
            rows = processes.place_rows(self.one_hot(labels), self.call_size, self._spread)
            made = processes.call(self.compiled, variables, inputs, rows)
        images, finite = map(processes.fetch, made)
        return Batch(images[: len(seeds)], seeds, labels, finite[: len(seeds)])

    def choose_labels(
        self, seeds: np.ndarray, class_ids: Sequence[int] | int | None = None
    ) -> np.ndarray:
        """The class of each image, int32 [N]: as requested, or drawn from its seed (from `check_seeds`).

        Raises:
            UserError: a class out of range, or classes for an unconditional network.
        """
        if not self.num_classes:
            if class_ids is not None:
                raise UserError(
                    "A class was requested, but this network is unconditional; leave out --class_id."
                )
            return np.full(len(seeds), NO_LABEL, np.int32)
        if class_ids is None:

            def draw(seed: jax.Array) -> jax.Array:
                return jax.random.randint(purpose_key(seed, CLASS), (), 0, self.num_classes)

            return np.asarray(jax.vmap(draw)(jnp.asarray(seeds, jnp.uint32)), np.int32)
        chosen = np.broadcast_to(np.asarray(class_ids), len(seeds))
        bad = chosen[(chosen < 0) | (chosen >= self.num_classes)]
        if len(bad):
            raise UserError(
                f"Class {bad[0]} does not exist: this network has {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}."
            )
        return chosen.astype(np.int32)


def share_condition(labels: np.ndarray) -> bool:
    """Whether images with these labels, of `choose_labels` or rows, all have the same condition."""
    return bool((labels == labels[:1]).all())


def to_values(mean: Sequence[float], std: Sequence[float], images: Images) -> Images:
    """The values of an array of floats from what a network sees of them, (value - mean) / std."""
    scale = jnp.asarray(std or (1.0,), jnp.float32)
    return images * scale + jnp.asarray(mean or (0.0,), jnp.float32)


def check_seeds(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the seeds as int64 [N]; raises UserError if there are none or one is out of range."""
    if not len(seeds):
        raise UserError("No seeds were given; use --seeds=0-63, for example.")
    low, high = min(seeds), max(seeds)
    if low < 0 or high > MAX_SEED:
        raise UserError(f"Seeds run from {low} to {high}; they must lie in [0, {MAX_SEED}].")
    return np.asarray(seeds, np.int64)


def parse_seeds(text: str) -> list[int]:
    """'0-3,7,10-12' -> [0, 1, 2, 3, 7, 10, 11, 12].

    Raises:
        UserError: not such a list, or seeds out of range.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(-([0-9]+))?\s*", part)
        first, last = (int(match[1]), int(match[3] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(
                f"--seeds={text}: {part.strip()!r} is neither a number nor a range; "
                "write 0-63 or 0-9,20,30-39, for example."
            )
        if last > MAX_SEED or last - first >= MAX_SEEDS:
            raise UserError(
                f"--seeds={text}: seeds go up to {MAX_SEED}, and at most {MAX_SEEDS:,} in one range."
            )
        seeds.extend(range(first, last + 1))
    return seeds
