"""Inception features: finding, verifying and reading the weights."""

import functools
import os
import shutil
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_diffusion_jax import files
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import (
    Detector,
    cache_folder,
    sha256_of,
    shape_differences,
)
from lora_diffusion_jax.evaluation.inception_network import (
    NUM_LOGITS,
    POOL_DIM,
    SIDE,
    InceptionV3,
)
from lora_diffusion_jax.evaluation.resize import PREPROCESS
from lora_diffusion_jax.readers.pickles import read_torch_state_dict
from lora_diffusion_jax.readers.safetensors import is_safetensors, read_safetensors

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_BYTES = 95_628_359
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
VARIABLE = "LORA_DIFFUSION_INCEPTION"
BATCH_NORM_EPS = 1e-3

HOW_TO_GET_IT = (
    f"Download {FILE_NAME} ({FILE_BYTES:,} bytes, sha256 {FILE_SHA256}) from {URL} on another "
    f"machine if need be, and pass --inception=PATH or set {VARIABLE}=PATH. Without it, use "
    "--features=classifier and a reference made with it."
)


def load_inception(path: str | os.PathLike[str] | None = None, detector: str = "edm") -> Detector:
    """Returns the Inception features; calling them maps uint8 images NHWC to [B, 2048].

    Args:
        path: pytorch-fid's .pth file, or a safetensors file of its tensors, which never counts as the
            published file. None: $LORA_DIFFUSION_INCEPTION, the cache, or a download.
        detector: 'edm' (TF1 bilinear resize, (x - 128) / 128: the convention of EDM's and the
            paper's numbers) or 'pytorch-fid' (half-pixel bilinear resize, x / 127.5 - 1).

    Raises:
        UserError: no such file, a damaged one, or weights of another network. Weights that fit
            but are not the published ones give a warning, and `details['verified']` is 0.
    """
    if detector not in PREPROCESS:
        raise UserError(f"There is no detector {detector!r}; choose one of {sorted(PREPROCESS)}.")
    state_dict, source_hash = read_weights(find_weights(path))
    network, prepare = InceptionV3(), PREPROCESS[detector]
    return Detector(
        name=f"inception_{detector.replace('-', '_')}",
        feature_dim=POOL_DIM,
        network=lambda variables, images: network.apply(variables, prepare(images)),
        variables={"params": to_params(state_dict)},
        details={"weights_sha256": source_hash, "verified": int(source_hash == FILE_SHA256)},
    )


def present_weights(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Returns the weights file named by argument, environment or cache; None if there is none."""
    named = path or os.environ.get(VARIABLE)
    cached = cache_folder() / FILE_NAME
    return Path(files.expand(named, VARIABLE)) if named else cached if cached.is_file() else None


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """Returns the weights file, downloaded into the cache if none is named or cached."""
    found = present_weights(path)
    if found is None:
        return _download(cache_folder() / FILE_NAME)
    if not found.is_file():
        raise UserError(f"There is no Inception weights file {found}. {HOW_TO_GET_IT}")
    return found


def _download(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(target) as partial:
            with urllib.request.urlopen(URL, timeout=30) as answer, partial.open("wb") as file:
                shutil.copyfileobj(answer, file)
            found = sha256_of(partial)
            if found != FILE_SHA256:
                raise UserError(f"The file at {URL} has the sha256 {found}. {HOW_TO_GET_IT}")
    except OSError as error:  # urllib's errors are among them
        raise UserError(
            f"Cannot download the Inception weights to {target} ({error}). {HOW_TO_GET_IT}"
        ) from error
    return target


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Returns (state_dict by official names, sha256 of the file).

    What the weights are is decided by this hash alone, never by what a file says of itself.
    """
    source_hash = sha256_of(path) if path.is_file() else ""
    if is_safetensors(path):
        state_dict = read_safetensors(path)[1]
    else:
        if source_hash == TORCHSCRIPT_SHA256:
            raise UserError(
                f"{path} is NVIDIA's TorchScript of this network, which contains a program. "
                f"{HOW_TO_GET_IT}"
            )
        state_dict = read_torch_state_dict(path)
    _check(path, state_dict)
    if source_hash != FILE_SHA256:
        warnings.warn(
            f"{path} has the layout of the Inception weights but is not the published file: sha256 "
            f"{source_hash}, expected {FILE_SHA256}. Distances made with it are not FIDs.",
            stacklevel=3,
        )
    return state_dict, source_hash


@functools.cache
def kernels() -> Mapping[str, tuple[int, ...]]:
    """Returns the kernel's shape, [h, w, in, out] or [in, out], of every layer by official name."""
    blank = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), blank)["params"]
    flat = flatten_dict(params, sep=".")
    return {
        name.removesuffix(".kernel"): leaf.shape
        for name, leaf in flat.items()
        if name.endswith(".kernel")
    }


@functools.cache
def expected_shapes() -> Mapping[str, tuple[int, ...]]:
    """Returns the names and shapes of the official state_dict, without batch counters."""
    shapes = {"fc.weight": (NUM_LOGITS, POOL_DIM), "fc.bias": (NUM_LOGITS,)}
    for name, (*size, channels, features) in kernels().items():
        if name != "fc":
            shapes[f"{name}.conv.weight"] = (features, channels, *(size or (1, 1)))
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{part}"] = (features,)
    return shapes


def _check(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless a state_dict is this network's, and finite.

    Batch counters and an auxiliary head may be included; features do not pass through them.
    """
    wanted = expected_shapes()
    found = {
        name: tuple(value.shape)
        for name, value in state_dict.items()
        if not name.endswith("num_batches_tracked") and not name.startswith("AuxLogits.")
    }
    difference = shape_differences(found, wanted)
    if difference:
        raise UserError(
            f"{path} does not hold the weights of the Inception of 2015-12-05: "
            f"{difference}. {HOW_TO_GET_IT}"
        )
    broken = [name for name in wanted if not np.isfinite(state_dict[name]).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity; the file is damaged.")


def to_params(state_dict: Mapping[str, np.ndarray]) -> PyTree:
    """Folds batch norm into the convolutions (in float64) and transposes to NHWC kernels.

    conv' = conv * g, bias' = beta - mean * g, with g = gamma / sqrt(var + 1e-3).
    """
    flat = {"fc.kernel": state_dict["fc.weight"].T}
    for name, shape in kernels().items():
        if name == "fc":
            continue
        weight = state_dict[f"{name}.conv.weight"].astype(np.float64)
        gamma, beta, mean, var = (
            state_dict[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gamma / np.sqrt(var + BATCH_NORM_EPS)
        flat[f"{name}.kernel"] = (weight.transpose(2, 3, 1, 0) * gain).reshape(shape)
        flat[f"{name}.bias"] = beta - mean * gain
    return unflatten_dict(
        {k: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}, sep="."
    )
