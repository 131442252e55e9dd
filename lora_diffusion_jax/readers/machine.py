"""A pickle machine that builds inert data: it imports nothing and calls nothing that a file names.

Python's own unpickler calls whatever a file refers to, and an allow-list of globals leaves other risks
open: attribute access in BUILD, hashing of nested keys, allocation of declared sizes. This machine knows
only the opcodes that data needs, makes lists, dicts, strings and numbers itself, and looks every global
up in a table that the caller provides. A file's size and a `Budget` bound the work and the memory that
it can cause.
"""

import dataclasses
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lora_diffusion_jax.errors import printable

MAX_INT_BYTES = 16  # the longest legitimate integer is PyTorch's ten-byte magic number
# Work beyond the opcode's for an empty set or a view of bytes: 200 bytes from one of the file.
_HEAVY = 3
MAX_KEY = 1 << 20  # integers hash to themselves: large ones could be chosen to collide


class Refused(Exception):  # noqa: N818 - a verdict on a file, not a fault of the program
    """Why a file is not read; public readers turn it into a UserError that names the file."""


class Corrupt(Refused):
    """A file that was damaged, or made to do harm."""

    def __init__(self, reason: str):
        super().__init__(f"is corrupt: {reason}")


@dataclasses.dataclass
class Budget:
    """What reading one file may cost in total.

    Attributes:
        work: opcodes, items copied between containers, and what small objects weigh beyond the usual;
            real snapshots need about 0.2 million.
        text: bytes that strings take in memory, up to four a character.
        tensors: bytes of arrays copied out of storages.
        nested: bytes of files embedded in the file.
    """

    tensors: int
    nested: int
    work: int = 1_000_000
    text: int = 32 << 20

    def spend(self, what: str, amount: int) -> None:
        """Takes `amount` from the budget named `what`.

        Raises:
            Refused: less than that is left.
        """
        left = getattr(self, what) - amount
        if left < 0:
            raise Refused(f"needs more {what} than a file of this size should")
        setattr(self, what, left)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Maker:
    """Stands for a global that a file may call: our function from the arguments to inert data."""

    make: Callable[[tuple], Any]


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Instance:
    """An object whose class is known by name only, with the attributes that were saved."""

    class_name: str
    state: dict[str, Any] | tuple | None = None


class Cursor:
    """Reads forward through bytes without copying them."""

    def __init__(self, data: memoryview):
        self._data = data
        self.position = 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes.

        Raises:
            Corrupt: fewer are left; nothing is allocated before this is known.
        """
        end = self.position + count
        if end > len(self._data):
            raise Corrupt(
                f"{count} bytes declared at byte {self.position}, only "
                f"{len(self._data) - self.position} left"
            )
        chunk = self._data[self.position : end]
        self.position = end
        return chunk

    def number(self, layout: str) -> Any:
        """One number, in `struct` notation."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, limit: int = 256) -> str:
        """ASCII text up to the next line feed, which is consumed."""
        text = bytes(self._data[self.position : self.position + limit])
        length = text.find(b"\n")
        if length < 0:
            raise Corrupt(f"unterminated string at byte {self.position}")
        self.position += length + 1
        return text[:length].decode("ascii")

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self.position


