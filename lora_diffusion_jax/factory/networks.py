"""Config -> network: U-Net, LoRA and preconditioning; and what one does with a whole network."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import AugmentLabels, Images, Key, Labels, Variables
from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion.precond import DDPM, PRECONDS, Denoiser, Precond, check_labels
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import CLASS_ADAPTERS, DTYPES, check
from lora_diffusion_jax.models import NETWORKS, cudnn_attention
from lora_diffusion_jax.models.layers import AttentionFn
from lora_diffusion_jax.models.threefry import unrolled
from lora_diffusion_jax.paths import ADAPTER


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the images.

    Raises:
        UserError: they are unknown.
    """
    data = config.data
    if not (data.image_size and data.channels):
        raise UserError(
            "The image size is unknown: set data.image_size and data.channels, or name a data set "
            "(data.name or data.path) that can be opened."
        )
    return data.image_size, data.image_width or data.image_size, data.channels


def is_pictures(config: ConfigDict) -> bool:
    """Whether what the network makes can be looked at: 8 bits, gray or colour."""
    return not config.data.floats and config.data.channels in (1, 3)


def num_classes(config: ConfigDict) -> int:
    """Width of the network's class labels; 0 for an unconditional one.

    Raises:
        UserError: the network is conditional, and the number of classes is unknown.
    """
    if not config.class_conditional:
        return 0
    if not config.data.num_classes:
        raise UserError(
            "class_conditional=True needs labels, but the data set has none (data.num_classes=0). "
            "Set --config.class_conditional=False, or add labels to the data."
        )
    return config.data.num_classes


def build_denoiser(config: ConfigDict) -> Denoiser:
    """The network of a config: U-Net, LoRA as `lora.mode` says, and preconditioning.

    Raises:
        UserError: a value is invalid, or a setting that this network does not have.
    """
    check(config)
    height, _, channels = image_shape(config)
    precond = _build(PRECONDS[config.precond.name], config, "precond")
    learn_sigma = config.model.learn_sigma
    out_factor = precond.out_factor if learn_sigma is None else 1 + learn_sigma
    unet = _build(
        NETWORKS[config.model.name],
        config,
        "model",
        image_size=height,
        attn_resolutions=attention_heights(config),
        attn_levels=None,
        in_channels=channels,
        out_channels=channels * out_factor,
        learn_sigma=None,  # it is in out_channels
        num_classes=num_classes(config),
        use_affine=config.lora.mode != "only_lora",
        use_map=has_map(config),
        remat=config.train.remat,
        dtype=DTYPES[config.dtype],
    )
    if config.lora.mode != "baseline":
        unet = _attach(config, unet, precond)
    return Denoiser(unet, precond, num_classes(config))


def resolved(config: ConfigDict) -> dict[str, Any]:
    """A config's fields, each with the value that it stands for, such as the network's own default for None.

    What its adapters have no use for is left out, so that equal fields describe equal networks.

    Raises:
        UserError: a value is invalid, or the image size is unknown.
    """
    check(config)
    fields = config.to_dict()
    fields["data"]["image_width"] = image_shape(config)[1]
    precond = _build(PRECONDS[config.precond.name], config, "precond")
    fields["precond"] |= dataclasses.asdict(precond)
    model = fields["model"]
    for field, parameter in inspect.signature(NETWORKS[config.model.name]).parameters.items():
        if field in model and model[field] is None:
            model[field] = parameter.default
    if model["num_heads_upsample"] == -1:
        model["num_heads_upsample"] = model["num_heads"]
    if model["learn_sigma"] is None:
        model["learn_sigma"] = precond.out_factor == 2
    model["attn_resolutions"], model["attn_levels"] = attention_heights(config), None
    used = {"mode"}
    if config.lora.mode != "baseline":
        used |= {
            "adapter",
            "sites",
            *inspect.signature(lora.ADAPTERS[config.lora.adapter]).parameters.keys() - {"scale"},
        }
    fields["lora"]["num_timesteps"] = num_timesteps(config, precond)
    fields["lora"] = {field: value for field, value in fields["lora"].items() if field in used}
    return fields


