"""The only reader of ConfigDict: configs become networks, losses, samplers and data."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import generate, interop, lora
from lora_diffusion_jax.array_types import Images, Key, Labels, PyTree, Variables
from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.data import base as data_base
from lora_diffusion_jax.data import pipeline, sources
from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion import losses, precond, samplers, schedules
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.adm_unet import ADMUNet
from lora_diffusion_jax.models.song_unet import SongUNet
from lora_diffusion_jax.training import (
    checkpoint,
    ema,
    loop,
    optimizer,
    sharding,
    state,
    step,
    workdir,
)

CONDITION = "map"  # path of the U-Nets' mapping network: its output conditions UC-LoRA
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
SITES = r".*/(qkv|proj)"
PRECONDS = {"edm": precond.EDM, "vp": precond.VP, "ve": precond.VE, "iddpm": precond.IDDPM}
_POSITIONAL = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
VARIANTS = {
    "ddpmpp": _POSITIONAL,
    "ncsnpp": {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": _POSITIONAL,
}
Architecture = dict[str, Any]  # plain JSON types; the fields of `interop.architecture`


def choose(field: str, value: Any, known: Any) -> Any:
    """Returns known[value], or raises UserError naming the field and what it may be."""
    if value not in known:
        raise UserError(f"{field} is {value!r}; it must be one of {', '.join(map(str, known))}.")
    return known[value] if isinstance(known, dict) else value


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no part of the system can work with.

    What a single part knows better (sampler grids, adapter sizes, batch against mesh) it checks itself.
    """
    choose("model.name", config.model.name, VARIANTS)
    choose("precond.name", config.precond.name, PRECONDS)
    choose("lora.mode", config.lora.mode, ("baseline", "with_lora", "only_lora"))
    choose("sampler.name", config.sampler.name, ("edm", "ablation"))
    if config.sampler.name == "ablation":
        for field, known in samplers.CHOICES.items():
            choose(f"sampler.{field}", config.sampler[field], known)
    choose("dtype", config.dtype, DTYPES)
    _check_numbers(config)
    labels = augmentation.EDM_TRAINING.label_dim
    if config.augment.p and config.model.augment_dim not in (0, labels):
        raise UserError(
            f"model.augment_dim is {config.model.augment_dim}; the augmentation has {labels} labels "
            "(0 does not feed them to the network)."
        )
    if config.train.freeze_base and config.lora.mode == "baseline":
        raise UserError(
            "train.freeze_base=True leaves nothing to train with lora.mode=baseline; choose with_lora."
        )
    if config.data.name and config.data.path:
        raise UserError(
            f"Both data.name={config.data.name} and data.path={config.data.path} are set; "
            "clear one of them (--config.data.name='')."
        )


def _check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number outside of its range, which would fail late or not at all."""
    counts = [f"train.{f}" for f in ("batch_size", "total_images")]
    counts += [f"model.{f}" for f in ("channels", "num_blocks", "channel_mult_emb")]
    ranges = dict.fromkeys([*counts, "sampler.batch_size"], (1, float("inf")))
    ranges |= dict.fromkeys(("train.microbatch", "eval.num_samples"), (0, float("inf")))
    ranges["train.seed"] = (0, 2**32 - 1)  # JAX would drop what lies above
    for name, (low, high) in ranges.items():
        group, field = name.split(".")
        value = config[group][field]
        if not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise UserError(f"{name} is {value}; it must be {limit}.")
    if not config.model.channel_mult or min(config.model.channel_mult) < 1:
        raise UserError(
            f"model.channel_mult is {tuple(config.model.channel_mult)}; give one factor of at least 1 "
            "per level."
        )
    for name, value in (
        ("augment.p", config.augment.p),
        ("model.dropout", config.model.dropout),
        ("model.label_dropout", config.model.label_dropout),
    ):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it is a probability, 0 to 1.")
    if not config.precond.sigma_data > 0:
        raise UserError(f"precond.sigma_data is {config.precond.sigma_data}; it must be above 0.")


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the images."""
    data = config.data
    return data.image_size, data.image_width or data.image_size, data.channels


