"""Speed of statistics and distances at Inception's size, one JSON line each.

    python benchmarks/eval_speed.py [--dim=2048]

The Frechet distance stands beside pytorch-fid's way, scipy's square root of the product.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import scipy.linalg

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from lora_diffusion_jax.evaluation.metrics import frechet_distance, kernel_distance  # noqa: E402
from lora_diffusion_jax.evaluation.neighbours import manifold_metrics  # noqa: E402
from lora_diffusion_jax.evaluation.statistics import moments_of  # noqa: E402


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(args.dim, args.dim)) * np.logspace(0, -2, args.dim) / args.dim**0.5
    sets = [
        np.maximum(rng.normal(size=(5000, args.dim)) @ mix + shift, 0).astype(np.float32)
        for shift in (0.30, 0.31)
    ]
    seconds, moments = timed(lambda: [moments_of([s], args.dim).result() for s in sets])
    rate = sum(map(len, sets)) / seconds
    print(json.dumps({"bench": "moments", "dim": args.dim, "images_per_second": rate}))
    (mu1, sigma1), (mu2, sigma2) = moments
    ours, value = timed(lambda: frechet_distance(mu1, sigma1, mu2, sigma2))
    theirs, root = timed(lambda: scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    gap = mu1 - mu2
    expected = float(gap @ gap + np.trace(sigma1 + sigma2 - 2 * root))
    line = {"seconds": ours, "scipy_seconds": theirs, "value": value, "scipy_value": expected}
    line["relative"] = abs(value - expected) / expected
    print(json.dumps({"bench": "frechet_distance", "dim": args.dim, **line}))
    seconds, _ = timed(lambda: kernel_distance(*sets, subsets=10))
    print(json.dumps({"bench": "kernel_distance_10_subsets", "seconds": seconds}))
    seconds, _ = timed(lambda: manifold_metrics(*sets))
    print(json.dumps({"bench": "manifold_metrics_5k_5k", "seconds": seconds}))


if __name__ == "__main__":
    main()
