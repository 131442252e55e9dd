"""Offline features: a small network trained here on the data set that is to be evaluated.

With labels it learns the classes (features named `classifier`); without labels it learns which of
four quarter turns an image was given (Gidaris et al. 2018; features named `rotation`). Its
penultimate layer is the feature space. Its numbers compare runs on one data set with each other;
they are not FIDs and cannot be compared with published numbers.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from lora_diffusion_jax import keys, processes
from lora_diffusion_jax.array_types import Key, PyTree, Source
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.evaluation.features import Detector, cache_folder
from lora_diffusion_jax.npz import read_npz, write_npz

ROTATIONS = 4
TRAINING_LIMIT = 3600.0  # seconds that processes wait for one another's training


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the classifier is built and trained; part of the cache key."""

    widths: tuple[int, ...] = (32, 64, 128)
    feature_dim: int = 64
    batch_size: int = 128
    total_images: int = 100_000  # seen in training, repetitions counted
    max_images: int = 50_000  # of a larger data set, evenly spaced images are used
    max_side: int = 32  # larger images are averaged down to about this size first
    learning_rate: float = 2e-3
    seed: int = 0


def default_settings(image_shape: tuple[int, int, int]) -> Settings:
    """Returns settings that train in seconds for tiny images and in minutes for larger ones."""
    if max(image_shape[:2]) <= 16:
        return Settings(widths=(16, 32, 64), total_images=60_000)
    return Settings()


