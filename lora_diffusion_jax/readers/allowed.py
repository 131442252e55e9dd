"""The allow-list: the globals a snapshot may refer to, and the inert data each of them makes."""

from typing import Any

import numpy as np

from lora_diffusion_jax.readers.machine import Budget, Corrupt, Instance, Maker, Refused
from lora_diffusion_jax.readers.tensors import TENSORS, containers
from lora_diffusion_jax.readers.torch_files import nested_storage

PERSISTENCE_VERSION = 6  # of torch_utils.persistence, since 2021

_MODULES = {  # classes pickled by reference, known here by name only
    "torch.nn.modules.container": ("ModuleDict", "ModuleList", "Sequential"),
    "torch.nn.modules.activation": ("SiLU",),
    "torch.nn.modules.conv": ("Conv1d", "Conv2d", "Conv3d"),
    "training.lora": ("LoraInjectedConv",),
}


def snapshot_globals(budget: Budget) -> dict[tuple[str, str], Any]:
    """(module, name) -> what stands for it; a file that refers to any other global is refused."""
    persistent = ("torch_utils.persistence", "_reconstruct_persistent_obj")
    return {
        **TENSORS,
        **containers(budget),
        persistent: Maker(_persistent_object),
        ("torch.storage", "_load_from_bytes"): nested_storage(budget),
        ("dnnlib.util", "EasyDict"): Maker(_empty_dict),
        ("_codecs", "encode"): Maker(_encode),
        ("numpy", "dtype"): Maker(_numpy_dtype),
        ("numpy.core.multiarray", "scalar"): Maker(_numpy_scalar),
        ("numpy._core.multiarray", "scalar"): Maker(_numpy_scalar),
        **{
            (module, name): Maker(_module_maker(name))
            for module, names in _MODULES.items()
            for name in names
        },
    }


def _persistent_object(args: tuple) -> Instance:
    """torch_utils.persistence: class name and state; the source text beside them is ignored."""
    match args:
        case ({"type": "class", "version": int() as version, "class_name": str() as name},):
            state = args[0].get("state")
            if version != PERSISTENCE_VERSION:
                raise Refused(
                    f"has version {version} of the persistence format; expected {PERSISTENCE_VERSION}"
                )
            if type(state) is dict:
                return Instance(name, state)
    raise Corrupt("a persistent object without class or state")


def _module_maker(name: str) -> Any:
    def make(args: tuple) -> Instance:
        if args:
            raise Corrupt(f"a {name} made with arguments")
        return Instance(name)

    return make


def _empty_dict(args: tuple) -> dict:
    if args:
        raise Corrupt("an EasyDict made with arguments")
    return {}


def _encode(args: tuple) -> bytes:
    """_codecs.encode(text, 'latin1'): how protocol 2 writes a number's bytes."""
    match args:
        case (str() as text, "latin1") if len(text) <= 16 and max(text, default="") <= "\xff":
            return text.encode("latin1")
    raise Corrupt("_codecs.encode of anything but a number's bytes")


_NUMPY_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def _numpy_dtype(args: tuple) -> Instance:
    """numpy.dtype(kind, align, copy); BUILD adds the byte order."""
    match args:
        case (str() as kind, *_) if kind in _NUMPY_KINDS:
            return Instance(kind)
    raise Corrupt("a numpy dtype that is not a plain number")


def _numpy_scalar(args: tuple) -> int | float | bool:
    """A numpy scalar(dtype, bytes) as Python's own number."""
    match args:
        case (Instance(class_name=kind, state=(_, "<" | "|", *_)), data) if kind in _NUMPY_KINDS:
            if type(data) in (bytes, memoryview) and len(data) == int(kind[1:]):
                return np.frombuffer(data, f"<{kind}")[0].item()
    raise Corrupt("invalid numpy scalar")
