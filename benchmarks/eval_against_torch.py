"""Inception features, metrics and speed beside pytorch-fid and torch-fidelity, one JSON line each.

    python -m benchmarks.eval_against_torch --torch_python=OTHER_ENV/bin/python [--images=96]

OTHER_ENV needs torch, torchvision, pytorch-fid and torch-fidelity. Both sides get the same random
weights; `--keep=FOLDER` keeps them and PyTorch's outputs.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np

SHAPES = ((8, 8, 1), (32, 32, 3), (64, 64, 3), (32, 48, 3), (299, 299, 3), (320, 400, 1))
DETECTORS = ("edm", "pytorch-fid")


def images_of(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """Noise, noise on a ramp, and a constant: uint8 [count, H, W, C]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    ramp = np.linspace(0, 190, shape[1]).astype(np.uint8)
    images[1::3] = images[1::3] // 4 + ramp[None, None, :, None]
    images[2::3] = 128
    return images


def tf1_resize(x: np.ndarray, side: int = 299) -> np.ndarray:
    """TF1's resize_bilinear(align_corners=False), written out: float32 [B, H, W, C]."""
    for axis in (1, 2):
        size = x.shape[axis]
        source = np.float32(size / side) * np.arange(side, dtype=np.float32)
        low = np.floor(source).astype(int)
        shape = [side if i == axis else 1 for i in range(4)]
        part = (source - low).reshape(shape).astype(np.float32)
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, size - 1), axis) * part
    return x


def sets(dim: int = 48) -> tuple[np.ndarray, ...]:
    """Two sets of features, and logits, for the metrics; float32."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    real = np.maximum(rng.normal(size=(1500, dim)) @ mix, -0.5)
    fake = np.maximum(1.1 * rng.normal(size=(1200, dim)) @ mix + 0.05, -0.5)
    return tuple(a.astype(np.float32) for a in (real, fake, 3 * rng.normal(size=(1200, 30))))


# The PyTorch half.


def networks_of(folder: pathlib.Path) -> tuple:
    """(torch, pytorch-fid's network without its resize, the whole one, the weights)."""
    import pytorch_fid.inception as reference
    import torch

    torch.set_grad_enabled(False)
    state = {name: torch.tensor(v) for name, v in np.load(folder / "weights.npz").items()}
    reference.load_state_dict_from_url = lambda *args, **kwargs: state
    plain = reference.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    return torch, plain, reference.InceptionV3([3]).eval(), state


def torch_outputs(folder: pathlib.Path) -> None:
    """Writes weights.pth, and features, logits and metrics as torch.npz."""
    torch, plain, whole, state = networks_of(folder)
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    torch.save(state, folder / "weights.pth")
    out = {}
    for shape in SHAPES:
        images = images_of(shape, 3, 0)
        x = np.broadcast_to(images.astype(np.float32), (*images.shape[:3], 3))
        found = {
            "edm": plain(to_nchw(torch, (tf1_resize(x) - 128) / 128)),
            "pytorch-fid": whole(to_nchw(torch, x / 255)),
        }
        for detector, (features,) in found.items():
            key, features = f"{'x'.join(map(str, shape))}/{detector}", features[:, :, 0, 0]
            out[f"{key}/features"] = features.numpy()
            out[f"{key}/logits"] = (features @ state["fc.weight"].T).numpy()
    real, fake, logits = (torch.tensor(a) for a in sets())
    common = {"verbose": False, "kid_subsets": 1, "kid_subset_size": 1000, "rng_seed": 7}
    statistics = [metric_fid.fid_features_to_statistics(f) for f in (fake, real)]
    metrics = metric_fid.fid_statistics_to_metric(*statistics, False)
    metrics |= metric_kid.kid_features_to_metric(fake.double(), real.double(), **common)
    metrics |= metric_isc.isc_features_to_metric(logits, 10, False)
    metrics |= metric_prc.prc_features_to_metric(fake.double(), real.double(), verbose=False)
    np.savez(folder / "torch.npz", metrics=json.dumps(metrics), **out)


def torch_speed(folder: pathlib.Path, count: int) -> None:
    """Prints the speed of pytorch-fid's network, resize included, in its batches of 50."""
    torch, _, whole, _ = networks_of(folder)
    images = images_of((32, 32, 3), count, 1).astype(np.float32) / 255
    batches = [to_nchw(torch, images[i : i + 50]) for i in range(0, count, 50)]
    measured = speed(lambda: [whole(batch) for batch in batches], count)
    print(json.dumps({**measured, "threads": torch.get_num_threads()}))


def to_nchw(torch, x: np.ndarray):
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def speed(run: Callable[[], object], count: int) -> dict[str, float]:
    """Images a second and CPU seconds an image, each the best of three after a warm-up."""
    run()
    walls, cpus = [], []
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu)
    return {"images_per_second": count / min(walls), "cpu_s_per_image": min(cpus) / count}


