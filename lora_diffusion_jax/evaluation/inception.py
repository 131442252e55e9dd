"""Inception features: finding, checking and reading the weights."""

import functools
import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, cache_folder, tree_hash
from lora_diffusion_jax.evaluation.files import replacing
from lora_diffusion_jax.evaluation.inception_network import (
    BLOCKS,
    POOL_DIM,
    STEM,
    Conv,
    InceptionV3,
    Split,
    Step,
)
from lora_diffusion_jax.evaluation.resize import PREPROCESS
from lora_diffusion_jax.readers.pickles import read_torch_state_dict
from lora_diffusion_jax.readers.safetensors import is_safetensors

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_BYTES = 95_628_359
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
VARIABLE = "LORA_DIFFUSION_INCEPTION"
BATCH_NORM_EPS = 1e-3

WHERE_TO_PUT_IT = (
    f"Get {FILE_NAME} ({FILE_BYTES:,} bytes, sha256 {FILE_SHA256}) from {URL} on a machine that "
    f"can, copy it here, and pass --inception=PATH or set {VARIABLE}=PATH. Without it, use "
    "--features=classifier, and a reference made with it."
)


def load_inception(path: str | os.PathLike[str] | None = None, detector: str = "edm") -> Detector:
    """Returns the Inception features; calling them maps uint8 images NHWC to [B, 2048].

    Args:
      path: pytorch-fid's .pth file, or a .safetensors file made of it by `save_safetensors`; told
        apart by their content. None: $LORA_DIFFUSION_INCEPTION, else the cache, else a download.
      detector: 'edm' (TF1 bilinear resize, (x - 128) / 128: the convention of EDM's and the
        paper's numbers) or 'pytorch-fid' (half-pixel bilinear resize, x / 127.5 - 1).

    Raises:
      UserError: no such file, a damaged one, or weights of another network. Weights that fit this
        network but are not the published ones are taken with a warning, and say so in `details`.
    """
    if detector not in PREPROCESS:
        raise UserError(f"There is no detector {detector!r}; choose one of {sorted(PREPROCESS)}.")
    state_dict, source_hash = read_weights(find_weights(path))
    variables = {"params": to_params(state_dict)}
    network, prepare = InceptionV3(), PREPROCESS[detector]
    return Detector(
        name=f"inception_{detector.replace('-', '_')}",
        feature_dim=POOL_DIM,
        network=lambda variables, images: network.apply(variables, prepare(images)),
        variables=variables,
        details={"weights_sha256": source_hash, "verified": int(source_hash == FILE_SHA256)},
    )


# Where the weights are.


def present_weights(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Returns the weights file named by argument, environment or cache; None where none is."""
    named = path or os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    cached = cache_folder() / FILE_NAME
    return cached if cached.is_file() else None


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """Returns the weights file, downloading it into the cache where none is named or cached."""
    found = present_weights(path)
    if found is None:
        return _download(cache_folder() / FILE_NAME)
    if not found.is_file():
        raise UserError(f"There is no Inception weights file {found}. {WHERE_TO_PUT_IT}")
    return found


def _download(target: Path) -> Path:
    try:
        with replacing(target) as partial:
            with urllib.request.urlopen(URL, timeout=30) as answer, partial.open("wb") as file:
                shutil.copyfileobj(answer, file)
            found = sha256_of(partial)
            if found != FILE_SHA256:
                raise UserError(f"What {URL} gave has the sha256 {found}. {WHERE_TO_PUT_IT}")
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"The Inception weights are not here and cannot be downloaded ({error}). "
            f"{WHERE_TO_PUT_IT}"
        ) from error
    return target


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What is in them.


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Returns (state_dict by official names, sha256 of the .pth file it comes from)."""
    if is_safetensors(path):
        state_dict, source_hash = _read_safetensors(path)
    else:
        source_hash = sha256_of(path)
        if source_hash == TORCHSCRIPT_SHA256:
            raise UserError(
                f"{path} is NVIDIA's TorchScript of this network, which holds a program. "
                f"{WHERE_TO_PUT_IT}"
            )
        state_dict = read_torch_state_dict(path)
    _check_names(path, state_dict)
    if source_hash != FILE_SHA256:
        warnings.warn(
            f"{path} has the layout of the Inception weights but is not the published file: sha256 "
            f"{source_hash}, expected {FILE_SHA256}. Distances made with it are not FIDs.",
            stacklevel=3,
        )
    return state_dict, source_hash


def save_safetensors(source: Path, target: Path) -> None:
    """Rewrites a weights file as safetensors, which records the hash of what it was made of."""
    state_dict, source_hash = read_weights(source)
    kept = {name: state_dict[name] for name in sorted(expected_shapes())}
    partial = target.with_name(f".{target.name}.part")
    save_file(kept, partial, metadata=metadata_of(kept, source_hash))
    partial.replace(target)


def metadata_of(state_dict: Mapping[str, np.ndarray], source_hash: str) -> dict[str, str]:
    """What our safetensors files say of themselves: origin, and a hash that shows changes."""
    meta = {"source_sha256": source_hash, "content": tree_hash(dict(state_dict))}
    return {"inception": json.dumps(meta)}


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads a file of ours, or somebody else's, whose origin is not known: then its own hash."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get("inception", "{}"))
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is a damaged safetensors file, or has a type that numpy lacks ({error}). "
            f"{WHERE_TO_PUT_IT}"
        ) from error
    if not meta:
        return state_dict, sha256_of(path)
    if meta.get("content") != tree_hash(state_dict):
        raise UserError(
            f"The tensors in {path} are not those that it was written with: it was changed or "
            f"damaged since. {WHERE_TO_PUT_IT}"
        )
    return state_dict, meta["source_sha256"]