def num_labels(config: ConfigDict) -> int:
    """Width of the class labels the network takes; 0 for an unconditional one."""
    if not config.class_conditional:
        return 0
    if not config.data.num_classes:
        raise UserError(
            "class_conditional=True needs labels, but the data set has none (data.num_classes=0). "
            "Set --config.class_conditional=False, or add labels to the data."
        )
    return config.data.num_classes


def architecture_from_config(config: ConfigDict) -> Architecture:
    """The plain description of a config's network, with the fields that `interop.architecture` lists.

    Raises:
        UserError: the image size is not known.
    """
    model, data = config.model, config.data
    if not (data.image_size and data.channels):
        raise UserError(
            "The image size is not known: set data.image_size and data.channels, or name a data set "
            "(data.name or data.path) that can be opened."
        )
    mode = config.lora.mode
    fields = ("rank", "bases", "widths")
    return {
        "precond": config.precond.name,
        "precond_args": (
            {"sigma_data": config.precond.sigma_data} if config.precond.name == "edm" else {}
        ),
        "model": model.name,
        "img_resolution": data.image_size,
        "img_channels": data.channels,
        "label_dim": num_labels(config),
        "augment_dim": model.augment_dim,
        "model_channels": model.channels,
        "channel_mult": list(model.channel_mult),
        "channel_mult_emb": model.channel_mult_emb,
        "num_blocks": model.num_blocks,
        "attn_resolutions": list(model.attn_resolutions),
        "dropout": model.dropout,
        "label_dropout": model.label_dropout,
        **VARIANTS[model.name],
        "use_fp16": False,
        "use_affine": mode != "only_lora",
        "lora": None if mode == "baseline" else {f: _plain(config.lora[f]) for f in fields},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def config_from_architecture(architecture: Architecture) -> ConfigDict:
    """The inverse of `architecture_from_config`, all else being the base config's.

    Raises:
        UserError: the network has a property that no config can say.
    """
    config, a = default_config(), architecture
    unusual = {k: a[k] for k, v in VARIANTS[a["model"]].items() if a[k] != v}
    constants = {k: v for k, v in a["precond_args"].items() if k != "sigma_data"}
    usual = vars(PRECONDS[a["precond"]]())
    unusual |= {k: v for k, v in constants.items() if usual[k] != v}
    if unusual:
        raise UserError(
            f"The checkpoint is a {a['model']} network with {a['precond']} preconditioning, but has "
            f"{', '.join(f'{k}={v}' for k, v in unusual.items())}, which no config expresses. Build it "
            "from Python with factory.denoiser_from_architecture instead."
        )
    config.class_conditional = a["label_dim"] > 0
    config.precond.name = a["precond"]
    config.precond.sigma_data = float(a["precond_args"].get("sigma_data", 0.5))
    config.data.image_size = a["img_resolution"]
    config.data.channels = a["img_channels"]
    config.data.num_classes = a["label_dim"]
    config.model.name = a["model"]
    config.model.channels = a["model_channels"]
    for field in ("channel_mult", "attn_resolutions"):
        config.model[field] = tuple(a[field])
    for field in ("channel_mult_emb", "num_blocks", "augment_dim"):
        config.model[field] = a[field]
    for field in ("dropout", "label_dropout"):
        config.model[field] = float(a[field])
    config.augment.p = 0.12 if a["augment_dim"] == 9 else 0.0
    _set_lora(config, a)
    return config


def _set_lora(config: ConfigDict, architecture: Architecture) -> None:
    adapters = architecture["lora"]
    if adapters is None:
        config.lora.mode = "baseline"
        if not architecture["use_affine"]:
            raise UserError("The checkpoint has neither scale-and-shift nor LoRA; no mode is that.")
        return
    config.lora.mode = "with_lora" if architecture["use_affine"] else "only_lora"
    config.lora.rank, config.lora.bases = adapters["rank"], adapters["bases"]
    config.lora.widths = tuple(adapters["widths"])


def denoiser_from_architecture(
    architecture: Architecture,
    variables: Variables | None = None,
    *,
    dtype: str = "float32",
    sites: str = SITES,
) -> precond.Denoiser:
    """Builds the network that an architecture describes: U-Net, LoRA, preconditioning.

    Args:
        architecture: see `architecture_from_config`.
        variables: of a checkpoint, which for iDDPM holds the table of noise levels.
        dtype: of the computation: float32, bfloat16 or float16; parameters are float32.
        sites: pattern of the layers that receive LoRA.
    """
    a = architecture
    preconditioning = PRECONDS[a["precond"]](**a["precond_args"])
    table = (variables or {}).get("buffers", {}).get("u")
    if a["precond"] == "iddpm" and table is not None:
        table = tuple(np.asarray(table, np.float64).tolist())
        preconditioning = dataclasses.replace(preconditioning, table=table)
    common = {
        "resolution": a["img_resolution"],
        "img_channels": a["img_channels"],
        "out_channels": a["img_channels"] * preconditioning.out_factor,
        "channel_mult": tuple(a["channel_mult"]),
        "attn_resolutions": tuple(a["attn_resolutions"]),
        "dtype": choose("dtype", dtype, DTYPES),
    }
    same = ("label_dim", "augment_dim", "model_channels", "channel_mult_emb", "num_blocks")
    common |= {k: a[k] for k in (*same, "dropout", "label_dropout", "use_affine")}
    if a["model"] == "adm":
        unet = ADMUNet(**common)
    else:
        unet = SongUNet(
            **common,
            embedding=a["embedding_type"],
            encoder=a["encoder_type"],
            channel_mult_noise=a["channel_mult_noise"],
            resample_filter=tuple(a["resample_filter"]),
        )
    if a["lora"] is not None:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in a["lora"].items()}
        unet = lora.attach(unet, sites=sites, adapter=lora.UCLoRA(**settings), condition=CONDITION)
    return precond.Denoiser(unet, preconditioning, a["label_dim"])


