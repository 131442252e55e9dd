"""Networks with their weights: saved runs opened again, their configs read and overridden."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lora_diffusion_jax import default_config, remote
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.errors import UserError, choose, printable
from lora_diffusion_jax.factory.checks import CLASS_ADAPTERS
from lora_diffusion_jax.factory.networks import (
    RawNetwork,
    build_denoiser,
    is_class_pair,
    num_classes,
    resolved,
    variable_shapes,
)
from lora_diffusion_jax.models.song_unet import SongUNet
from lora_diffusion_jax.paths import is_adapter
from lora_diffusion_jax.training import checkpoint, state, workdir

# Fields of `network_fields` that may change under the same weights: they act in training alone.
_FREE = (
    *("model.dropout", "model.label_dropout", "augment.p"),
    *("precond.p_mean", "precond.p_std", "precond.loss"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class Pretrained:
    """A network with its weights.

    Attributes:
        denoiser: `denoiser.apply(variables, x, sigma, class_labels, augment_labels)` is D(x; sigma, c).
        network: `network.apply(variables, x, noise_labels, class_labels, augment_labels)` is the raw
            network's output F.
        variables: {'params', optional 'buffers'}, float32.
        config: the ConfigDict that describes the network.
        step: of the checkpoint, if it comes from a workdir.
        weaker: the network that guides it in sampling (`sampling.prepare`), if there is one.
    """

    denoiser: Denoiser
    variables: Variables
    config: ConfigDict
    step: int | None = None
    weaker: "Pretrained | None" = None

    @property
    def sampled_variables(self) -> Variables:
        """What its generator takes: its variables, with those of the weaker network if there is one."""
        if not self.weaker:
            return self.variables
        return {"network": self.variables, "weaker": self.weaker.variables}

    @property
    def network(self) -> RawNetwork:
        """See above."""
        return RawNetwork(self.denoiser.model, self.denoiser.num_classes)

    @property
    def unet(self) -> nn.Module:
        """The U-Net below the adapters."""
        return getattr(self.denoiser.model, "module", self.denoiser.model)


def load_workdir(
    path: str | os.PathLike, *, weights: str = "ema", at_step: int | None = None
) -> Pretrained:
    """The network of a run, with numpy variables.

    Args:
        path: the run's directory, or its URL.
        weights: `ema`, or `raw` for the weights as the optimizer left them.
        at_step: the checkpoint's step; None: the newest.

    Raises:
        UserError: this is not a run, it has no such checkpoint, or its config does not fit the weights.
    """
    path = remote.local(path)
    config = config_from_dict(workdir.read_config(path))
    step_read, saved = checkpoint.open_for_reading(path, at_step)
    assemble = choose("weights", weights, {"ema": state.ema_variables, "raw": state.raw_variables})
    variables = assemble(saved)
    # iDDPM's noise levels, which older versions kept beside the weights, follow from the config.
    variables.get("buffers", {}).pop("u", None)
    check_finite(variables, f"{path}, step {step_read}")
    denoiser = build_denoiser(config)
    found, wanted = (
        {name: tuple(v.shape) for name, v in flatten_dict(tree, sep="/").items()}
        for tree in (variables, variable_shapes(config, denoiser))
    )
    if problem := mismatch(found, wanted):
        raise UserError(
            f"{path}: the weights of step {step_read} do not fit the network of {workdir.CONFIG}; {problem}. "
            "Restore the file as the run wrote it."
        )
    return Pretrained(denoiser, variables, config, step_read)


def check_finite(variables: Variables, origin: str) -> None:
    """Raises UserError if a variable holds NaN or infinity, naming it and where it comes from."""
    for name, value in flatten_dict(variables, sep="/").items():
        if bad := np.size(value) - np.count_nonzero(np.isfinite(value)):
            raise UserError(
                f"{origin}: {printable(name, 160)} holds NaN or infinity ({bad:,} of {np.size(value):,} "
                "values); the weights are damaged or their training diverged. Use another checkpoint."
            )


def network_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config that describe its network, for JSON; `config_from_dict` reads them."""
    data = ("image_size", "image_width", "channels", "num_classes", "class_names")
    data += ("floats", "mean", "std")
    return {
        "class_conditional": config.class_conditional,
        "data": {field: config.data[field] for field in data},
        **{group: config[group].to_dict() for group in ("model", "precond", "lora", "augment")},
    }


