"""Networks with their weights: saved runs opened again, their configs read and overridden."""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base as default_config
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


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form. Lists become tuples; fields newer than the file keep their defaults.

    Raises:
        UserError: the file has a field that this version does not know.
    """
    config = default_config()
    unknown = _update(config, saved, "")
    if unknown:
        raise UserError(
            f"The saved config has fields that this version does not know: {', '.join(unknown)}. "
            "Use the version that wrote it."
        )
    return config


def _update(config: ConfigDict, saved: dict[str, Any], prefix: str) -> list[str]:
    unknown = []
    for key, value in saved.items():
        if key not in config:
            unknown.append(prefix + key)
        elif isinstance(value, dict):
            unknown += _update(config[key], value, f"{prefix}{key}.")
        else:
            config[key] = tuple(value) if isinstance(value, list) else value
    return unknown