def build_denoiser(config: ConfigDict, variables: Variables | None = None) -> precond.Denoiser:
    """The network of a config: U-Net, LoRA as `lora.mode` says, and preconditioning."""
    check(config)
    return denoiser_from_architecture(
        architecture_from_config(config), variables, dtype=config.dtype, sites=config.lora.sites
    )


def bypass_lora(denoiser: precond.Denoiser) -> precond.Denoiser:
    """The same network with its adapters off: the base alone, with the same variables."""
    if not isinstance(denoiser.model, lora.Adapted):
        return denoiser
    return denoiser.clone(model=denoiser.model.clone(enabled=False))


def fold_lora(
    denoiser: precond.Denoiser,
    variables: Variables,
    sigma: float,
    class_labels: Labels | None = None,
) -> tuple[precond.Denoiser, Variables]:
    """A network without adapters that equals this one at one noise level and class label.

    W + sum_i omega_i(condition) B_i A_i replaces each adapted W (`lora.fold`).

    Args:
        denoiser: with LoRA attached.
        variables: its variables.
        sigma: the noise level.
        class_labels: one label [1, num_classes]; None for zeros.

    Raises:
        UserError: the network has no adapters.
    """
    if not isinstance(denoiser.model, lora.Adapted):
        raise UserError("This network has no adapters to fold.")
    size = denoiser.model.module.resolution, denoiser.model.module.img_channels
    x = jnp.zeros((1, size[0], size[0], size[1]))
    omegas = lora.composition_weights(denoiser, variables, x, sigma, class_labels)
    base = denoiser.clone(model=denoiser.model.module)
    return base, {**variables, "params": lora.fold(variables["params"], omegas)}


