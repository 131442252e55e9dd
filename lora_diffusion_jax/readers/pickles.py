"""Safe readers of official checkpoints: EDM snapshots (.pkl) and PyTorch files (.pt, .pth).

Nothing in a file is ever executed (see `machine`): the source code in snapshots is ignored, and PyTorch
is not needed.
"""

import contextlib
import dataclasses
import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.readers.allowed import snapshot_globals
from lora_diffusion_jax.readers.machine import (
    Budget,
    Corrupt,
    Cursor,
    Instance,
    Machine,
    Refused,
)
from lora_diffusion_jax.readers.tensors import Tensor, containers
from lora_diffusion_jax.readers.torch_files import LEGACY_HEAD, ZIP_MAGIC, read_torch

MAX_DEPTH = 32  # modules inside modules
MAX_MODULES = 20_000
SLACK = 16 << 20  # bytes that small files may take beyond their size


@dataclasses.dataclass(frozen=True, repr=False)
class ModuleNode:
    """A module or object of a snapshot, as inert data.

    Attributes:
        class_name: such as EDMPrecond or UNetBlock.
        attributes: plain values by name, such as `dropout`.
        init_kwargs: keyword arguments of its constructor; None if they were not recorded.
        init_args: positional ones.
        params: parameters of this module itself.
        buffers: its persistent buffers.
        children: submodules by name, in order.
    """

    class_name: str
    attributes: dict[str, Any]
    init_kwargs: dict[str, Any] | None
    init_args: tuple
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    children: dict[str, "ModuleNode"]

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "ModuleNode"]]:
        """Yields (dotted name, module) of this module and all below it, in PyTorch's order."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.walk(f"{prefix}.{name}" if prefix else name)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Parameters and buffers by their official dotted names, in PyTorch's order."""
        return {
            f"{prefix}.{name}" if prefix else name: array
            for prefix, module in self.walk()
            for name, array in (*module.params.items(), *module.buffers.items())
        }


SNAPSHOT = (
    "an EDM network snapshot, such as network-snapshot-200000.pkl or edm-cifar10-32x32-cond-vp.pkl"
)


def read_snapshot(path: str | Path, expected: str = SNAPSHOT) -> ModuleNode:
    """Reads the network with averaged weights of an EDM snapshot, without running anything.

    Args:
        path: a `network-snapshot-*.pkl`, or one of the published files.
        expected: what is expected of a file that is none, where other kinds are taken too.

    Raises:
        UserError: one line that names the file and what was found in it.
    """
    with _refusing(path, expected):
        data, budget = _map(path)
        if bytes(data[:4]) == ZIP_MAGIC:
            raise Refused(f"is {describe(data)} (a training state has no averaged weights)")
        if bytes(data[:1]) != b"\x80":
            raise Refused(f"is {describe(data)}")
        cursor = Cursor(data)
        value = Machine(cursor, snapshot_globals(budget), budget).run()
        if type(value) is int:
            raise Refused("is a PyTorch file (.pt), not a network snapshot")
        if cursor.left:
            raise Corrupt(f"{cursor.left} bytes follow its end")
        if type(value) is not dict:
            raise Refused(f"holds a {type(value).__name__}, not a snapshot's dict")
        if type(value.get("ema")) is not Instance:
            raise Refused(f"holds no network under 'ema', but {_names(value)}")
        return _Modules(budget).convert(value["ema"])


def is_torch_file(path: str | Path) -> bool:
    """Whether a file begins as torch.save begins its files, in the zip or the legacy format."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(LEGACY_HEAD)).startswith((ZIP_MAGIC, LEGACY_HEAD))


def read_torch_state_dict(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads a dict of tensors that torch.save wrote, in the zip or the legacy format.

    Args:
        path: a .pt or .pth file.
        key: the entry that holds the state_dict, if the file holds a larger dict.

    Returns:
        Arrays by their names, in the file's order; bfloat16 as ml_dtypes.bfloat16.

    Raises:
        UserError: one line that names the file and what was found in it.
    """
    expected = "a file of tensors by name, as torch.save(model.state_dict(), path) writes it"
    with _refusing(path, expected):
        data, budget = _map(path)
        if bytes(data[:1]) != b"\x80" and bytes(data[:4]) != ZIP_MAGIC:
            raise Refused(f"is {describe(data)}")
        value, left = read_torch(data, containers(budget), budget)
        if left:
            raise Corrupt(f"{left} bytes follow its end")
        return _tensors(value, key, budget)


