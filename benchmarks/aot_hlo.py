"""Reads XLA's text dumps of a compiled program: communication, memory traffic, memory use."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[sufc]\d+)[a-z0-9]*\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLERS = ("fusion", "while", "call", "conditional", "async-start")
# Opcodes that move nothing themselves: names for other buffers, or calls that are walked into.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "custom-call"}
_SLICES = ("slice", "dynamic-slice", "gather", "async-start")


class Instruction(NamedTuple):
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str  # of a constant its value, of a parameter its number


class Module:
    """A compiled program, parsed from the text of its HLO."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = []
                if header[1]:
                    self.entry = header[2]
            elif match := _LINE.match(line):
                current.append(_instruction(*match.groups()))
        self.types = {n: {i.name: i.type for i in c} for n, c in self.computations.items()}

    def walk(
        self, name: str = "", times: int = 1, fused: bool = False
    ) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, how often it runs, whether in a fusion) from the entry.

        Of a conditional only the longest branch counts (a skipped step has a short one).
        """
        name = name or self.entry
        for i in self.computations[name]:
            yield name, i, times, fused
            callees = self._callees(i)
            if i.opcode == "conditional":
                callees = [max(callees, key=lambda c: len(self.computations[c]))]
            for callee in callees:  # what a fusion or an async-start calls is one piece of work
                one = fused or i.opcode in ("fusion", "async-start")
                yield from self.walk(callee, times * self.trips(i), one)

    def _callees(self, i: Instruction) -> list[str]:
        names = re.findall(r"%([\w.\-]+)", i.attributes) if i.opcode in _CALLERS else []
        return [name for name in names if name in self.computations]

    def loop_trips(self) -> int:
        """Iterations of the longest loop; 1 without loops."""
        return max(self.trips(i) for c in self.computations.values() for i in c)

    def trips(self, instruction: Instruction) -> int:
        """Iterations of a while loop; 1 for anything else, and where it is unknown.

        XLA notes the number, or the condition compares a counter from 0 with its only constant.
        """
        if instruction.opcode != "while":
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
            return int(known[1])
        condition = re.findall(r"condition=%([\w.\-]+)", instruction.attributes)
        lines = self.computations[condition[0]]
        limits = [i.attributes for i in lines if i.opcode == "constant" and i.type[:3] == "s32"]
        counts = any("direction=LT" in i.attributes for i in lines)
        return int(limits[0]) if counts and len(limits) == 1 else 1

    def collectives(self) -> dict[str, dict[str, float]]:
        """Communication of one run: kind -> {count, bytes, wire_bytes}.

        bytes: size of the whole array, what is reduced or what a gather makes. wire_bytes: what each
        device must send, by the lower bound of a ring (Chan et al. 2007).
        """
        result: dict[str, dict[str, float]] = {}
        for where, i, times, _ in self.walk():
            kind, group = i.opcode.removesuffix("-start"), group_size(i.attributes)
            if kind not in KINDS or (group == 1 and kind != "collective-permute"):
                continue
            size = sum(array_bytes(self.types[where].get(o, "")) for o in i.operands)
            size *= group if kind == "all-gather" else 1
            if where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPU: one fusion of a reduction and the slice that is kept
            share = (group - 1) / group
            sent = {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)
            row = result.setdefault(kind, {"count": 0, "bytes": 0, "wire_bytes": 0})
            row["count"] += times
            row["bytes"] += times * size
            row["wire_bytes"] += round(times * size * sent)
        return result

    def memory_traffic(self) -> int:
        """Bytes that all instructions read from and write to main memory (HBM).

        Every operand and result of an instruction outside of fusions counts once, at its logical
        size, unless its layout places it in on-chip memory, `S(1)`. Of an operand that is sliced,
        only the slice counts. Kernels are taken to read and write everything once.
        """
        total = 0
        for where, i, times, fused in self.walk():
            free = i.opcode in _FREE and not is_kernel(i)
            if fused or free or i.opcode.endswith("-done"):
                continue
            operands = [self.types[where].get(o, "") for o in i.operands]
            result = _result(i, operands)
            reads = [array_bytes(o, in_hbm=True) for o in operands]
            for n in self._sliced(i):
                reads[n] = min(reads[n], array_bytes(result))
            total += times * (sum(reads) + array_bytes(result, in_hbm=True))
        return total

    def kernel_flops(self) -> int:
        """Operations of the products of JAX's attention kernels, which XLA does not count.

        A product is one of two matrices in each head, such as the logits q k^T. The forward kernel makes
        two; that of the gradients of k and v, four; that of the gradient of q, three.
        """
        total = 0
        for where, i, times, _ in self.walk():
            if is_kernel(i):
                q = _ARRAY.search(self.types[where][i.operands[0]])
                batch, heads, pixels, channels = map(int, q[2].split(","))
                results = len(_ARRAY.findall(i.type))
                products = 2 if len(i.operands) == 3 else 4 if results == 2 else 3
                total += times * products * 2 * batch * heads * pixels**2 * channels
        return total

    def _sliced(self, i: Instruction) -> list[int]:
        """Numbers of the operands of which an instruction reads only a slice."""
        if i.opcode in _SLICES:
            return list(range(len(i.operands)))
        body = [j for c in self._callees(i) if i.opcode == "fusion" for j in self.computations[c]]
        numbers = {j.name: int(j.attributes) for j in body if j.opcode == "parameter"}
        uses = [operand for j in body for operand in j.operands]
        sources = {j.operands[0] for j in body if j.opcode in _SLICES}
        return [numbers[name] for name in sources if name in numbers and uses.count(name) == 1]


def is_kernel(i: Instruction) -> bool:
    """Whether an instruction calls a kernel written in Pallas."""
    return i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes


def _instruction(name: str, text: str) -> Instruction:
    """Parses 'f32[2]{0} add(%a, %b), ...', or '(f32[], s32[]) tuple(...)' of a tuple type."""
    if text.startswith("("):
        inside, text = _split_brackets(text[1:])
        kind, text = f"({inside})", text.lstrip()
    else:
        kind, _, text = text.partition(" ")
    opcode, _, text = text.partition("(")
    inside, attributes = _split_brackets(text)
    attributes = inside if opcode in ("constant", "parameter") else attributes
    return Instruction(name, kind, opcode, re.findall(r"%([\w.\-]+)", inside), attributes)


def _split_brackets(text: str) -> tuple[str, str]:
    """The text up to the bracket that closes an open one, and what follows it."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _result(i: Instruction, operands: list[str]) -> str:
    """The type of what an instruction writes; asynchronous ones have it among other things."""
    if i.opcode.removesuffix("-start") in KINDS:
        return "".join(operands)
    if i.opcode.endswith("-start"):  # ((operands), result, flag) or (result, operand, flag)
        rest = _split_brackets(i.type[2:])[1] if i.opcode == "async-start" else i.type
        return _ARRAY.search(rest)[0]
    return i.type