def convolutions() -> dict[str, tuple[Conv, int]]:
    """Returns every convolution by its official name, with the number of its input channels."""
    found: dict[str, tuple[Conv, int]] = {}

    def walk(steps: tuple[Step, ...], channels: int, prefix: str) -> int:
        for step in steps:
            convs = step.convs if isinstance(step, Split) else (step,)
            convs = [conv for conv in convs if isinstance(conv, Conv)]
            found.update({f"{prefix}{conv.name}": (conv, channels) for conv in convs})
            channels = sum(conv.features for conv in convs) or channels
        return channels

    channels = walk(STEM, 3, "")
    for block, branches in BLOCKS.items():
        channels = sum(walk(branch, channels, f"{block}.") for branch in branches)
    return found


@functools.cache
def expected_shapes() -> Mapping[str, tuple[int, ...]]:
    """Returns the names and shapes of the official state_dict, batch counters left out."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, POOL_DIM), "fc.bias": (1008,)}
    for name, (conv, channels) in convolutions().items():
        shapes[f"{name}.conv.weight"] = (conv.features, channels, *conv.size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (conv.features,)
    return shapes


def random_state_dict(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random weights under the official names, for tests and benchmarks without the file.

    Scaled so that activations keep their size from layer to layer (He et al. 2015).
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in expected_shapes().items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("conv.weight"):
            value *= np.sqrt(2.0 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        found[name] = value.astype(np.float32)
    return found


def _check_names(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless a state_dict is this network's, and finite.

    Batch counters and an auxiliary head may come with it; features do not pass through them.
    """
    wanted = expected_shapes()
    found = {
        name: tuple(value.shape)
        for name, value in state_dict.items()
        if not name.endswith("num_batches_tracked") and not name.startswith("AuxLogits.")
    }
    if found != wanted:
        raise UserError(
            f"{path} holds the weights of another network than the Inception of 2015-12-05: "
            f"{_differences(found, wanted)}. {WHERE_TO_PUT_IT}"
        )
    broken = [name for name in wanted if not np.isfinite(state_dict[name]).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity; the file is damaged.")


def _differences(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """Says in words how some tensors differ from those of the network, with an example of each."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [name for name in found if name in wanted and found[name] != wanted[name]]
    told = []
    if missing:
        told.append(f"{len(missing)} of its {len(wanted)} tensors are missing ({missing[0]})")
    if extra:
        told.append(f"{len(extra)} do not belong to it ({extra[0]} {found[extra[0]]})")
    if other:
        name = other[0]
        shapes = f"{name} is {found[name]} instead of {wanted[name]}"
        told.append(f"{len(other)} have other shapes ({shapes})")
    return "; ".join(told)


def to_params(state_dict: Mapping[str, np.ndarray]) -> PyTree:
    """Folds batch norm into the convolutions (in float64) and transposes to NHWC kernels.

    conv' = conv * g, bias' = beta - mean * g, with g = gamma / sqrt(var + 1e-3).
    """
    params: dict[str, PyTree] = {
        "fc": {"kernel": np.ascontiguousarray(state_dict["fc.weight"].T, np.float32)}
    }
    for name, (conv, _) in convolutions().items():
        weight = state_dict[f"{name}.conv.weight"].astype(np.float64)
        gamma, beta, mean, var = (
            state_dict[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gamma / np.sqrt(var + BATCH_NORM_EPS)
        kernel = (weight * gain[:, None, None, None]).transpose(2, 3, 1, 0)
        kernel = kernel[0, 0] if conv.size == (1, 1) else kernel
        block, _, layer = name.rpartition(".")
        tree = params.setdefault(block, {}) if block else params
        tree[layer] = {
            "kernel": np.ascontiguousarray(kernel, np.float32),
            "bias": (beta - mean * gain).astype(np.float32),
        }
    return params