def with_config(loaded: Pretrained, config: ConfigDict) -> Pretrained:
    """The same weights under a changed config: sampler, mesh, dtype, or LoRA off.

    Raises:
        UserError: a changed field describes other weights.
    """
    old, new = (_identity(c) for c in (loaded.config, config))
    # The base alone: its weights are among these, unless it was trained without its scale-and-shift.
    lora_off = config.lora.mode == "baseline" and loaded.config.lora.mode != "only_lora"
    changed = [
        k for k in old if k in new and old[k] != new[k] and not (lora_off and k.startswith("lora."))
    ]
    if changed:
        listed = ", ".join(f"{k} {old[k]!r}, now {new[k]!r}" for k in changed)
        raise UserError(
            f"The config describes another network than the one these weights belong to: {listed}. Remove "
            "these overrides; only sampler, guidance, mesh, dtype, lora.scale, lora.interval and "
            "lora.scaled can change, and lora.mode to baseline."
        )
    return dataclasses.replace(loaded, denoiser=build_denoiser(config), config=config)


def _identity(config: ConfigDict) -> dict[str, Any]:
    """The fields that decide which weights a network has and what they compute, by dotted name."""
    fields = flatten_dict(resolved(config), sep=".")
    fields["data.num_classes"] = num_classes(config)
    names = flatten_dict(network_fields(config), sep=".").keys() - {*_FREE, "data.class_names"}
    return {k: v for k, v in fields.items() if k in names}


def mismatch(found: Mapping[str, tuple], wanted: Mapping[str, tuple], limit: int = 8) -> str:
    """How two sets of shapes by name differ, for a message; "" if they agree.

    Args:
        found: shapes that there are.
        wanted: shapes that a network has.
        limit: how many names of a kind are listed.
    """
    both = sorted(set(found) & set(wanted))
    problems = {
        "it lacks": sorted(set(wanted) - set(found)),
        "left over": sorted(set(found) - set(wanted)),
        "other shapes": [
            f"{k} is {found[k]} there, {wanted[k]} here" for k in both if found[k] != wanted[k]
        ],
    }
    parts = []
    for problem, names in problems.items():
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        if names:
            parts.append(f"{problem}: {', '.join(printable(n, 160) for n in names[:limit])}{more}")
    return "; ".join(parts)


def overlay(fresh: Variables, loaded: Variables, origin: str) -> Variables:
    """Fresh variables with the loaded ones in their places: a base under new adapters, or both.

    Loaded variables may lack adapters. The scale-and-shift layers (`affine`) of a base, and its mapping
    network (`map`), may be left over, as `only_lora` may have neither. Everything else must match.

    Args:
        fresh: the network's own variables.
        loaded: those of a checkpoint.
        origin: the checkpoint's name, for messages.

    Raises:
        UserError: other variables are missing, left over, or of other shapes.
    """
    new, old = (flatten_dict(v, sep="/") for v in (fresh, without_conditioning(loaded, fresh)))
    may_lack = {name for name in new if is_adapter(name)} - old.keys()
    problem = mismatch(
        {name: v.shape for name, v in old.items()},
        {name: v.shape for name, v in new.items() if name not in may_lack},
    )
    if problem:
        raise UserError(
            f"init_from={origin} does not match this network; {problem}. Use the config that it was "
            "trained with (classes, widths, augmentation, LoRA sizes)."
        )
    merged = {k: np.asarray(old[k], v.dtype) if k in old else v for k, v in new.items()}
    return unflatten_dict(merged, sep="/")


def without_conditioning(base: Variables, network: Variables) -> Variables:
    """A base's variables without scale-and-shift (`affine`) or mapping network (`map`) if a network has none.

    Args:
        base: variables.
        network: those of a network on that base, or their shapes.
    """
    names, leaves = flatten_dict(network).keys(), flatten_dict(base)
    for part in ("affine", "map"):
        if not any(part in name for name in names):
            leaves = {name: leaf for name, leaf in leaves.items() if part not in name}
    return unflatten_dict(leaves)


def start_from(
    start: Pretrained, config: ConfigDict, fresh: Variables, origin: str
) -> tuple[Variables, list[str]]:
    """The variables with which a run begins that starts from another network.

    Args:
        start: the network.
        config: of the run.
        fresh: its network's own variables.
        origin: the name of `start`, for messages.

    Returns:
        The variables (`overlay`), and what a reader of the log should know, in words.

    Raises:
        UserError: the network has other adapters, classes or layers.
    """
    check_adapters(start.config, config, origin)
    loaded, added = with_more_classes(start, config, fresh)
    notes = [added, other_process(start.config, config)]
    return overlay(fresh, loaded, origin), [note for note in notes if note]


