"""Speed of the Frechet distance at Inception's size beside scipy's square root of the product.

python -m benchmarks.eval_speed [--dim=2048]
"""

import argparse
import json
import time

import numpy as np
import scipy.linalg

from lora_diffusion_jax.evaluation.metrics import frechet_distance


def moments(dim: int, shift: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mix = np.random.default_rng(1).normal(size=(dim, dim)) * np.logspace(0, -2, dim) / dim**0.5
    rows = np.maximum(rng.normal(size=(5000, dim)) @ mix + shift, 0)
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    dim, rng = parser.parse_args().dim, np.random.default_rng(0)
    (mu1, sigma1), (mu2, sigma2) = (moments(dim, shift, rng) for shift in (0.30, 0.31))
    times = [time.perf_counter()]
    value = frechet_distance(mu1, sigma1, mu2, sigma2)
    times.append(time.perf_counter())
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1 + sigma2 - 2 * root))
    times.append(time.perf_counter())
    seconds, scipy_seconds = np.diff(times).tolist()
    line = {"bench": "frechet_distance", "dim": dim, "seconds": seconds, "value": value}
    line |= {"scipy_seconds": scipy_seconds, "scipy_value": expected}
    print(json.dumps({**line, "relative": abs(value - expected) / expected}))


if __name__ == "__main__":
    main()