class ConvClassifier(nn.Module):
    """Convolutions and ReLU; halves the grid between stages while it is above 4x4.

    The first convolution halves a grid above 16x16. Maps images [B, H, W, C] in [-1, 1] to
    (features [B, feature_dim], logits [B, num_classes]).
    """

    num_classes: int
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = _shrunk(x, -(-max(x.shape[1:3]) // self.settings.max_side))
        for stage, width in enumerate(self.settings.widths):
            if stage and min(x.shape[1:3]) > 4:
                x = _shrunk(x, 2)  # means: XLA's CPU backend is slow at the gradient of max pooling
            for part in range(2):
                stride = 2 if (stage, part) == (0, 0) and min(x.shape[1:3]) > 16 else 1  # for speed
                # No normalisation: on a CPU its gradient would cost more than the convolutions'.
                init = nn.initializers.he_normal()
                x = nn.relu(nn.Conv(width, (3, 3), (stride, stride), kernel_init=init)(x))
        features = nn.relu(nn.Dense(self.settings.feature_dim, name="features")(_quarters(x)))
        return features, nn.Dense(self.num_classes, name="logits")(features)


def _shrunk(x: jax.Array, factor: int) -> jax.Array:
    """Averages cells of factor x factor pixels; a remainder at the edge is dropped."""
    batch, height, width, channels = x.shape
    down, right = min(factor, height), min(factor, width)
    rows, columns = height // down, width // right
    x = x[:, : rows * down, : columns * right]
    return x.reshape(batch, rows, down, columns, right, channels).mean(axis=(2, 4))


def _quarters(x: jax.Array) -> jax.Array:
    """Averages each quarter of the grid: [B, h, w, C] -> [B, 4 C] for any h and w."""
    rows, columns = ((slice(max(1, n // 2)), slice(n // 2, n)) for n in x.shape[1:3])
    cells = [x[:, row, column] for row in rows for column in columns]
    return jnp.concatenate([cell.mean(axis=(1, 2)) for cell in cells], axis=-1)


def read_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [n, H, W, C], labels int32 [n]) of at most `limit`, evenly spaced."""
    count = min(len(source), limit)
    if count == 0:
        raise UserError("The data set is empty; evaluation needs images.")
    items = [source[i] for i in np.linspace(0, len(source) - 1, count).astype(int).tolist()]
    images = np.stack([item["image"] for item in items])
    return images, np.array([item["label"] for item in items], np.int32)


def fit(source: Source, *, settings: Settings | None = None, use_labels: bool = True) -> Detector:
    """Returns the data set's own detector, trained now or read from the cache.

    The cache key is the source's fingerprint, the settings, and this file's text. With several
    processes all must call this; each trains, or reads its own cache.

    Args:
        source: the training images; labels are used if there are at least 2 classes.
        settings: size and training; None: `default_settings` of the image size.
        use_labels: False learns quarter turns even if there are labels.

    Raises:
        UserError: no images, an unusable cache, or processes that trained different networks.
    """
    settings = settings or default_settings(source.image_shape)
    classes = source.num_classes if use_labels and source.num_classes > 1 else 0
    network = ConvClassifier(classes or ROTATIONS, settings)
    path = _cache_file(source.fingerprint(), classes, settings)
    if path.is_file():
        expected = "a trained feature network; delete the file to train it again"
        params = unflatten_dict(read_npz(path, lambda name: True, expected)[1], sep="/")
    else:
        images, labels = read_images(source, settings.max_images)
        params = _train(network, images, labels if classes else None)
        advice = "Set LORA_DIFFUSION_CACHE to a folder that can be written."
        write_npz(path, flatten_dict(params, sep="/"), advice)
    recipe = {
        "name": "classifier" if classes else "rotation",
        "classes": network.num_classes,
        "image_shape": list(source.image_shape),
        "settings": dataclasses.asdict(settings),
    }
    count = min(len(source), settings.max_images)
    details = {"trained_on": count, "classes": network.num_classes}
    detector = rebuild(recipe, {"params": params}, details)
    processes.barrier("training the feature network", TRAINING_LIMIT)
    processes.check_same("the feature network", detector.hash)
    return detector


def rebuild(
    recipe: dict[str, Any], variables: PyTree, details: dict[str, Any] | None = None
) -> Detector:
    """Returns the detector of a recipe (see `fit`) around given weights.

    Raises:
        UserError: a damaged recipe, or weights of another network.
    """
    problem = _recipe_problem(recipe)
    if not problem:
        fields: dict[str, Any] = dict(recipe["settings"])
        fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        network = ConvClassifier(recipe["classes"], Settings(**fields))
        blank = jax.ShapeDtypeStruct((1, *recipe["image_shape"]), jnp.float32)
        expected = jax.eval_shape(network.init, jax.random.key(0), blank)
        if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, expected):
            problem = "its weights are those of another network"
    if problem:
        raise UserError(
            f"The description of the feature network is damaged ({problem}). Recreate the reference with: "
            "eval_fid.py ref"
        )
    details = details or {}
    return Detector(
        name=recipe["name"],
        feature_dim=network.settings.feature_dim,
        network=lambda variables, x: network.apply(variables, _scaled(x)),
        variables=variables,
        image_shape=tuple(recipe["image_shape"]),
        has_classes=recipe["name"] == "classifier",
        # Facts for reports; what is said of weights elsewhere is never taken from a file.
        details={k: details[k] for k in ("trained_on", "classes") if type(details.get(k)) is int},
        recipe=recipe,
    )


def _recipe_problem(recipe: dict[str, Any]) -> str:
    """What is wrong with a recipe from an untrusted file; '' if nothing is."""

    def within(value: Any, most: int) -> bool:
        return type(value) is int and 1 <= value <= most

    settings, shape = recipe.get("settings"), recipe.get("image_shape")
    if recipe.get("name") not in ("classifier", "rotation"):
        return f"its name is {printable(recipe.get('name'))}, not classifier or rotation"
    if not (isinstance(shape, list) and len(shape) == 3 and all(within(n, 8192) for n in shape)):
        return "it has no valid image_shape"
    names = {field.name for field in dataclasses.fields(Settings)}
    if not (isinstance(settings, dict) and settings.keys() == names):
        return "its settings are not those of this version"
    widths = settings["widths"]
    if not (
        isinstance(widths, list | tuple)
        and 1 <= len(widths) <= 16
        and all(within(n, 8192) for n in widths)
    ):
        return "it has no valid widths"
    if not all(isinstance(v, int | float) for k, v in settings.items() if k != "widths"):
        return "a setting is no number"
    sizes = (recipe.get("classes"), settings["feature_dim"], settings["max_side"])
    if not all(within(n, 1_000_000) for n in sizes):
        return "its classes, feature_dim or max_side is no valid number"
    return ""


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


def _square(images: np.ndarray) -> np.ndarray:
    """Cuts out the central square, which keeps its shape under a quarter turn."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


def _rotated(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns image i [H, H, C] by turns[i] quarters."""
    options = jnp.stack([jnp.rot90(images, k, axes=(1, 2)) for k in range(ROTATIONS)])
    return options[turns, jnp.arange(len(images))]


def _shifted(key: Key, images: jax.Array) -> jax.Array:
    """Shifts each image by up to an eighth of its side in both directions, repeating its edge."""
    reach = max(1, min(images.shape[1:3]) // 8)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _train(network: ConvClassifier, images: np.ndarray, labels: np.ndarray | None) -> PyTree:
    """Trains with Adam, a cosine schedule and random shifts; `labels` None: quarter turns."""
    s = network.settings
    images = images if labels is not None else _square(images)
    batch = min(s.batch_size, len(images))
    steps = max(1, s.total_images // batch)
    key = keys.purpose_key(s.seed, keys.CLASSIFIER)  # number 0: the weights; k: step k - 1
    params = network.init(jax.random.fold_in(key, 0), _scaled(jnp.asarray(images[:1])))["params"]
    tx = optax.adam(optax.cosine_decay_schedule(s.learning_rate, steps))

    def loss_fn(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, _scaled(x))[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: PyTree, state: PyTree, x: jax.Array, y: jax.Array, key: Key) -> tuple:
        x = _shifted(key, x)
        x = x if labels is not None else _rotated(x, y)
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(s.seed), tx.init(params)
    epochs = -(-steps * batch // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    order = order[: steps * batch].reshape(steps, batch)
    turns = rng.integers(0, ROTATIONS, order.shape)
    # A Python loop: XLA's CPU backend is slow at gradients inside a scan.
    for number, chosen in enumerate(
        tqdm(order, desc="feature network", unit="step", disable=None), start=1
    ):
        y = (labels[chosen] if labels is not None else turns[number - 1]).astype(np.int32)
        params, state = step(params, state, images[chosen], y, jax.random.fold_in(key, number))
    return jax.device_get(params)


def _cache_file(fingerprint: str, classes: int, settings: Settings) -> Path:
    facts = {"data": fingerprint, "classes": classes, **dataclasses.asdict(settings)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(Path(__file__).read_bytes())
    return cache_folder() / f"features-{digest.hexdigest()[:16]}.npz"