# Our half.


def compare_features(detectors: dict, theirs: dict[str, np.ndarray]) -> None:
    for key in sorted({key.rsplit("/", 1)[0] for key in theirs}):
        size, name = key.split("/")
        images = images_of(tuple(map(int, size.split("x"))), 3, 0)
        line = {"bench": "inception_vs_pytorch", "images": size, "detector": name}
        for part, value in zip(
            ("features", "logits"), detectors[name].outputs(images), strict=True
        ):
            error = np.abs(np.asarray(value) - theirs[f"{key}/{part}"]).max()
            line[part] = float(error / np.abs(value).max())
        print(json.dumps(line))


def compare_metrics(theirs: dict[str, float]) -> None:
    from lora_diffusion_jax.evaluation import metrics, neighbours

    real, fake, logits = sets()
    drawn = np.random.RandomState(7)  # noqa: NPY002 (torch-fidelity's generator of subsets)
    chosen = [s[drawn.choice(len(s), 1000, replace=False)] for s in (fake, real)]
    rows = [s.astype(np.float64) for s in (fake, real)]
    moments = [m for s in rows for m in (s.mean(0), np.cov(s, rowvar=False))]
    # Theirs assigns images to the parts in order, ours at random: undo that.
    undone = np.empty_like(logits)
    undone[np.random.default_rng(0).permutation(len(logits))] = logits
    score, deviation = metrics.inception_score(undone)
    pr = neighbours.manifold_metrics(real, fake)
    ours = {
        "frechet_inception_distance": metrics.frechet_distance(*moments),
        "kernel_inception_distance_mean": metrics.squared_mmd(*chosen),
        "inception_score_mean": score,
        "inception_score_std": deviation,
        "precision": pr["precision"],
        "recall": pr["recall"],
    }
    for name, value in ours.items():
        relative = abs(value - theirs[name]) / abs(theirs[name])
        line = {"metric": name, "jax": value, "torch_fidelity": theirs[name], "relative": relative}
        print(json.dumps({"bench": "metric_vs_torch_fidelity", **line}))


def compare_speed(detector, count: int, theirs: Callable[[], str]) -> None:
    """Ours between two runs of theirs, so that other load on the machine affects both alike."""
    from lora_diffusion_jax.evaluation.features import extract

    images = images_of((32, 32, 3), count, 1)
    before = theirs()
    ours = speed(lambda: list(extract(detector, [images])), count)
    line = {"jax": ours, "pytorch_fid": [json.loads(text) for text in (before, theirs())]}
    for name in ("images_per_second", "cpu_s_per_image"):
        line[f"{name}_ratio"] = ours[name] / np.mean([t[name] for t in line["pytorch_fid"]])
    print(json.dumps({"bench": "inception_speed", "images": count, **line}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch_python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--keep", type=pathlib.Path, help="folder for weights and outputs")
    parser.add_argument("--torch", choices=("outputs", "speed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch == "outputs":
        return torch_outputs(args.keep)
    if args.torch == "speed":
        return torch_speed(args.keep, args.images)
    if not args.torch_python:
        parser.error("nothing to compare with: pass --torch_python=OTHER_ENV/bin/python")
    from lora_diffusion_jax.evaluation.inception import load_inception
    from tests.evaluation.random_weights import inception_state_dict

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or pathlib.Path(temporary)
        np.savez(folder / "weights.npz", **inception_state_dict())

        def theirs(what: str) -> str:
            command = [args.torch_python, __file__, f"--torch={what}", f"--keep={folder}"]
            command.append(f"--images={args.images}")
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

        theirs("outputs")
        results = dict(np.load(folder / "torch.npz"))
        compare_metrics(json.loads(str(results.pop("metrics"))))
        detectors = {name: load_inception(folder / "weights.pth", name) for name in DETECTORS}
        compare_features(detectors, results)
        measure = functools.partial(theirs, "speed")
        compare_speed(detectors["pytorch-fid"], args.images, measure)
    return None


if __name__ == "__main__":
    main()
