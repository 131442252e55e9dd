"""Inception features, metrics and speed beside pytorch-fid and torch-fidelity, one JSON line each.

    python benchmarks/eval_against_torch.py --torch_python=OTHER_ENV/bin/python [--images=96]

OTHER_ENV needs torch, pytorch-fid, torch-fidelity and torchvision (its compiled part may be
missing: nothing here uses it). Weights are random; both sides get the same ones. Without
--torch_python there is nothing to compare with, and the script says so.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
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
        high = np.minimum(low + 1, size - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        part = (source - low).reshape(shape).astype(np.float32)
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


def sets(dim: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets of features and logits for the metrics."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    real = np.maximum(rng.normal(size=(1500, dim)) @ mix, -0.5)
    fake = np.maximum(1.1 * rng.normal(size=(1200, dim)) @ mix + 0.05, -0.5)
    return (
        real.astype(np.float32),
        fake.astype(np.float32),
        (3 * rng.normal(size=(1200, 30))).astype(np.float32),
    )


# The PyTorch half.


def networks_of(folder: pathlib.Path) -> tuple:
    """(torch, pytorch-fid's network without its resize, the whole one, the weights)."""
    import importlib.util

    import torch

    root = importlib.util.find_spec("torchvision").submodule_search_locations[0]
    declared = (pathlib.Path(root) / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'register_\w+\("(?:torchvision::)?(\w+)"', declared))):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    import pytorch_fid.inception as reference

    torch.set_grad_enabled(False)
    arrays = np.load(folder / "weights.npz")
    state = {name: torch.tensor(arrays[name]) for name in arrays}
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
        for detector in DETECTORS:
            if detector == "edm":
                features = plain(to_nchw(torch, (tf1_resize(x) - 128) / 128))[0]
            else:
                features = whole(to_nchw(torch, x / 255))[0]
            features = features[:, :, 0, 0]
            key = f"{'x'.join(map(str, shape))}/{detector}"
            out[f"{key}/features"] = features.numpy()
            out[f"{key}/logits"] = (features @ state["fc.weight"].T).numpy()
    real, fake, logits = (torch.tensor(a) for a in sets())
    common = {"verbose": False, "kid_subsets": 1, "kid_subset_size": 1000, "rng_seed": 7}
    statistics = [metric_fid.fid_features_to_statistics(f) for f in (fake, real)]
    found = metric_fid.fid_statistics_to_metric(*statistics, False)
    found |= metric_kid.kid_features_to_metric(fake.double(), real.double(), **common)
    found |= metric_isc.isc_features_to_metric(logits, 10, False)
    found |= metric_prc.prc_features_to_metric(fake.double(), real.double(), verbose=False)
    np.savez(folder / "torch.npz", metrics=json.dumps(found), **out)


def torch_speed(folder: pathlib.Path, count: int) -> None:
    """Prints the speed of pytorch-fid's network, resize included, in its batches of 50."""
    torch, _, whole, _ = networks_of(folder)
    images, batch = images_of((32, 32, 3), count, 1), 50

    def run() -> None:
        for i in range(0, count, batch):
            whole(to_nchw(torch, images[i : i + batch].astype(np.float32) / 255))

    print(json.dumps({**speed(run, count), "threads": torch.get_num_threads()}))


def to_nchw(torch, x: np.ndarray):
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def speed(run, count: int) -> dict[str, float]:
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


def compare(folder: pathlib.Path) -> None:
    from lora_diffusion_jax.evaluation.inception import load_inception

    results = dict(np.load(folder / "torch.npz"))
    metrics = json.loads(str(results.pop("metrics")))
    detectors = {name: load_inception(folder / "weights.pth", name) for name in DETECTORS}
    for key in sorted({key.rsplit("/", 1)[0] for key in results}):
        size, name = key.split("/")
        images = images_of(tuple(map(int, size.split("x"))), 3, 0)
        outputs = zip(("features", "logits"), detectors[name].outputs(images), strict=True)
        errors = {
            part: float(np.abs(value - results[f"{key}/{part}"]).max() / np.abs(value).max())
            for part, value in ((p, np.asarray(v)) for p, v in outputs)
        }
        print(
            json.dumps(
                {"bench": "inception_vs_pytorch", "images": size, "detector": name, **errors}
            )
        )
    compare_metrics(metrics)


def compare_speed(folder: pathlib.Path, count: int, theirs: Callable[[], dict]) -> None:
    """Ours between two runs of theirs, so that a machine that others use treats both alike."""
    from lora_diffusion_jax.evaluation.features import extract
    from lora_diffusion_jax.evaluation.inception import load_inception

    detector = load_inception(folder / "weights.pth", "pytorch-fid")
    images = images_of((32, 32, 3), count, 1)
    before = theirs()
    ours = speed(lambda: list(extract(detector, [images])), count)
    line = {"jax": ours, "pytorch_fid": [before, theirs()]}
    for name in ("images_per_second", "cpu_s_per_image"):
        line[f"{name}_ratio"] = ours[name] / np.mean([t[name] for t in line["pytorch_fid"]])
    print(json.dumps({"bench": "inception_speed", "images": count, **line}))


def compare_metrics(theirs: dict[str, float]) -> None:
    from lora_diffusion_jax.evaluation import metrics, neighbours
    from lora_diffusion_jax.evaluation.statistics import moments_of

    real, fake, logits = sets()
    drawn = np.random.RandomState(7)  # noqa: NPY002 (torch-fidelity's generator of subsets)
    chosen = [s[drawn.choice(len(s), 1000, replace=False)] for s in (fake, real)]
    moments = [m for s in (fake, real) for m in moments_of([s], s.shape[1]).result()]
    pr = neighbours.manifold_metrics(real, fake)
    # theirs deals the images to the parts in order; ours at random: undo the dealing
    order = np.random.default_rng(0).permutation(len(logits))
    undone = np.empty_like(logits)
    undone[order] = logits
    ours = {
        "frechet_inception_distance": metrics.frechet_distance(*moments),
        "kernel_inception_distance_mean": metrics.squared_mmd(*chosen),
        "inception_score_mean": metrics.inception_score(undone)[0],
        "inception_score_std": metrics.inception_score(undone)[1],
        "precision": pr["precision"],
        "recall": pr["recall"],
    }
    for name, value in ours.items():
        relative = abs(value - theirs[name]) / abs(theirs[name])
        line = {"metric": name, "jax": value, "torch_fidelity": theirs[name], "relative": relative}
        print(json.dumps({"bench": "metric_vs_torch_fidelity", **line}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch_python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--only_speed", action="store_true")
    parser.add_argument("--keep", help="folder for weights and outputs; default: a temporary one")
    parser.add_argument("--torch", choices=("outputs", "speed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        folder = pathlib.Path(args.keep)
        torch_outputs(folder) if args.torch == "outputs" else torch_speed(folder, args.images)
        return
    if not args.torch_python:
        print(json.dumps({"bench": "inception_vs_pytorch", "skipped": "needs --torch_python"}))
        return
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from lora_diffusion_jax.evaluation.inception import random_state_dict

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.keep or temporary)
        np.savez(folder / "weights.npz", **random_state_dict(0))

        def theirs(what: str) -> str:
            command = [args.torch_python, __file__, f"--torch={what}", f"--keep={folder}"]
            command.append(f"--images={args.images}")
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

        if not (args.only_speed and (folder / "weights.pth").is_file()):
            theirs("outputs")
        if not args.only_speed:
            compare(folder)
        compare_speed(folder, args.images, lambda: json.loads(theirs("speed").splitlines()[-1]))


if __name__ == "__main__":
    main()