def init_variables(config: ConfigDict, denoiser: precond.Denoiser, key: Key) -> Variables:
    """Fresh variables {'params', optional 'buffers'} of a denoiser."""
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    x = jnp.zeros((1, *image_shape(config)))
    variables = denoiser.init({"params": key}, x, jnp.ones(1), labels)
    return {k: v for k, v in variables.items() if k in ("params", "buffers")}


class Objective(NamedTuple):
    """A training loss in two parts: what it draws at random, and its value given the draws."""

    draw: Callable[[Key, tuple[int, ...]], PyTree]
    loss: Callable[..., tuple[Images, jax.Array]]


def build_objective(config: ConfigDict, denoiser: precond.Denoiser) -> Objective:
    """The training objective of a config.

    `draw(key, shape)` gives sigma [B], the augmentation's draws, unit noise and the key of the dropout,
    each from a key of its own; `loss(variables, images, labels, draws, train)` gives the loss per
    pixel [B, H, W, C] and sigma [B].
    """
    draw_sigma, weighted = _loss_parts(config, denoiser.precond)
    augment_p = config.augment.p
    feed_augment_labels = augment_p > 0 and config.model.augment_dim > 0
    base_frozen = config.train.freeze_base

    def draw(key: Key, shape: tuple[int, ...]) -> PyTree:
        k_sigma, k_augment, k_noise, k_dropout = jax.random.split(key, 4)
        return {
            "sigma": draw_sigma(k_sigma, shape[0]),
            "augment": augmentation.draw(k_augment, shape[0], p=augment_p),
            "noise": jax.random.normal(k_noise, shape),
            "dropout": k_dropout,
        }

    def loss(
        variables: Variables, images: Images, labels: Labels | None, draws: PyTree, train: bool
    ) -> tuple[Images, jax.Array]:
        augment_labels = None
        if augment_p > 0:
            images, augment_labels = augmentation.augment(images, draws["augment"])

        def denoise(x: Images, sigma: jax.Array) -> Images:
            return denoiser.apply(
                variables,
                x,
                sigma,
                labels,
                augment_labels if feed_augment_labels else None,
                train and not base_frozen,  # a frozen base stays in evaluation mode
                rngs={"dropout": draws["dropout"]},
            )

        return weighted(denoise, images, draws["sigma"], draws["noise"]), draws["sigma"]

    return Objective(draw, loss)


def _loss_parts(config: ConfigDict, pre: precond.Precond) -> tuple[Callable, Callable]:
    """(draw of sigma, loss) that belong to a preconditioning."""
    if config.precond.name == "vp":
        draw = functools.partial(
            losses.vp_sigma, beta_d=pre.beta_d, beta_min=pre.beta_min, epsilon_t=pre.epsilon_t
        )
        return draw, losses.vp_loss
    if config.precond.name == "ve":
        draw = functools.partial(losses.ve_sigma, sigma_min=pre.sigma_min, sigma_max=pre.sigma_max)
        return draw, losses.ve_loss
    if config.precond.name == "iddpm":
        levels = pre.levels()[:-1]
        return functools.partial(losses.iddpm_sigma, levels=levels), losses.vp_loss
    return losses.edm_sigma, functools.partial(losses.edm_loss, sigma_data=pre.sigma_data)


