"""How the offline features respond to known damage of real images: one JSON line per level, a plot.

    python -m benchmarks.eval_sensitivity --data=cifar10 --data_dir=DIR [--plot=docs/sensitivity.png]

Real test images are blurred, noised, compressed, drawn with uneven classes, or deprived of classes,
each at growing levels; their distance to the training images should grow with every level.
Damage to classes is averaged over five choices of the classes.
"""

import argparse
import io
import itertools
import json

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.metrics import count_name, frechet_distance, kernel_distance

DRAWS = 5  # choices of rare or dropped classes that are averaged


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    smooth = gaussian_filter(images.astype(np.float64), (0, sigma, sigma, 0), mode="nearest")
    return np.round(smooth).astype(np.uint8)


def noise(images: np.ndarray, deviation: float) -> np.ndarray:
    drawn = np.random.default_rng(1).normal(0, 1, images.shape)
    return np.clip(np.round(images + deviation * drawn), 0, 255).astype(np.uint8)


def jpeg(images: np.ndarray, loss: int) -> np.ndarray:
    """Compresses on a grid shifted by 4 pixels.

    Data sets may have been compressed before (the DCT coefficients of some copies of CIFAR-10 show
    steps of quality 75), and compressing again on the same grid partly repeats the first time.
    """
    out = []
    for image in np.roll(images, (4, 4), axis=(1, 2)):
        buffer = io.BytesIO()
        picture = Image.fromarray(image.squeeze() if image.shape[-1] == 1 else image)
        picture.save(buffer, format="JPEG", quality=100 - loss, subsampling=0)
        out.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return np.roll(np.stack(out), (-4, -4), axis=(1, 2))


def uneven(rank: np.ndarray, share: float) -> np.ndarray:
    """Weights of the classes: the lower half by rank has the share together."""
    low = rank < len(rank) // 2
    return np.where(low, share / low.sum(), (1 - share) / (~low).sum())


def dropped(rank: np.ndarray, count: float) -> np.ndarray:
    """Weights of the classes: the last `count` by rank have none."""
    return np.where(rank < len(rank) - count, 1.0, 0.0)


IMAGE_DAMAGE = {
    "blur, sigma in pixels": (blur, (0.0, 0.4, 0.6, 0.8, 1.2, 2.0)),
    "noise, standard deviation in gray levels": (noise, (0.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    "JPEG, 100 - quality": (jpeg, (0, 30, 50, 70, 80, 90)),
}
CLASS_DAMAGE = {
    "uneven classes, share of one half": (uneven, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    "dropped classes": (dropped, (0, 1, 2, 4, 6, 8)),
}
DAMAGE = IMAGE_DAMAGE | CLASS_DAMAGE


def choose(labels: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` different images whose classes follow the weights."""
    shares = np.floor(weights / weights.sum() * count).astype(int)
    shares[np.argmax(weights)] += count - shares.sum()
    rng = np.random.default_rng(2)
    found = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(shares)]
    assert sum(map(len, found)) == count, "a class has too few images for this count"
    return np.concatenate(found)


def damaged(kind: str, level: float, images: np.ndarray, labels: np.ndarray, count: int) -> list:
    """Sets of `count` damaged test images, one per draw of the classes."""
    classes, damage = labels.max() + 1, DAMAGE[kind][0]
    if kind in IMAGE_DAMAGE:
        chosen = images[choose(labels, np.ones(classes), count)]
        return [damage(chosen, level) if level else chosen]
    orders = [np.random.default_rng(draw).permutation(classes) for draw in range(DRAWS)]
    return [images[choose(labels, damage(np.argsort(o), level), count)] for o in orders]


def accuracy(detector: Detector, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose class, or quarter turn, the detector recognises."""
    if not detector.has_classes:
        labels = np.arange(len(images)) % 4
        images = np.stack([np.rot90(x, k) for x, k in zip(images, labels, strict=True)])
    parts = (images[i : i + 500] for i in range(0, len(images), 500))
    found = np.concatenate([np.argmax(detector.outputs(x)[1], axis=-1) for x in parts])
    return float(np.mean(found == labels))


def distances(detector: Detector, real: FeatureSet, images: np.ndarray) -> tuple[float, float]:
    """Frechet and kernel distance of some images."""
    fake, size = collect(detector, [images], keep_rows=True), min(1000, len(images))
    rows = real.features[:: max(1, len(real) // (2 * len(images)))]
    kd = kernel_distance(fake.features, rows, subsets=20, subset_size=size)[0]
    return frechet_distance(*fake.moments.result(), *real.moments.result()), kd


def measure(args: argparse.Namespace) -> list[dict]:
    """Measures every damage at every level in every feature space; prints and returns the lines."""
    train, test = (open_source(args.data, args.data_dir, "", s) for s in ("train", "test"))
    images, labels = classifier.read_images(test, 100_000)
    count = args.num or 2 * int(np.bincount(labels).min() * 0.9)
    names, results = [f"{kind}_{count_name(count)}" for kind in ("fd", "kd")], []
    for features in args.features.split(","):
        detector = classifier.fit(train, use_labels=features == "classifier")
        real = collect(detector, [classifier.read_images(train, 50_000)[0]], keep_rows=True)
        line = {"features": detector.name, "test_accuracy": accuracy(detector, images, labels)}
        line |= {"n": len(images), "fd": distances(detector, real, images)[0]}
        print(json.dumps({"bench": "train_against_test", **line}), flush=True)
        for kind, (_, levels) in DAMAGE.items():
            before = (-np.inf, -np.inf)
            for level in levels:
                sets = damaged(kind, level, images, labels, count)
                rows = np.array([distances(detector, real, x) for x in sets])
                mean = rows.mean(0).tolist()
                line = {"bench": "sensitivity", "features": detector.name, "damage": kind}
                line |= {"level": level, "n": count, "draws": len(sets)}
                line |= dict(zip(names, mean, strict=True)) | {"std": rows[:, 0].std()}
                line["grows"] = [now > then for now, then in zip(mean, before, strict=True)]
                print(json.dumps(line), flush=True)
                results.append(line)
                before = mean
    return results


def plot(results: list[dict], path: str, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r["damage"] for r in results))
    names = [key for key in results[0] if key.startswith(("fd_", "kd_"))]
    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(kinds))
    for (row, name), (column, kind) in itertools.product(enumerate(names), enumerate(kinds)):
        ax = axes[row, column]
        for features in dict.fromkeys(r["features"] for r in results):
            part = [r for r in results if (r["damage"], r["features"]) == (kind, features)]
            x, y = [r["level"] for r in part], [r[name] for r in part]
            bars = [r["std"] if row == 0 else 0.0 for r in part]
            ax.errorbar(x, y, bars, marker="o", markersize=4, capsize=2, label=features)
        ax.set_yscale("symlog", linthresh=0.1 if row == 0 else 0.01)
        ax.grid(alpha=0.3)
        ax.set_ylabel(name if column == 0 else "")
        ax.set_xlabel(kind if row == 1 else "")
    axes[0, 0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--num", type=int, help="images a level; default: as the classes allow")
    parser.add_argument("--features", default="classifier,rotation")
    parser.add_argument("--plot", help="PNG to write")
    args = parser.parse_args()
    results = measure(args)
    if args.plot:
        title = f"{args.data}: {results[0]['n']:,} damaged test images against all training images"
        plot(results, args.plot, title)


if __name__ == "__main__":
    main()
