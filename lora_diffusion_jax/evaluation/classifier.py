"""Offline features: a small network trained here on the dataset that is to be judged.

With labels it learns the classes (features named `classifier`); without labels it learns which of
four quarter turns an image was given (Gidaris et al. 2018; features named `rotation`). Its
penultimate layer is the feature space. Numbers made with it compare runs on one dataset with each
other; they are not FIDs and compare with nobody else's.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from lora_diffusion_jax.array_types import PyTree, Source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, cache_folder
from lora_diffusion_jax.evaluation.files import replacing

ROTATIONS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the classifier is built and trained; part of the cache key."""

    widths: tuple[int, ...] = (32, 64, 128)
    feature_dim: int = 64
    batch_size: int = 128
    total_images: int = 100_000  # images seen in training, augmented copies counted
    max_images: int = 50_000  # of a larger dataset, evenly spaced ones are used
    max_side: int = 32  # larger images are averaged down to about this before the network
    learning_rate: float = 2e-3
    seed: int = 0


def default_settings(image_shape: tuple[int, int, int]) -> Settings:
    """Returns settings that train in seconds for tiny images and in minutes for larger ones."""
    if max(image_shape[:2]) <= 16:
        return Settings(widths=(16, 32, 64), total_images=60_000)
    return Settings()