@contextlib.contextmanager
def _refusing(path: str | Path, expected: str) -> Iterator[None]:
    """Turns Refused into a UserError that names the file and what was expected."""
    try:
        yield
    except Refused as error:
        raise UserError(f"{path} {error}. Nothing in it was run. Expected {expected}.") from None


def describe(data: memoryview | bytes) -> str:
    """What a file that is not a checkpoint seems to be, for error messages."""
    head = bytes(data[:4096])
    if not head:
        return "an empty file"
    if head.lstrip()[:1] == b"<":
        return "a web page or XML (a failed download?)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    for magic, name in {
        b"\x1f\x8b": "a gzip file",
        ZIP_MAGIC: "a zip archive, perhaps a PyTorch file",
    }.items():
        if head.startswith(magic):
            return name
    try:
        return f"a text file that begins with '{printable(head.decode()[:40])}'"
    except UnicodeDecodeError:
        return f"a file of another kind, which begins with the bytes {head[:8].hex(' ')}"


def _map(path: str | Path) -> tuple[memoryview, Budget]:
    """The file's bytes, mapped rather than read, and what reading them may cost."""
    path = Path(path)
    if not path.is_file():
        found = "is a directory or device" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected a checkpoint file.")
    data = memoryview(b"")
    try:
        with path.open("rb") as file:
            if path.stat().st_size:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return data, Budget(tensors=2 * len(data) + SLACK, nested=len(data))


def _tensors(value: Any, key: str | None, budget: Budget) -> dict[str, np.ndarray]:
    if type(value) is not dict:
        raise Refused(f"holds a {type(value).__name__}, not a dict of tensors")
    if key is not None:
        if type(value.get(key)) is not dict:
            raise Refused(f"has no dict named {key!r}, but {_names(value)}")
        value = value[key]
    others = [k for k, item in value.items() if type(k) is not str or type(item) is not Tensor]
    if others:
        raise Refused(f"holds more than tensors by name: {_names(others)}")
    return {name: tensor.array(budget) for name, tensor in value.items()}


def _names(value: Collection) -> str:
    names = [printable(name) for name in list(value)[:6]]
    return ", ".join(names) + (", ..." if len(value) > 6 else "") if names else "nothing"


class _Modules:
    """Turns instances into `ModuleNode`, within limits on their number and nesting."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._left = MAX_MODULES

    def convert(self, value: Any, depth: int = 0) -> ModuleNode:
        if type(value) is not Instance:
            raise Corrupt(f"a {type(value).__name__} in the place of a module")
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise Corrupt("modules that contain themselves, or too many")
        state = value.state or {}
        if type(state) is not dict:
            raise Corrupt(f"a {printable(value.class_name)} whose state is not a dict")
        self._budget.spend(
            "work", len(state)
        )  # its attributes are copied wherever it is referred to
        hidden = self._names(state.get("_non_persistent_buffers_set") or set())
        children = self._items(state, "_modules")
        kwargs, args = state.get("_init_kwargs"), state.get("_init_args")
        return ModuleNode(
            class_name=value.class_name,
            attributes={
                name: item
                for name, item in state.items()
                if type(name) is str and not name.startswith("_")
            },
            init_kwargs=kwargs if type(kwargs) is dict else None,
            init_args=args if type(args) is tuple else (),
            params=self._arrays(self._items(state, "_parameters")),
            buffers=self._arrays(
                {k: v for k, v in self._items(state, "_buffers").items() if k not in hidden}
            ),
            children={k: self.convert(v, depth + 1) for k, v in children.items() if v is not None},
        )

    def _items(self, state: dict, field: str) -> dict[str, Any]:
        """Entries of a module's registry, whose names must make unambiguous paths."""
        items = state.get(field) or {}
        if type(items) is not dict:
            raise Corrupt(f"{field} is not a dict")
        self._budget.spend("work", len(items))
        self._names(items)
        return items

    def _names(self, names: Any) -> Any:
        if any(type(name) is not str or not name or "." in name for name in names):
            raise Corrupt("a module or tensor without a valid name")
        return names

    def _arrays(self, items: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {}
        for name, item in items.items():
            if item is None:
                continue
            if type(item) is not Tensor:
                raise Corrupt(f"{printable(name)} is a {type(item).__name__}, not a tensor")
            arrays[name] = item.array(self._budget)
        return arrays
