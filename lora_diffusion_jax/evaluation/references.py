"""Statistics of a set of images to compare others with, and the npz files that hold them."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.evaluation.collect import FeatureSet
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.metrics import half_root
from lora_diffusion_jax.evaluation.results import code_version
from lora_diffusion_jax.npz import read_npz, write_npz
from lora_diffusion_jax.untrusted import parse_json

WEIGHTS = "weights/"  # prefix of a detector's arrays in a reference file
_META = {  # what other parts read of a reference's meta
    **{"n": int, "features": str, "detector_hash": str, "image_shape": list},
    **{"recipe": dict, "detector_details": dict},
}
_RECREATE = "Recreate it with: eval_fid.py ref"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of a set of images in one feature space.

    Attributes:
        mu: mean [D], float64.
        sigma: covariance [D, D], float64.
        meta: JSON values: images, features, detector_hash, ...; empty for files of other tools.
        features: float32 [n, D] if rows were kept, as kernel distances and neighbours need them.
        weights: arrays of a detector that was trained on the data set itself, by path.
    """

    mu: np.ndarray
    sigma: np.ndarray
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    features: np.ndarray | None = None
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """R [D, rank] with R R^T = sigma: every Frechet distance to this reference needs it."""
        return half_root(self.sigma)

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of mu and sigma."""
        digest = hashlib.sha256(np.ascontiguousarray(self.mu, np.float64).tobytes())
        digest.update(np.ascontiguousarray(self.sigma, np.float64).tobytes())
        return digest.hexdigest()[:16]


def make_reference(detector: Detector, found: FeatureSet, about: dict[str, Any]) -> Reference:
    """Returns the statistics of a set of images, with their features if those were kept.

    Args:
        detector: the feature space; if it was trained on the data set, its weights are included.
        found: the features of the images.
        about: further JSON values for the reference's meta.
    """
    meta = {"n": len(found), **detector.labels, **about, "code_version": code_version()}
    weights: dict[str, np.ndarray] = {}
    if detector.recipe is not None:
        meta |= {"recipe": detector.recipe, "detector_details": detector.details}
        flat = flatten_dict(detector.variables, sep="/")
        weights = {name: np.asarray(value) for name, value in flat.items()}
    return Reference(*found.moments.result(), meta, found.features, weights)


def save_reference(path: str | os.PathLike[str], reference: Reference) -> None:
    """Writes EDM's npz format: `mu` [D] and `sigma` [D, D] in float64.

    Keys of our own, which EDM's readers ignore, make the file all one needs: `meta` (a JSON text),
    `features` if rows are kept, and `weights/...` of a detector trained on the data set itself.
    """
    arrays = {
        "mu": np.asarray(reference.mu, np.float64),
        "sigma": np.asarray(reference.sigma, np.float64),
        "meta": np.array(json.dumps(reference.meta, sort_keys=True)),
    }
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    arrays |= {WEIGHTS + name: value for name, value in reference.weights.items()}
    write_npz(path, arrays, checked=False)  # other tools may edit it


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads statistics in EDM's npz format (ours carry `meta` too).

    Raises:
        UserError: no file, a damaged one, or no mean and covariance in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no reference file {path}. Make one with: eval_fid.py ref --data=... "
            "--dest=FILE.npz"
        )
    ours = ("mu", "sigma", "meta", "features")
    expected = "EDM's reference format, the arrays mu and sigma"
    _, arrays = read_npz(path, lambda k: k in ours or k.startswith(WEIGHTS), expected)
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{path} holds no reference statistics: expected the arrays mu [D] and sigma [D, D]. "
            "If these are images, pass them with --images instead."
        )
    mu, sigma, rows = arrays["mu"], arrays["sigma"], arrays.get("features")
    problem = _problem(mu, sigma)
    weights = {k.removeprefix(WEIGHTS): v for k, v in arrays.items() if k.startswith(WEIGHTS)}
    if not problem and rows is not None and (rows.ndim != 2 or rows.shape[1] != len(mu)):
        problem = f"features has shape {rows.shape}; expected [N, {len(mu)}]"
    numbers = weights if rows is None else {"features": rows, **weights}
    for name, value in () if problem else numbers.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            problem = f"{printable(name)} is not finite float32"
    if problem:
        raise UserError(f"{path} holds damaged statistics: {problem}. {_RECREATE}")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    meta = _meta(path, arrays)
    count = meta.get("n", 2 if rows is None else len(rows))
    if count < 2 or (rows is not None and len(rows) != count):
        found = "no features" if rows is None else f"{len(rows):,} rows of features"
        raise UserError(
            f"{path} is of {count:,} images and holds {found}; expected two images or more, each with a "
            f"row if there are any. {_RECREATE}"
        )
    return Reference(mu, sigma, meta, rows, weights)


def _problem(mu: np.ndarray, sigma: np.ndarray) -> str:
    """Says why mu [D] and sigma [D, D] are not the mean and covariance of anything; '' if they are."""
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        return f"mu has shape {mu.shape} and sigma {sigma.shape}; expected [D] and [D, D]"
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        return f"mu is {mu.dtype} and sigma {sigma.dtype}; expected real numbers (float64)"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "mu or sigma holds NaN or infinity"
    asymmetry = np.abs(sigma - sigma.T).max(initial=0.0)
    if asymmetry > 1e-4 * np.abs(sigma).max(initial=0.0):
        return f"sigma differs from its transpose by up to {asymmetry:.3g}; it must be symmetric"
    # Positive semi-definite up to rounding, tested cheaply: the largest row sum bounds the norm.
    ridge = 1e3 * len(mu) * np.finfo(np.float64).eps * np.abs(sigma).sum(axis=0).max()
    try:
        np.linalg.cholesky(sigma + max(ridge, np.finfo(np.float64).tiny) * np.eye(len(mu)))
    except np.linalg.LinAlgError:
        return "sigma has negative eigenvalues; a covariance is positive semi-definite"
    return ""


def _meta(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        meta = parse_json(str(arrays["meta"]), "it") if "meta" in arrays else {}
    except UserError as error:
        raise UserError(f"{path}: its entry `meta` is damaged: {error} {_RECREATE}") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path}: its entry `meta` is damaged, not a JSON object. {_RECREATE}")
    for name, kind in _META.items():
        if name in meta and type(meta[name]) is not kind:
            raise UserError(
                f"{path}: its entry `meta` has {name} = {printable(meta[name])}; expected "
                f"{kind.__name__}. {_RECREATE}"
            )
    shape = meta.get("image_shape")
    if shape is not None and not (len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(f"{path}: its entry `meta` has no valid image_shape. {_RECREATE}")
    return meta