def num_timesteps(config: ConfigDict, precond: Precond) -> int:
    """T of TimeLoRA: that of a discrete process unless the config has its own."""
    return config.lora.num_timesteps or (precond.num_steps if isinstance(precond, DDPM) else 4000)


def has_map(config: ConfigDict) -> bool:
    """Whether anything in the network reads its mapping network."""
    return config.lora.mode != "only_lora" or "map" in lora.CONDITIONS[config.lora.adapter]


def ignored_inputs(config: ConfigDict) -> str:
    """Which inputs a network of `only_lora` ignores, in words; or ""."""
    if has_map(config):
        return ""
    given = {
        "time": "the noise level",
        "class": "the class" if num_classes(config) else "",
        "augmentation": "augmentation labels" if config.model.augment_dim else "",
    }
    sees = lora.CONDITIONS[config.lora.adapter]
    ignored = [v for k, v in given.items() if v and k not in sees]
    if not ignored:
        return ""
    return (
        f"lora.mode=only_lora with lora.adapter={config.lora.adapter}: nothing in the network depends on "
        f"{' or '.join(ignored)}."
    )


def attention_heights(config: ConfigDict) -> tuple[int, ...]:
    """The heights of the levels that have attention besides the innermost block, which always has it.

    Raises:
        UserError: there is no such level.
    """
    model, (height, _, _) = config.model, image_shape(config)
    if model.attn_levels is None:
        return tuple(model.attn_resolutions)
    if wrong := [k for k in model.attn_levels if k >= len(model.channel_mult)]:
        raise UserError(
            f"model.attn_levels is {model.attn_levels}, but there is no level {wrong[0]}: model.channel_mult "
            f"has the levels 0 to {len(model.channel_mult) - 1}."
        )
    return tuple(height >> k for k in model.attn_levels)


def check_attention(config: ConfigDict) -> None:
    """Raises UserError for an attention resolution that no level has: its LoRA sites would be missing."""
    height = image_shape(config)[0]
    levels = [height >> k for k in range(len(config.model.channel_mult))]
    if wrong := [size for size in attention_heights(config) if size not in levels]:
        raise UserError(
            f"model.attn_resolutions is {tuple(config.model.attn_resolutions)}, but no level of an image "
            f"{height} pixels high has {wrong[0]}: its levels have {', '.join(map(str, levels))}. Name some "
            "of these, or set model.attn_levels ((1,) is the second level at any size)."
        )


def _build(kind: Callable[..., Any], config: ConfigDict, group: str, **given: Any) -> Any:
    """Calls `kind` with those settings that it takes: a config group, and what is given.

    A field that is None is left to `kind`'s own default.

    Raises:
        UserError: a field is set although `kind` has no such setting.
    """
    settings = {k: v for k, v in {**config[group], **given}.items() if v is not None}
    taken = set(inspect.signature(kind).parameters) - {"name"}
    for field, usual in default_config()[group].items():
        if usual is None and field in settings and field not in taken:
            raise UserError(
                f"{group}.{field} is {settings[field]}, but {group}.name={settings['name']} has no such "
                "setting. Remove it."
            )
    return kind(**{k: v for k, v in settings.items() if k in taken})


