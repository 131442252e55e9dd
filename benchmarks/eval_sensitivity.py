"""How the offline features answer to known damage of real images: one JSON line per level, a plot.

    python benchmarks/eval_sensitivity.py --data=cifar10 --data_dir=DIR [--plot=docs/sensitivity.png]

Real test images are blurred, noised, compressed, drawn with uneven classes, or robbed of classes,
each at growing levels; their distance to the training images should grow with every level.
Damage of classes is averaged over five choices of the classes.
"""

import argparse
import io
import itertools
import json
import pathlib
import sys

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from lora_diffusion_jax.data.sources import open_source  # noqa: E402
from lora_diffusion_jax.evaluation import classifier  # noqa: E402
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect  # noqa: E402
from lora_diffusion_jax.evaluation.features import Detector  # noqa: E402
from lora_diffusion_jax.evaluation.metrics import count_name, frechet_distance  # noqa: E402
from lora_diffusion_jax.evaluation.metrics import kernel_distance as kernel  # noqa: E402
from lora_diffusion_jax.evaluation.neighbours import manifold_metrics  # noqa: E402

DRAWS = 5  # choices of rare or dropped classes that are averaged
LEVELS = {
    "blur, sigma in pixels": (0.0, 0.4, 0.6, 0.8, 1.2, 2.0),
    "noise, standard deviation in grey levels": (0.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    "JPEG, 100 - quality": (0, 30, 50, 70, 80, 90),
    "uneven classes, share of one half": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "dropped classes": (0, 1, 2, 4, 6, 8),
}


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    smooth = gaussian_filter(images.astype(np.float64), (0, sigma, sigma, 0), mode="nearest")
    return np.round(smooth).astype(np.uint8)


def noise(images: np.ndarray, deviation: float) -> np.ndarray:
    drawn = np.random.default_rng(1).normal(0, 1, images.shape)
    return np.clip(np.round(images + deviation * drawn), 0, 255).astype(np.uint8)


def jpeg(images: np.ndarray, loss: int) -> np.ndarray:
    """Compresses on a grid moved by 4 pixels.

    Data sets may have been compressed before (the DCT coefficients of some copies of CIFAR-10 show
    steps of quality 75), and a second time on the same grid is not a finer or coarser first time.
    """
    if loss == 0:
        return images
    out = []
    for image in np.roll(images, (4, 4), axis=(1, 2)):
        buffer = io.BytesIO()
        picture = Image.fromarray(image.squeeze() if image.shape[-1] == 1 else image)
        picture.save(buffer, format="JPEG", quality=100 - loss, subsampling=0)
        out.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return np.roll(np.stack(out), (-4, -4), axis=(1, 2))


def choose(labels: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` different images whose classes follow the weights."""
    shares = np.floor(weights / weights.sum() * count).astype(int)
    shares[np.argmax(weights)] += count - shares.sum()
    rng = np.random.default_rng(2)
    found = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(shares)]
    assert sum(map(len, found)) == count, "a class has too few images for this count"
    return np.concatenate(found)


def damaged(
    kind: str, level: float, images: np.ndarray, labels: np.ndarray, count: int, draw: int
) -> np.ndarray:
    """Damages `count` test images; `draw` chooses which classes are rare or dropped."""
    classes = labels.max() + 1
    weights, order = np.ones(classes), np.random.default_rng(draw).permutation(classes)
    if kind.startswith("uneven"):
        half = classes // 2
        weights[order[:half]], weights[order[half:]] = level / half, (1 - level) / (classes - half)
    elif kind.startswith("dropped"):
        weights[order[classes - int(level) :]] = 0
    chosen = images[choose(labels, weights, count)]
    for name, function in (("blur", blur), ("noise", noise), ("JPEG", jpeg)):
        if kind.startswith(name) and level:
            return function(chosen, level)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--num", type=int, help="images a level; default: as the classes allow")
    parser.add_argument("--features", default="classifier,rotation")
    parser.add_argument(
        "--read", nargs="*", default=[], help="lines printed before, not made again"
    )
    parser.add_argument("--plot", help="PNG to write")
    args = parser.parse_args()
    texts = [pathlib.Path(file).read_text() for file in args.read]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    results = [line for line in lines if line["bench"] == "sensitivity"]
    if not args.read:
        results = measure(args)
    for line in monotone(results):
        print(json.dumps(line))
    if args.plot:
        count = results[0]["n"]
        plot(
            results,
            args.plot,
            f"{args.data}: {count:,} damaged test images against all training images",
        )


def measure(args: argparse.Namespace) -> list[dict]:
    """Measures every damage at every level in every feature space; prints and returns the lines."""
    train, test = (open_source(args.data, args.data_dir, "", s) for s in ("train", "test"))
    images, labels = classifier.read_images(test, 100_000)
    real_images, _ = classifier.read_images(train, 50_000)
    count = args.num or 2 * int(np.bincount(labels).min() * 0.9)
    results = []
    for features in args.features.split(","):
        detector = classifier.fit(train, test_source=test, use_labels=features == "classifier")
        real = collect(detector, [real_images], keep_rows=True)
        whole = collect(detector, [images])
        floor = frechet_distance(*whole.moments.result(), *real.moments.result())
        accuracy = detector.details["test_accuracy"]
        line = {"features": detector.name, "test_accuracy": accuracy, "n": len(images)}
        print(json.dumps({"bench": "train_against_test", **line, "fd": floor}), flush=True)
        for kind, levels in LEVELS.items():
            for level in levels:
                row = measure_level(detector, real, kind, level, images, labels, count)
                print(json.dumps(row), flush=True)
                results.append(row)
    return results


def measure_level(
    detector: Detector,
    real: FeatureSet,
    kind: str,
    level: float,
    images: np.ndarray,
    labels: np.ndarray,
    count: int,
) -> dict:
    """One line: every number's mean over the draws, and the distance's deviation between them."""
    draws = DRAWS if kind.startswith(("uneven", "dropped")) else 1
    rows = [
        judge(detector, real, damaged(kind, level, images, labels, count, draw), count)
        for draw in range(draws)
    ]
    line = {"bench": "sensitivity", "features": detector.name, "damage": kind, "level": level}
    line |= {"n": count, "draws": draws}
    line |= {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
    distance = f"fd_{count_name(count)}"
    return line | {"std": float(np.std([r[distance] for r in rows]))}


def judge(detector: Detector, real: FeatureSet, images: np.ndarray, count: int) -> dict:
    """Distances, precision and recall of some images."""
    fake, name = collect(detector, [images], keep_rows=True), count_name(count)
    step = max(1, len(real.features) // (2 * count))
    rows = real.features[::step]
    return {
        f"fd_{name}": frechet_distance(*fake.moments.result(), *real.moments.result()),
        f"kd_{name}": kernel(fake.features, rows, subsets=20, subset_size=min(1000, count))[0],
        **manifold_metrics(rows, fake.features),
    }


def monotone(results: list[dict]) -> list[dict]:
    """Whether each distance grows with every level of each damage; where not, the steps that fall."""
    found = []
    keys = dict.fromkeys((r["features"], r["damage"]) for r in results)
    for features, kind in keys:
        part = [r for r in results if (r["features"], r["damage"]) == (features, kind)]
        for name in (key for key in part[0] if key.startswith(("fd_", "kd_"))):
            falls = [
                [low["level"], high["level"]]
                for low, high in itertools.pairwise(part)
                if high[name] <= low[name]
            ]
            line = {"features": features, "damage": kind, "metric": name}
            found.append({"bench": "monotone", **line, "monotone": not falls, "falls": falls})
    return found


def plot(results: list[dict], path: str, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [key for key in results[0] if key.startswith(("fd_", "kd_"))]
    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(LEVELS))
    for column, kind in enumerate(LEVELS):
        for row, name in enumerate(names):
            for features in dict.fromkeys(r["features"] for r in results):
                part = [r for r in results if (r["damage"], r["features"]) == (kind, features)]
                axes[row, column].errorbar(
                    [r["level"] for r in part],
                    [r[name] for r in part],
                    [r["std"] if name.startswith("fd_") else 0.0 for r in part],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=features,
                )
            axes[row, column].set_yscale("symlog", linthresh=0.1 if row == 0 else 0.01)
            axes[row, column].grid(alpha=0.3)
            axes[row, 0].set_ylabel(name)
        axes[1, column].set_xlabel(kind)
    axes[0, 0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