def build_sampler(config: ConfigDict, denoiser: precond.Denoiser) -> Callable[..., Images]:
    """The sampler of `config.sampler`, within the range of noise levels the network supports.

    Raises:
        UserError: settings that define no grid, before anything is compiled.
    """
    s = config.sampler
    common = {
        "num_steps": s.num_steps,
        "sigma_min": max(s.sigma_min, denoiser.sigma_min),
        "sigma_max": min(s.sigma_max, denoiser.sigma_max),
        "rho": s.rho,
        "s_churn": s.s_churn,
        "s_min": s.s_min,
        "s_max": s.s_max,
        "s_noise": s.s_noise,
        "round_sigma": denoiser.round_sigma,
    }
    schedules.check_steps(s.num_steps, s.sigma_min, s.sigma_max, s.rho)
    if s.name == "edm":
        return functools.partial(samplers.edm_sampler, **common)
    own = ("solver", "discretization", "schedule", "scaling", "alpha")
    return functools.partial(samplers.ablation_sampler, **common, **{k: s[k] for k in own})


def apply_function(denoiser: precond.Denoiser) -> Callable[..., Images]:
    """(variables, x, sigma, class_labels) -> D(x; sigma), for sampling and evaluation."""

    def apply(variables: Variables, x: Images, sigma: jax.Array, labels: Labels | None) -> Images:
        return denoiser.apply(variables, x, sigma, labels)

    return apply


def forward_flops(config: ConfigDict, denoiser: precond.Denoiser) -> float:
    """Floating-point operations of one evaluation per image, as XLA counts them (nothing is compiled)."""
    shapes = jax.eval_shape(lambda: init_variables(config, denoiser, jax.random.key(0)))
    size = (1, *image_shape(config))
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    call = jax.jit(lambda variables, x: denoiser.apply(variables, x, jnp.ones(()), labels))
    lowered = call.lower(shapes, jax.ShapeDtypeStruct(size, jnp.float32))
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def open_source(config: ConfigDict) -> data_base.ImageSource:
    """The training images of `config.data`.

    Raises:
        UserError: they cannot be opened; the message says what was looked for and where.
    """
    d = config.data
    if not (d.name or d.path):
        raise UserError(
            "No data set is named: set --config.data.name (a TFDS data set) or --config.data.path "
            "(a folder or ZIP of images)."
        )
    return sources.open_source(d.name, d.data_dir, d.path, d.split, class_folders=d.class_folders)


def open_heldout(config: ConfigDict) -> data_base.ImageSource | None:
    """Real images that training does not see; None for a folder or ZIP without data.eval_path."""
    d = config.data
    if d.name:
        return sources.open_source(d.name, d.data_dir, "", d.eval_split)
    if d.eval_path:
        return sources.open_source(path=d.eval_path, class_folders=d.class_folders)
    return None


def complete(config: ConfigDict, source: data_base.ImageSource) -> ConfigDict:
    """The config with the sizes of its data set filled in.

    Raises:
        UserError: a size that the config states differs from the data set's, the images do not
            suit the U-Net, or classes are wanted but there are none.
    """
    height, width, channels = source.image_shape
    config = config.copy_and_resolve_references()
    found = {"image_size": height, "image_width": width, "channels": channels}
    if config.class_conditional:
        found["num_classes"] = source.num_classes
    with config.unlocked():
        for field, value in found.items():
            if field == "image_width" and not config.data.image_width:
                config.data.image_width = config.data.image_size or width
            if config.data[field] not in (0, value):
                raise UserError(
                    f"The config says data.{field}={config.data[field]}, but {source.title} has "
                    f"{value}. Set --config.data.{field}={value} or choose another data set."
                )
            config.data[field] = value
        config.data.fingerprint = source.fingerprint()
    num_labels(config)
    pipeline.check_image_size(source.image_shape, 2 ** (len(config.model.channel_mult) - 1))
    return config


def build_batches(config: ConfigDict, source: data_base.ImageSource) -> pipeline.Batches:
    """The training batches, this process's part of each."""
    return pipeline.Batches(
        source,
        config.train.batch_size,
        config.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        memory_limit=int(config.data.memory_limit_gib * 2**30),
        num_workers=config.data.workers,
    )


def build_mesh(config: ConfigDict) -> Mesh:
    """The mesh of all devices."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp)


def build_optimizer(config: ConfigDict) -> optimizer.Optimizer:
    """Adam with EDM's ramp-up."""
    train = config.train
    return optimizer.adam(train.learning_rate, rampup_images=train.rampup_images)