def _attach(config: ConfigDict, unet: nn.Module, precond: Precond) -> lora.Adapted:
    """The U-Net with the adapters of `config.lora`.

    An adapter's condition is what `lora.CONDITIONS` says: the output of the mapping network `map`, or
    the time and the class from the U-Net's arguments, if it sees them.
    """
    kind, classes = config.lora.adapter, num_classes(config)
    sees = lora.CONDITIONS[kind]
    if "class" in sees and not classes:
        raise UserError(
            f"lora.adapter={kind} needs classes, but the network is unconditional. Set "
            "class_conditional=True, or choose lora.adapter=uc or time."
        )
    steps = num_timesteps(config, precond)
    condition: str | Condition = (
        "map" if sees == ("map",) else Condition(sees, precond, steps, classes)
    )
    # lora.scale is for sampling alone, where `lora.with_scale` applies it.
    sizes = {"num_timesteps": steps, "num_classes": classes, "scale": None}
    adapter = _build(lora.ADAPTERS[kind], config, "lora", **sizes)
    return lora.attach(unet, sites=config.lora.sites, adapter=adapter, condition=condition)


def is_class_pair(config: ConfigDict) -> Callable[[str], bool]:
    """A function of a parameter's path: whether it belongs to the pairs of ClassLoRA."""
    if config.lora.adapter not in CLASS_ADAPTERS:
        return lambda path: False
    subtree = f"/{ADAPTER}/class/" if config.lora.adapter == "time_class" else f"/{ADAPTER}/"
    return lambda path: subtree in path


@dataclasses.dataclass(frozen=True)
class Condition:
    """What adapters see of the time and the class, from the arguments of the U-Net's call.

    A class and no closure, so that equal configs give equal modules.

    Attributes:
        sees: `time`, `class`, both or neither.
        precond: turns the noise label into a time in [0, 1].
        num_timesteps: T, the largest time.
        num_classes: of the network.
    """

    sees: tuple[str, ...]
    precond: Precond
    num_timesteps: int
    num_classes: int

    def __call__(
        self,
        x: jax.Array,
        noise_labels: jax.Array,
        class_labels: Labels | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> Any:
        """The time [B or 1] in [0, T], the labels [B or 1, num_classes], or a mapping of what is seen."""
        time = self.precond.timestep(noise_labels, self.num_timesteps)
        if class_labels is None:  # no class: none of the classes' pairs
            class_labels = jnp.zeros((1, self.num_classes))
        both = {"time": time, "class": class_labels}
        return both[self.sees[0]] if len(self.sees) == 1 else {k: both[k] for k in self.sees}


class RawNetwork(nn.Module):
    """A denoiser's network without its preconditioning, with the denoiser's variables.

    Attributes:
        model: the U-Net, possibly with LoRA attached.
        num_classes: classes of the model, 0 for none.
    """

    model: nn.Module
    num_classes: int = 0

    def __call__(
        self,
        x: Images,
        noise_labels: jax.Array,
        class_labels: Labels | None = None,
        augment_labels: AugmentLabels | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns the raw output [B, H, W, out].

        Args:
            x: images as the network sees them, c_in times noisy images.
            noise_labels: what its embedding sees, c_noise: [] for all images or [B]; improved-diffusion's
                are timesteps.
            class_labels: [B, num_classes] one-hot or mixtures; None stands for all zeros.
            augment_labels: [B, augment_dim] or None.
            train: dropout on, from the rng stream `dropout`.
        """
        x = jnp.asarray(x, jnp.float32)
        noise_labels = jnp.asarray(noise_labels, jnp.float32).reshape(-1)
        class_labels = check_labels(class_labels, self.num_classes, x.shape[0])
        return self.model(x, noise_labels, class_labels, augment_labels, train)


def for_mesh(denoiser: Denoiser, mesh: Mesh, train: bool) -> Denoiser:
    """The same network, with its attention fused where the devices have a kernel for it.

    On TPUs that is `models.fused_attention`; on NVIDIA GPUs cuDNN's, in half precision, for sampling alone.
    Then it is for programs on this mesh alone: not for exports, and not for derivatives in forward mode.

    Args:
        denoiser: the network.
        mesh: the devices that it will run on; its axes split the batch.
        train: whether the program is a training step.
    """
    attention_fn = _attention(mesh, train)
    if attention_fn is None:
        return denoiser
    model = denoiser.model
    if isinstance(model, lora.Adapted):
        unet = model.module.clone(attention_fn=attention_fn)
        return denoiser.clone(model=model.clone(module=unet))
    return denoiser.clone(model=model.clone(attention_fn=attention_fn))


def _attention(mesh: Mesh, train: bool) -> AttentionFn | None:
    """The fused attention of the devices, or None."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        from lora_diffusion_jax.models.fused_attention import FusedAttention  # imports Pallas

        return FusedAttention(mesh)
    # cuDNN's gradient has not been measured with heads of 256 channels, as DDPM++ has.
    return None if train else cudnn_attention.for_device(device)


def bypass_lora(denoiser: Denoiser) -> Denoiser:
    """The same network with its adapters off: the base alone, with the same variables."""
    if not isinstance(denoiser.model, lora.Adapted):
        return denoiser
    return denoiser.clone(model=denoiser.model.clone(enabled=False))


def fold_lora(
    denoiser: Denoiser,
    variables: Variables,
    sigma: float | jax.Array,
    class_labels: Labels | None = None,
) -> tuple[Denoiser, Variables]:
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
    unet = denoiser.model.module
    x = jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels))
    omegas = lora.composition_weights(denoiser, variables, x, sigma, class_labels)
    base = denoiser.clone(model=unet)
    return base, {**variables, "params": lora.fold(variables["params"], omegas)}