class ConvClassifier(nn.Module):
    """Convolutions and ReLU; halves the grid between stages while it is above 4x4.

    The first convolution halves a grid above 16x16.

    Maps images [B, H, W, C] in [-1, 1] to (features [B, feature_dim], logits [B, num_classes]).
    """

    num_classes: int
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shrink = -(-max(x.shape[1:3]) // self.settings.max_side)
        x = _shrunk(x, shrink)
        for width in self.settings.widths:
            if min(x.shape[1:3]) > 4 and width != self.settings.widths[0]:
                x = _shrunk(x, 2)  # means: XLA's CPU backend is slow at max pooling's gradient
            for part in range(2):
                first = part == 0 and width == self.settings.widths[0]
                stride = 2 if first and min(x.shape[1:3]) > 16 else 1  # cost, not quality
                # no normalisation: its gradient would cost more than the convolutions' on a CPU
                init = nn.initializers.he_normal()
                x = nn.relu(nn.Conv(width, (3, 3), (stride, stride), kernel_init=init)(x))
        x = _quarters(x)
        x = nn.Dense(self.settings.feature_dim, name="features")(x)
        features = nn.relu(x)
        return features, nn.Dense(self.num_classes, name="logits")(features)


def _shrunk(x: jax.Array, factor: int) -> jax.Array:
    """Averages cells of factor x factor pixels (as far as they fit in whole)."""
    batch, height, width, channels = x.shape
    down, right = min(factor, height), min(factor, width)
    rows, columns = height // down, width // right
    x = x[:, : rows * down, : columns * right]
    return x.reshape(batch, rows, down, columns, right, channels).mean(axis=(2, 4))


def _quarters(x: jax.Array) -> jax.Array:
    """Averages each quarter of the grid: [B, h, w, C] -> [B, 4 C] whatever h and w."""
    rows, columns = ((s[: max(1, len(s) // 2)], s[len(s) // 2 :]) for s in map(range, x.shape[1:3]))
    cells = [x[:, r[0] : r[-1] + 1, c[0] : c[-1] + 1] for r in rows for c in columns]
    return jnp.concatenate([cell.mean(axis=(1, 2)) for cell in cells], axis=-1)


def read_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [n, H, W, C], labels int32 [n]) of at most `limit`, evenly spaced."""
    count = min(len(source), limit)
    if count == 0:
        raise UserError("The dataset is empty; evaluation needs images.")
    items = [source[i] for i in np.linspace(0, len(source) - 1, count).astype(int).tolist()]
    images = np.stack([item["image"] for item in items])
    return images, np.array([item["label"] for item in items], np.int32)


def fit(
    source: Source,
    *,
    test_source: Source | None = None,
    settings: Settings | None = None,
    use_labels: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Detector:
    """Returns the dataset's own detector, trained now or read from the cache.

    The cache key is the source's fingerprint, the settings, and this file's text.

    Args:
      source: the training images, with a `fingerprint()`; labels are used if there are 2 or more.
      test_source: held-out images; accuracy on them lands in details['test_accuracy'].
      use_labels: False learns quarter turns even where there are labels.
      settings: size and training; default `default_settings` of the image size.
      cache_dir: default $LORA_DIFFUSION_CACHE, else ~/.cache/lora_diffusion_jax.
      progress: show a progress bar while training.
    """
    settings = settings or default_settings(source.image_shape)
    classes = source.num_classes if use_labels and source.num_classes > 1 else 0
    network = ConvClassifier(classes or ROTATIONS, settings)
    path = _cache_file(cache_dir, source.fingerprint(), classes, settings)
    params = _read_cache(path)
    if params is None:
        images, labels = read_images(source, settings.max_images)
        params = _train(network, images, labels if classes else None, progress)
        _write_cache(path, params)
    count = min(len(source), settings.max_images)
    details: dict[str, Any] = {"trained_on": count, "classes": network.num_classes}
    if test_source is not None:
        held = read_images(test_source, settings.max_images)
        details["test_accuracy"] = accuracy(network, params, *held, rotate=not classes)
    recipe = {
        "name": "classifier" if classes else "rotation",
        "classes": network.num_classes,
        "image_shape": list(source.image_shape),
        "settings": dataclasses.asdict(settings),
    }
    return rebuild(recipe, {"params": params}, details)


def rebuild(
    recipe: dict[str, Any], variables: PyTree, details: dict[str, Any] | None = None
) -> Detector:
    """Returns the detector of a recipe (see `fit`) around given weights.

    Raises:
      UserError: a damaged recipe, or weights of another network.
    """
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe["settings"].items()}
        settings = Settings(**fields)
        network = ConvClassifier(recipe["classes"], settings)
        blank = jnp.zeros((1, *recipe["image_shape"]))
        shaped = jax.eval_shape(network.init, jax.random.key(0), blank)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"What describes the feature network is damaged ({type(error).__name__}: {error}). Make "
            "the reference anew with: eval_fid.py ref"
        ) from error
    if jax.tree.map(np.shape, variables) != jax.tree.map(lambda leaf: leaf.shape, shaped):
        raise UserError(
            "The weights of the feature network are not those that its description asks for. Make "
            "the reference anew with: eval_fid.py ref"
        )
    return Detector(
        name=recipe["name"],
        feature_dim=settings.feature_dim,
        network=lambda variables, x: network.apply(variables, _scaled(x)),
        variables=variables,
        image_shape=tuple(recipe["image_shape"]),
        has_classes=recipe["name"] == "classifier",
        details=details or {},
        recipe=recipe,
    )


def accuracy(
    network: ConvClassifier, params: PyTree, images: np.ndarray, labels: np.ndarray, rotate: bool
) -> float:
    """Returns the share of images whose class (or quarter turn) the network names correctly."""
    if rotate:
        labels = np.arange(len(images)) % ROTATIONS
        images = np.asarray(_rotated(jnp.asarray(_square(images)), jnp.asarray(labels)))
    run = jax.jit(lambda x: network.apply({"params": params}, _scaled(x))[1].argmax(-1))
    size = min(500, len(images))
    starts = range(0, len(images), size)
    hits = sum(int((run(images[i : i + size]) == labels[i : i + size]).sum()) for i in starts)
    return hits / len(images)


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


def _square(images: np.ndarray) -> np.ndarray:
    """Cuts the central square, so that a quarter turn keeps the shape."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


def _rotated(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns image i [H, H, C] by turns[i] quarters."""
    options = jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in range(ROTATIONS)])
    return options[turns, jnp.arange(len(images))]


def _shifted(key: jax.Array, images: jax.Array, reach: int) -> jax.Array:
    """Moves each image by up to `reach` pixels in both directions, repeating its edge."""
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _train(
    network: ConvClassifier, images: np.ndarray, labels: np.ndarray | None, progress: bool
) -> PyTree:
    """Trains with Adam, a cosine schedule and random shifts; `labels` None: rotations."""
    s = network.settings
    images = images if labels is not None else _square(images)
    batch = min(s.batch_size, len(images))
    steps = max(1, s.total_images // batch)
    tx = optax.adam(optax.cosine_decay_schedule(s.learning_rate, steps))
    key = jax.random.key(s.seed)
    params = network.init(key, _scaled(jnp.asarray(images[:1])))["params"]
    reach = max(1, min(images.shape[1:3]) // 8)

    def loss_fn(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, _scaled(x))[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: PyTree, state: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple:
        x = _shifted(key, x, reach)
        x = x if labels is not None else _rotated(x, y)
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, rng = tx.init(params), np.random.default_rng(s.seed)
    order = np.zeros(0, np.int64)
    bar = tqdm(
        range(steps), desc="feature network", unit="step", disable=None if progress else True
    )
    for number in bar:  # a Python loop: XLA's CPU backend is slow at gradients inside a scan
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(images))])
        chosen, order = order[:batch], order[batch:]
        y = labels[chosen] if labels is not None else rng.integers(0, ROTATIONS, batch)
        params, state, loss = step(
            params, state, images[chosen], y.astype(np.int32), jax.random.fold_in(key, number)
        )
        if number % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return jax.device_get(params)


def _cache_file(
    cache_dir: str | os.PathLike[str] | None, fingerprint: str, classes: int, settings: Settings
) -> Path:
    facts = {"data": fingerprint, "classes": classes, **dataclasses.asdict(settings)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(Path(__file__).read_bytes())
    name = f"features-{digest.hexdigest()[:16]}.safetensors"
    return Path(cache_dir or cache_folder()).expanduser() / name


def _read_cache(path: Path) -> PyTree | None:
    if not path.is_file():
        return None
    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The cached feature network {path} cannot be read ({error}); delete the file and it "
            "is trained again."
        ) from error
    return unflatten_dict({tuple(name.split("/")): value for name, value in flat.items()})


def _write_cache(path: Path, params: PyTree) -> None:
    flat = {"/".join(names): np.asarray(value) for names, value in flatten_dict(params).items()}
    try:
        with replacing(path) as temporary:
            save_file(flat, temporary)
    except OSError as error:
        raise UserError(
            f"Cannot write the feature network to {path.parent}: {error.strerror}. Set "
            "LORA_DIFFUSION_CACHE to a folder that can be written."
        ) from error
