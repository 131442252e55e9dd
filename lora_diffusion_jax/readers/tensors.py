"""Tensors as windows into storages, and what stands for the globals that describe them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from lora_diffusion_jax.readers.machine import (
    Budget,
    Corrupt,
    Instance,
    Maker,
    Refused,
    check_key,
)

MAX_DIMS = 8

_DTYPES = {  # name of a storage class -> name of the dtype in torch, and here
    "Float": ("float32", np.dtype("<f4")),
    "Double": ("float64", np.dtype("<f8")),
    "Half": ("float16", np.dtype("<f2")),
    "BFloat16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
    "Long": ("int64", np.dtype("<i8")),
    "Int": ("int32", np.dtype("<i4")),
    "Short": ("int16", np.dtype("<i2")),
    "Char": ("int8", np.dtype("i1")),
    "Byte": ("uint8", np.dtype("u1")),
    "Bool": ("bool", np.dtype("?")),
}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class StorageType:
    """A storage class or a dtype: the type of the elements."""

    dtype: np.dtype


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Storage:
    """A run of elements that tensors are windows into; in legacy files its bytes follow at the end."""

    dtype: np.dtype
    count: int
    data: memoryview | bytes | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class Tensor:
    """A window into a storage, checked to lie within it; offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, budget: Budget) -> np.ndarray:
        """Returns a contiguous copy.

        Raises:
            Refused: the file is too small for all the tensors that it declares: windows into one
                storage, or strides of zero, may repeat elements without end.
        """
        size = self.dtype.itemsize
        budget.spend("tensors", size * math.prod(max(n, 1) for n in self.shape))
        flat = np.frombuffer(self.storage.data or b"", np.uint8)[self.offset * size :]
        flat = flat[: flat.size // size * size].view(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        strides = tuple(s * size for s in self.strides)
        window = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return window.copy()


def _rebuild_tensor(args: tuple) -> Tensor:
    """torch._utils._rebuild_tensor, _v2 and _v3: a window, checked against its storage."""
    match args:
        case (Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *rest):
            dtypes = [value.dtype for value in rest if type(value) is StorageType]
            dtype = dtypes[0] if dtypes else storage.dtype
        case _:
            raise Corrupt("a tensor without storage, shape or strides")
    if any(type(value) is dict and value for value in rest):
        raise Refused("holds a tensor with hooks, or a conjugate or negative view; save plain ones")
    extent = _numbers(shape), _numbers(strides)
    if not all(extent) or len(shape) != len(strides) or len(shape) > MAX_DIMS or offset < 0:
        raise Corrupt("a tensor of impossible shape or strides")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise Corrupt(f"a tensor of shape {shape} beyond its storage of {storage.count} elements")
    return Tensor(storage, dtype, offset, shape, strides)


def _numbers(values: tuple) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 40 for v in values)


def _rebuild_parameter(args: tuple) -> Tensor:
    match args:
        case (Tensor() as tensor, *_):
            return tensor
    raise Corrupt("a parameter without a tensor")


def _ordered_dict(budget: Budget) -> Callable[[tuple], dict]:
    """collections.OrderedDict, empty or from a list of pairs."""

    def make(args: tuple) -> dict:
        match args:
            case ():
                return {}
            case (list() as pairs,) if all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
                budget.spend("work", len(pairs))
                return {check_key(key): value for key, value in pairs}
        raise Corrupt("invalid OrderedDict")

    return make


def _set(budget: Budget) -> Callable[[tuple], set]:
    def make(args: tuple) -> set:
        match args:
            case (list() as items,):
                budget.spend("work", len(items))
                return set(map(check_key, items))
        raise Corrupt("invalid set")

    return make


def _size(args: tuple) -> tuple:
    match args:
        case (tuple() as sizes,):
            return sizes
    raise Corrupt("invalid torch.Size")


def containers(budget: Budget) -> dict[tuple[str, str], Maker]:
    """The globals of plain containers, charged to the budget."""
    return {
        ("collections", "OrderedDict"): Maker(_ordered_dict(budget)),
        ("builtins", "set"): Maker(_set(budget)),
        ("__builtin__", "set"): Maker(_set(budget)),
    }


STORAGES: dict[tuple[str, str], Any] = {
    (module, f"{kind}Storage"): StorageType(dtype)
    for module in ("torch", "torch.cuda", "torch.storage")
    for kind, (_, dtype) in {
        **_DTYPES,
        "Untyped": _DTYPES["Byte"],
        "_Untyped": _DTYPES["Byte"],
    }.items()
}
TENSORS: dict[tuple[str, str], Any] = {
    **STORAGES,
    **{("torch", name): StorageType(dtype) for name, dtype in _DTYPES.values()},
    ("torch._utils", "_rebuild_tensor"): Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Maker(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Maker(_rebuild_parameter),
    ("torch", "Size"): Maker(_size),
    ("torch", "device"): Maker(lambda args: Instance("device")),
}