def init_variables(config: ConfigDict, denoiser: Denoiser, key: Key) -> Variables:
    """Fresh variables {'params', optional 'buffers'} of a denoiser."""
    return _initialiser(config, denoiser)(key)


def variable_shapes(config: ConfigDict, denoiser: Denoiser) -> Variables:
    """The shapes of a denoiser's variables; nothing is computed, and no device is asked for."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(_initialiser(config, denoiser), key)


def _initialiser(config: ConfigDict, denoiser: Denoiser) -> Callable[[Key], Variables]:
    """The program of a network's fresh variables."""
    network = (denoiser, image_shape(config), num_classes(config))
    try:
        return _initialiser_of(*network)
    except TypeError:  # one's own, with a list as a field: it has no hash
        return _initialiser_of.__wrapped__(*network)


@functools.lru_cache(maxsize=8)  # tracing takes seconds, and its result some 10 MB
def _initialiser_of(
    denoiser: Denoiser, shape: tuple[int, int, int], classes: int
) -> Callable[[Key], Variables]:
    def init(key: Key) -> Variables:
        x, labels = _example(shape, classes)
        variables = denoiser.init({"params": unrolled(key)}, x, jnp.ones(1), labels)
        return {k: v for k, v in variables.items() if k in ("params", "buffers")}

    return jax.jit(init)


def _example(shape: tuple[int, int, int], classes: int) -> tuple[jax.Array, Labels | None]:
    """One blank image [1, H, W, C] and its class label [1, classes], None without classes."""
    return jnp.zeros((1, *shape)), jnp.zeros((1, classes)) if classes else None


def forward_flops(config: ConfigDict, denoiser: Denoiser) -> float:
    """Floating-point operations of one evaluation per image, as XLA counts them; nothing is compiled.

    They are those of the network's definition: on a CPU, `models.convolution` gets by with fewer.
    """
    if config.dtype == "float16":  # not for CPUs, and float32 has as many
        config = config.copy_and_resolve_references()
        config.dtype = "float32"
        denoiser = build_denoiser(config)
    shapes = variable_shapes(config, denoiser)
    x, labels = _example(image_shape(config), num_classes(config))
    call = jax.jit(lambda variables, x: denoiser.apply(variables, x, jnp.ones(()), labels))
    try:  # XLA's GPU client counts nothing; JAX_PLATFORMS=cuda leaves no other
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    with jax.default_device(device):
        # for an accelerator, as a CPU's program has other convolutions
        lowered = call.trace(shapes, x).lower(lowering_platforms=("tpu",))
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))
