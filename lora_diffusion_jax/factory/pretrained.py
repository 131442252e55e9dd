"""Networks with their weights: saved runs opened again, their configs read and overridden."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lora_diffusion_jax import default_config, lora
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import choose
from lora_diffusion_jax.factory.networks import (
    architecture_from_config,
    build_denoiser,
    config_from_architecture,
    image_shape,
)
from lora_diffusion_jax.training import checkpoint, state, workdir


@dataclasses.dataclass(frozen=True, repr=False)
class Pretrained:
    """A network with its weights.

    Attributes:
        denoiser: nn.Module; `denoiser.apply(variables, x, sigma, class_labels, augment_labels)` is
            D(x; sigma, c).
        variables: {'params', optional 'buffers'}, float32.
        config: the ConfigDict that describes it; None for a network that no config expresses (an
            unusual filter, say).
        step: of the checkpoint, when it comes from a workdir.
        architecture: its plain description, when it comes from a file.
    """

    denoiser: Any
    variables: dict[str, Any]
    config: Any
    step: int | None = None
    architecture: dict[str, Any] | None = None


def load_workdir(
    path: str | os.PathLike, *, weights: str = "ema", at_step: int | None = None
) -> Pretrained:
    """The network of a run, with numpy variables.

    Args:
        path: the run's directory.
        weights: `ema`, or `raw` for the weights as the optimizer left them.
        at_step: the checkpoint's step; None: the newest.

    Raises:
        UserError: this is not a run, or it has no such checkpoint.
    """
    config = config_from_dict(workdir.read_config(path))
    step_read, saved = checkpoint.open_for_reading(path, at_step)
    assemble = choose("weights", weights, {"ema": state.ema_variables, "raw": state.raw_variables})
    variables = assemble(saved)
    return Pretrained(build_denoiser(config, variables), variables, config, step_read)


def config_of(loaded: Pretrained) -> ConfigDict:
    """The config of a loaded network; UserError says what no config expresses."""
    if loaded.config is None:
        return config_from_architecture(loaded.architecture)
    return loaded.config


def with_config(loaded: Pretrained, config: ConfigDict) -> Pretrained:
    """The same weights under a changed config: sampler, mesh, dtype, or LoRA off.

    Raises:
        UserError: a changed field describes other weights.
    """
    old, new = (architecture_from_config(c) for c in (loaded.config, config))
    if config.lora.mode == "baseline" and old["use_affine"]:
        new["lora"] = old["lora"]  # the base alone: its weights are among these
    old["sites"], new["sites"] = loaded.config.lora.sites, config.lora.sites
    free = ("dropout", "label_dropout")
    changed = [k for k in old if old[k] != new[k] and k not in free]
    if image_shape(loaded.config)[:2] != image_shape(config)[:2]:
        changed.append("image size")
    if changed:
        listed = ", ".join(f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in changed)
        raise UserError(
            f"The config describes another network than the one these weights belong to: {listed}. Remove "
            "these overrides; only sampler, mesh and dtype can change, and lora.mode to baseline."
        )
    return dataclasses.replace(
        loaded, denoiser=build_denoiser(config, loaded.variables), config=config
    )


def overlay(fresh: Variables, loaded: Variables, origin: str) -> Variables:
    """Fresh variables with the loaded ones in their places: a base under new adapters, or both.

    Loaded variables may lack adapters, and the scale-and-shift layers (`affine`) of a base may be left
    over (`only_lora` has none). Everything else must match.

    Args:
        fresh: the network's own variables.
        loaded: those of a checkpoint.
        origin: the checkpoint's name, for messages.

    Raises:
        UserError: other variables are missing, left over, or of other shapes.
    """
    new, old = (flatten_dict(v, sep="/") for v in (fresh, loaded))
    if "buffers/u" not in new:
        old.pop("buffers/u", None)  # iDDPM's noise levels: no other preconditioning has them
    missing = [k for k in new if k not in old and not lora.params.is_adapter(tuple(k.split("/")))]
    over = [k for k in old if k not in new and "/affine/" not in k]
    if any("/affine/" in k for k in new):
        over += [k for k in old if k not in new and "/affine/" in k]
    shapes = [
        f"{k} is {old[k].shape} there, {new[k].shape} here"
        for k in new
        if k in old and old[k].shape != new[k].shape
    ]
    problems = {"it lacks": missing, "left over": over, "other shapes": shapes}
    listed = [f"{what}: {_shorten(names)}" for what, names in problems.items() if names]
    if listed:
        raise UserError(
            f"init_from={origin} does not match this network; {'; '.join(listed)}. Use the config that "
            "it was trained with (classes, widths, augmentation, LoRA sizes)."
        )
    merged = {k: np.asarray(old[k], v.dtype) if k in old else v for k, v in new.items()}
    return unflatten_dict(merged, sep="/")


def _shorten(names: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + rest


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form. Lists become tuples; fields newer than the file keep their defaults.

    Raises:
        UserError: the file has a field that this version does not know.
    """
    config = default_config.base()
    if "sampler" in saved:
        saved = {**saved, "sampler": default_config.adopt_sampler(saved["sampler"])}
        config.sampler = default_config.sampler(saved["sampler"].get("name", "edm"))
    fields = flatten_dict(saved, sep=".")
    unknown = fields.keys() - flatten_dict(config.to_dict(), sep=".").keys()
    if unknown:
        raise UserError(
            f"The saved config has fields that this version does not know: {', '.join(sorted(unknown))}. "
            "Use the version that wrote it."
        )
    config.update_from_flattened_dict(
        {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )
    return config