class Machine:
    """Runs one pickle.

    Args:
        cursor: where the pickle begins; afterwards just after its end.
        allowed: (module, name) -> what stands for that global: a `Maker` if it may be called, else any
            inert value.
        budget: shared by all pickles of one file.
        persistent: resolves persistent ids; None if the format has none.
    """

    def __init__(
        self,
        cursor: Cursor,
        allowed: Mapping[tuple[str, str], Any],
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
    ):
        self._cursor = cursor
        self._allowed = allowed
        self._budget = budget
        self._persistent = persistent
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns what the pickle holds.

        Raises:
            Refused: a global or opcode is not allowed, the data is corrupt, or a budget is exceeded.
        """
        while True:
            self._budget.spend("work", 1)
            at = self._cursor.position
            code = self._cursor.take(1)[0]
            if code == pickle.STOP[0]:
                break
            step = _STEPS.get(code)
            if step is None:
                raise Corrupt(f"unexpected pickle opcode {_name(code)} at byte {at}")
            try:
                step(self)
            except (IndexError, KeyError, UnicodeDecodeError) as error:
                raise Corrupt(f"invalid use of pickle opcode {_name(code)} at byte {at}") from error
        if len(self._stack) != 1 or self._outer:
            raise Corrupt(f"the pickle stops early, at byte {at}")
        return self._stack[0]

    # Numbers and strings.

    def _push_long(self, layout: str) -> None:
        count = self._cursor.number(layout)
        if not 0 <= count <= MAX_INT_BYTES:
            raise Corrupt(f"an integer of {count} bytes")
        self._stack.append(int.from_bytes(self._cursor.take(count), "little", signed=True))

    def _push_text(self, layout: str, encoding: str = "utf-8") -> None:
        count = self._cursor.number(layout)
        data = self._cursor.take(count)
        self._budget.spend("text", count)  # before decoding, which may take four times as much
        text = str(data, encoding)
        self._budget.spend("text", sys.getsizeof(text) - count)
        self._stack.append(text)

    def _push_bytes(self, layout: str) -> None:
        self._budget.spend("work", _HEAVY)
        self._stack.append(self._cursor.take(self._cursor.number(layout)))

    # Containers.

    def _push_set(self) -> None:
        self._budget.spend("work", _HEAVY)
        self._stack.append(set())

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:  # a slice would be short without an error
            raise IndexError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, items: list[Any]) -> None:
        _expect(self._stack[-1], list, "APPEND").extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = _expect(self._stack[-1], dict, "SETITEM")
        if len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def _add_items(self) -> None:
        items = self._since_mark()
        _expect(self._stack[-1], set, "ADDITEMS").update(map(check_key, items))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    # Globals and objects.

    def _global(self, module: Any, name: Any) -> None:
        _expect(module, str, "STACK_GLOBAL")
        _expect(name, str, "STACK_GLOBAL")
        if (module, name) not in self._allowed:
            raise Refused(
                f"refers to {printable(f'{module}.{name}')}, which is not on the allow-list"
            )
        self._stack.append(self._allowed[module, name])

    def _global_line(self) -> None:
        self._global(self._cursor.line(), self._cursor.line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _make(self) -> None:
        args, maker = self._stack.pop(), self._stack.pop()
        _expect(args, tuple, "REDUCE")
        self._stack.append(_expect(maker, Maker, "REDUCE").make(args))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, dict):  # an OrderedDict's attributes, such as a state_dict's versions
            _expect(state, dict, "BUILD")
            return
        _expect(target, Instance, "BUILD")
        if target.state is not None:
            raise Corrupt("an object is filled twice")
        target.state = state if type(state) is tuple else _expect(state, dict, "BUILD")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise Corrupt("persistent ids, which this format does not have")
        self._stack.append(self._persistent(self._stack.pop()))

    # The memo.

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _protocol(self) -> None:
        protocol = self._cursor.number("<B")
        if not 2 <= protocol <= 5:
            raise Refused(f"has pickle protocol {protocol}, not 2 to 5")

    def _frame(self) -> None:
        length = self._cursor.number("<Q")
        if length > self._cursor.left:
            raise Corrupt(f"a frame of {length} bytes declared, only {self._cursor.left} left")


def check_key(key: Any) -> Any:
    """Returns a dict key or set member that is cheap to hash and cannot be chosen to collide.

    Raises:
        Corrupt: anything but strings, small integers, booleans and None. Hashing a tuple that holds
            itself many times over would take exponential time.
    """
    if key is None or type(key) in (str, bool) or (type(key) is int and 0 <= key < MAX_KEY):
        return key
    raise Corrupt(f"a {type(key).__name__} as a dictionary key")


def _expect(value: Any, kind: type, opcode: str) -> Any:
    if type(value) is not kind:  # no subclasses: a bool is an int
        raise Corrupt(f"pickle opcode {opcode} on a {type(value).__name__}")
    return value


def _name(code: int) -> str:
    names = {op.code: op.name for op in pickletools.opcodes}
    return names.get(chr(code), f"0x{code:02x}")


def _push(value: Any) -> Callable[[Machine], None]:
    return lambda m: m._stack.append(value)


def _number(layout: str) -> Callable[[Machine], None]:
    return lambda m: m._stack.append(m._cursor.number(layout))


_STEPS: dict[int, Callable[[Machine], None]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: Machine._protocol,
        pickle.FRAME: Machine._frame,
        pickle.MARK: Machine._mark,
        pickle.NONE: _push(None),
        pickle.NEWTRUE: _push(True),
        pickle.NEWFALSE: _push(False),
        pickle.EMPTY_TUPLE: _push(()),
        pickle.BININT: _number("<i"),
        pickle.BININT1: _number("<B"),
        pickle.BININT2: _number("<H"),
        pickle.BINFLOAT: _number(">d"),
        pickle.LONG1: lambda m: m._push_long("<B"),
        pickle.LONG4: lambda m: m._push_long("<i"),
        pickle.SHORT_BINUNICODE: lambda m: m._push_text("<B"),
        pickle.BINUNICODE: lambda m: m._push_text("<I"),
        pickle.BINUNICODE8: lambda m: m._push_text("<Q"),
        pickle.SHORT_BINSTRING: lambda m: m._push_text("<B", "ascii"),  # written by Python 2
        pickle.BINSTRING: lambda m: m._push_text("<I", "ascii"),
        pickle.SHORT_BINBYTES: lambda m: m._push_bytes("<B"),
        pickle.BINBYTES: lambda m: m._push_bytes("<I"),
        pickle.BINBYTES8: lambda m: m._push_bytes("<Q"),
        pickle.EMPTY_LIST: lambda m: m._stack.append([]),
        pickle.EMPTY_DICT: lambda m: m._stack.append({}),
        pickle.EMPTY_SET: Machine._push_set,
        pickle.TUPLE: lambda m: _push(tuple(m._since_mark()))(m),
        pickle.TUPLE1: lambda m: m._tuple(1),
        pickle.TUPLE2: lambda m: m._tuple(2),
        pickle.TUPLE3: lambda m: m._tuple(3),
        pickle.APPEND: lambda m: m._append([m._stack.pop()]),
        pickle.APPENDS: lambda m: m._append(m._since_mark()),
        pickle.SETITEM: Machine._set_item,
        pickle.SETITEMS: lambda m: m._set_items(m._since_mark()),
        pickle.ADDITEMS: Machine._add_items,
        pickle.BINPUT: lambda m: m._put(m._cursor.number("<B")),
        pickle.LONG_BINPUT: lambda m: m._put(m._cursor.number("<I")),
        pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
        pickle.BINGET: lambda m: m._get(m._cursor.number("<B")),
        pickle.LONG_BINGET: lambda m: m._get(m._cursor.number("<I")),
        pickle.GLOBAL: Machine._global_line,
        pickle.STACK_GLOBAL: Machine._stack_global,
        pickle.REDUCE: Machine._make,
        pickle.NEWOBJ: Machine._make,  # nothing here has an __init__ to leave out
        pickle.BUILD: Machine._build,
        pickle.BINPERSID: Machine._persistent_id,
    }.items()
}