def check_adapters(old: ConfigDict, new: ConfigDict, origin: str) -> None:
    """Raises UserError if adapters would become other ones, whose shapes may be the same.

    Args:
        old: of the network that has them.
        new: of the network that gets them; it may have more classes.
        origin: the name of the old one, for messages.
    """
    if "baseline" in (old.lora.mode, new.lora.mode):
        return
    there, here = resolved(old)["lora"], resolved(new)["lora"]
    different = [k for k in there if k in here and k != "mode" and there[k] != here[k]]
    if different:
        listed = ", ".join(f"lora.{k} {there[k]!r}, here {here[k]!r}" for k in different)
        raise UserError(
            f"init_from={origin} has other adapters than this config: {listed}. Use the settings that it "
            "was trained with, or start from a network without adapters."
        )
    known, names = old.data.class_names, new.data.class_names
    if old.lora.adapter not in CLASS_ADAPTERS or not (known and names):
        return
    for number, (before, now) in enumerate(zip(known, names, strict=False)):
        if before != now:
            raise UserError(
                f"init_from={origin} has ClassLoRA pairs for other classes: its class {number} is "
                f"{printable(before)!r}, here {printable(now)!r}. Number the classes of the data as it does; "
                "new ones come behind them."
            )


def other_process(old: ConfigDict, new: ConfigDict) -> str:
    """How the process that a network was trained for differs from a config's, in words; "" if it does not."""
    there, here = resolved(old)["precond"], resolved(new)["precond"]
    different = [k for k in there if there[k] != here[k] and f"precond.{k}" not in _FREE]
    listed = ", ".join(f"precond.{k} {there[k]!r}, here {here[k]!r}" for k in different)
    return f"trained for another process: {listed}" if listed else ""


def with_more_classes(
    start: Pretrained, config: ConfigDict, fresh: Variables
) -> tuple[Variables, str]:
    """The variables of a network with ClassLoRA, grown if a config with the same adapters has more classes.

    A class keeps its number, and what the network computes for it. A new one gets a fresh pair, which
    starts as no change, and a row of zeros in the class embedding: it starts as an image without a class.

    Args:
        start: the network.
        config: of the network that it becomes.
        fresh: that network's own variables.

    Returns:
        The variables, and what was added, in words; "" if nothing was.
    """
    old, new = start.config, config
    before, after = num_classes(old), num_classes(new)
    has_pairs = old.lora.mode != "baseline" and old.lora.adapter in CLASS_ADAPTERS
    if not (0 < before < after and has_pairs):
        return start.variables, ""
    own, grown = (flatten_dict(v, sep="/") for v in (fresh, start.variables))
    is_pair, added = is_class_pair(new), []
    for path, value in grown.items():
        if is_pair(path) and path in own:
            grown[path] = _into(own[path], value)
            added.append(path)
        elif path.endswith("/map/label/kernel") and path in own:
            # DDPM++ and NCSN++ multiply labels by the root of their number.
            root = (before / after) ** 0.5 if isinstance(start.unet, SongUNet) else 1.0
            grown[path] = _into(np.zeros_like(own[path]), value * np.float32(root))
            added.append(path)
    listed = f"class {before}" if after == before + 1 else f"classes {before} to {after - 1}"
    sites = sum(path.endswith("/down/kernel") for path in added)
    row = "" if len(added) == 2 * sites else ", and zeros in the class embedding"
    return unflatten_dict(grown, sep="/"), f"added fresh pairs for {listed} at {sites} sites{row}"


def _into(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
    """A copy of an array with a smaller one in its first places."""
    result = np.array(whole)
    result[tuple(map(slice, part.shape))] = part
    return result


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form. Lists become tuples; fields newer than the file keep their defaults.

    Raises:
        UserError: a field is unknown to this version, or has a value of another type.
    """
    config = default_config.base()
    for group in (name for name, fields in config.items() if isinstance(fields, ConfigDict)):
        if not isinstance(saved.get(group, {}), dict):
            raise _wrong_type(group, saved[group])
    if "sampler" in saved:
        name = saved["sampler"].get("name", "edm")
        if not isinstance(name, str):
            raise _wrong_type("sampler.name", name)
        saved = {**saved, "sampler": default_config.migrate_sampler(saved["sampler"])}
        config.sampler = default_config.sampler(name)
    fields = flatten_dict(saved, sep=".")
    defaults = flatten_dict(config.to_dict(), sep=".")
    unknown = sorted(fields.keys() - defaults.keys())
    if unknown:
        raise UserError(
            "The saved config has fields that this version does not know: "
            f"{printable(', '.join(unknown), 300)}. Use the version that wrote it."
        )
    for name, value in fields.items():
        value = tuple(value) if isinstance(value, list) else value
        if value is None and defaults[name] is not None:  # which the config would take
            raise _wrong_type(name, value)
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            raise _wrong_type(name, value) from error
    return config


def _wrong_type(name: str, value: Any) -> UserError:
    return UserError(
        f"The saved config has {name} = {printable(value)}, which has the wrong type. Correct it, or restore "
        "the file."
    )
