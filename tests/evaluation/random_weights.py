"""Random weights under the official names, listed here on their own: for tests and benchmarks.

The order is that in which the golden outputs' weights were drawn.
"""

import numpy as np

from lora_diffusion_jax.evaluation.inception_network import BLOCKS, STEM, Conv, Split


def convolutions():
    """Every convolution by its official name, with its number of input channels."""
    found = {}

    def walk(steps, channels, prefix):
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


def inception_shapes():
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, (conv, channels) in convolutions().items():
        shapes[f"{name}.conv.weight"] = (conv.features, channels, *conv.size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (conv.features,)
    return shapes


def inception_state_dict(seed=0):
    """Scaled so that activations keep their size from layer to layer (He et al. 2015)."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in inception_shapes().items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("conv.weight"):
            value *= np.sqrt(2.0 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        found[name] = value.astype(np.float32)
    return found


def dinov2_shapes(width, depth, positions):
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    dense = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(depth):
        for name, (rows, columns) in dense.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (width,)
        shapes |= {f"blocks.{i}.ls{k}.gamma": (width,) for k in (1, 2)}
    return shapes


def dinov2_state_dict(width, depth, side=37, seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in dinov2_shapes(width, depth, side**2 + 1).items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("weight") and len(shape) > 1:
            value *= float(np.prod(shape[1:])) ** -0.5
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            value = 1 + 0.1 * value
        else:
            value *= 0.3
        found[name] = value
    return found
