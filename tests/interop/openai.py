"""The networks of tests/golden/openai_unet.npz: state dicts, configs, and what PyTorch computes."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base
from tests.golden.make_checkpoints import values
from tests.readers import pickling

GOLDEN = Path(__file__).parents[1] / "golden" / "openai_unet.npz"
STORAGES = {  # name of a dtype -> of torch's storage
    **{"float32": "Float", "float16": "Half", "float64": "Double"},
    **{"int64": "Long", "bool": "Bool"},
}
CASES = ("scale_shift", "shift")


class Case(NamedTuple):
    config: ConfigDict
    state_dict: dict[str, np.ndarray]
    inputs: tuple  # of the raw network: images NHWC, timesteps, one-hot labels or None
    output: np.ndarray  # NHWC


@functools.cache
def case(name: str) -> Case:
    with np.load(GOLDEN) as data:
        x, t, output = (data[f"{name}:{key}"] for key in ("x", "t", "out"))
        meta = json.loads(str(data[f"{name}:meta"]))
    weights = {
        k: values(i, tuple(shape)).astype(np.float32)
        for i, (k, shape) in enumerate(meta["shapes"].items())
    }
    classes = meta["settings"]["num_classes"]
    labels = np.eye(classes, dtype=np.float32)[[2, 0]] if classes else None
    inputs = (np.moveaxis(x, 1, -1), t, labels)
    config = config_of(meta["settings"], height=8, width=4)
    return Case(config, weights, inputs, np.moveaxis(output, 1, -1))


def config_of(settings: dict[str, Any], height: int, width: int) -> ConfigDict:
    """The config of a UNetModel, whose attention stands where the image was divided by so much."""
    config = base()
    config.class_conditional = settings["num_classes"] is not None
    config.data.image_size, config.data.image_width = height, width
    config.data.channels = settings["in_channels"]
    config.data.num_classes = settings["num_classes"] or 0
    config.precond.name = "iddpm"
    model = config.model
    model.name, model.augment_dim = "improved", 0
    model.channels, model.num_blocks = settings["model_channels"], settings["num_res_blocks"]
    model.channel_mult = tuple(settings["channel_mult"])
    model.attn_resolutions = tuple(height // d for d in settings["attention_resolutions"])
    model.dropout = settings["dropout"]
    for field in ("num_heads", "num_heads_upsample", "use_scale_shift_norm"):
        model[field] = settings[field]
    model.learn_sigma = settings["out_channels"] == 2 * settings["in_channels"]
    config.lora.rank, config.lora.bases, config.lora.widths = 2, 3, (16, 8)
    config.lora.num_timesteps = 10
    return config


def write(path: Path, state_dict: dict[str, np.ndarray]) -> Path:
    """Writes what torch.save(model.state_dict(), path) does."""
    tensors, storages = {}, {}
    for key, (name, array) in enumerate(state_dict.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        kind = pickling.Global("torch", f"{STORAGES[array.dtype.name]}Storage")
        storage = pickling.Persistent(("storage", kind, str(key), "cpu", array.size))
        arguments = (storage, 0, array.shape, strides, False, pickling.ordered_dict())
        rebuild = pickling.Global("torch._utils", "_rebuild_tensor_v2")
        tensors[name] = pickling.Call(rebuild, arguments)
        storages[str(key)] = array.tobytes()
    path.write_bytes(pickling.torch_zip(tensors, storages))
    return path