def array_bytes(kind: str, in_hbm: bool = False) -> int:
    """Logical bytes of the arrays of a type, without padding; all, or those in main memory."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(kind):
        if not (in_hbm and re.search(r"S\([1-9]", layout)):
            width = _BYTES[dtype] if dtype in _BYTES else int(dtype[1:]) / 8
            total += math.prod(int(s) for s in sizes.split(",") if s) * width
    return int(total)


def group_size(attributes: str) -> int:
    """Devices of a communication, from any of the three notations of replica_groups; else 1."""
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:[^{}]*\{([^}]*)\})?", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'", mesh[2]) if mesh[2] else list(sizes)
        return math.prod(int(sizes[axis]) for axis in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else 1


def memory_use(buffer_assignment: str) -> dict[str, int]:
    """Bytes of main memory, from the text of XLA's buffer assignment.

    Returns:
        arguments; temporaries; and peak, which adds constants and results in buffers of their own.
    """
    found = re.findall(r"^allocation \d+: size (\d+)(.*)$", buffer_assignment, re.M)
    on_chip = re.compile(r"\bcolor [1-9]|thread-local")
    marks = {"arguments": "parameter ", "temporaries": "preallocated-temp", "peak": ""}
    return {
        name: sum(int(size) for size, about in found if mark in about and not on_chip.search(about))
        for name, mark in marks.items()
    }