def build_step(config: ConfigDict, denoiser: precond.Denoiser) -> step.StepFn:
    """The training step of a config."""
    train, objective = config.train, build_objective(config, denoiser)
    return step.make_train_step(
        objective.loss,
        build_optimizer(config),
        ema=ema.Ema(train.ema_halflife_images, train.ema_rampup_ratio),
        batch_size=train.batch_size,
        num_classes=num_labels(config),
        microbatch=train.microbatch or None,
        draw=objective.draw,
        max_bad_steps=train.max_nonfinite,
    )


def build_schedule(config: ConfigDict) -> loop.Schedule:
    """When the loop logs, saves, samples and evaluates."""
    train = config.train
    return loop.Schedule(
        total_images=train.total_images,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        sample_every=train.sample_every or train.total_images,
        eval_every=train.eval_every or train.total_images,
        keep=train.keep,
    )


def trainable(config: ConfigDict) -> Callable[[str], bool]:
    """Path of a parameter -> is it trained: all, or the adapters alone."""
    if config.train.freeze_base:
        return lambda path: lora.params.is_adapter(tuple(path.split("/")))
    return lambda path: True


def build_generator(
    config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh
) -> generate.Generator:
    """Draws images from a denoiser with `config.sampler`."""
    return generate.Generator(
        apply=apply_function(denoiser),
        sampler=build_sampler(config, denoiser),
        image_shape=image_shape(config),
        num_classes=num_labels(config),
        mesh=mesh,
        batch_size=config.sampler.batch_size,
    )


def load_workdir(
    path: str | os.PathLike, *, weights: str = "ema", at_step: int | None = None
) -> interop.Pretrained:
    """The network of a run: denoiser, variables (numpy), config.

    Args:
        path: the run's directory.
        weights: ema, or raw for the network as the last step left it.
        at_step: which checkpoint; None: the newest.

    Raises:
        UserError: it is not a run, or has no such checkpoint.
    """
    config = config_from_dict(workdir.read_config(path))
    step_read, saved = checkpoint.open_for_reading(path, at_step)
    assemble = choose("weights", weights, {"ema": state.ema_variables, "raw": state.raw_variables})
    variables = assemble(saved)
    return interop.Pretrained(build_denoiser(config, variables), variables, config, step_read)


def with_config(loaded: interop.Pretrained, config: ConfigDict) -> interop.Pretrained:
    """The same weights under an overridden config: sampler, mesh, dtype, or LoRA off.

    Raises:
        UserError: a field was changed that decides which weights there are.
    """
    old, new = (architecture_from_config(c) for c in (loaded.config, config))
    if config.lora.mode == "baseline" and old["use_affine"]:
        new["lora"] = old["lora"]  # the base alone, which is among the weights
    old["sites"], new["sites"] = loaded.config.lora.sites, config.lora.sites
    free = ("dropout", "label_dropout")
    changed = [k for k in old if old[k] != new[k] and k not in free]
    if image_shape(loaded.config)[:2] != image_shape(config)[:2]:
        changed.append("image size")
    if changed:
        told = ", ".join(f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in changed)
        raise UserError(
            f"These weights belong to another network than the config describes: {told}. Leave out "
            "these overrides; sampler, mesh and dtype can be changed, and lora.mode to baseline."
        )
    return dataclasses.replace(
        loaded, denoiser=build_denoiser(config, loaded.variables), config=config
    )


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form: lists become tuples, fields that are newer take their defaults.

    Raises:
        UserError: a field that this version does not have.
    """
    config = default_config()
    unknown = _update(config, saved, "")
    if unknown:
        raise UserError(
            f"The saved config has fields that this version does not know: {', '.join(unknown)}. "
            "It was written by another version; use that one."
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
