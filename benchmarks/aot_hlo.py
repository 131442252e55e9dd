"""What XLA's texts say of a compiled program: collectives, traffic to memory, use of memory."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[sufc]\d+)[a-z0-9]*\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Opcodes that move nothing by themselves: names for other buffers, or calls that are walked into.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "custom-call"}
_AS_ONE = ("fusion", "async-start")  # what they call is one piece of work
_SLICES = ("slice", "dynamic-slice", "gather", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # of a constant its value, of a parameter its number


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication between devices.

    Attributes:
        kind: one of KINDS.
        size: bytes of the whole array: what is reduced, or what a gather makes.
        group: devices that take part.
        times: how often a run of the program does it.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def wire(self) -> float:
        """Bytes that each device must send once, by the ring's lower bound (Chan et al. 2007)."""
        share = (self.group - 1) / self.group
        return self.size * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


class Module:
    """A compiled program, read from the text of its HLO.

    Attributes:
        computations: name -> instructions.
        entry: name of the computation that runs.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _instruction(line):
                current.append(instruction)
        if not self.entry:
            raise ValueError("This is not the text of an HLO module: it has no ENTRY.")

    def walk(
        self, name: str | None = None, times: int = 1, fused: bool = False
    ) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, how often it runs, is it in a fusion), from the entry.

        Of a conditional the longest branch counts (a step that is skipped has a short one); a loop of
        unknown length counts once.
        """
        name = name or self.entry
        for instruction in self.computations[name]:
            yield name, instruction, times, fused
            inner = times * self.trips(instruction)
            callees = [c for c in _callees(instruction) if c in self.computations]
            if instruction.opcode == "conditional" and callees:
                callees = [max(callees, key=lambda c: len(self.computations[c]))]
            for callee in callees:
                yield from self.walk(callee, inner, fused or instruction.opcode in _AS_ONE)

    def collectives(self) -> list[Collective]:
        """All communications of one run."""
        found = []
        tables = {n: {i.name: i.type for i in c} for n, c in self.computations.items()}
        for where, instruction, times, _ in self.walk():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            size = sum(type_bytes(tables[where].get(o, "")) for o in instruction.operands)
            group = group_size(instruction.attributes)
            if kind == "all-gather":
                size *= group
            if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPU: one fusion of a reduction and the slice that is kept
            if group > 1 or kind == "collective-permute":
                found.append(Collective(kind, size, group, times))
        return found

    def loop_trips(self) -> int:
        """Rounds of the longest loop; 1 without loops."""
        return max((self.trips(i) for c in self.computations.values() for i in c), default=1)

    def trips(self, instruction: Instruction) -> int:
        """Rounds of a while loop; 1 for anything else, and where that cannot be told.

        XLA notes it, or the condition compares a counter from 0 with its only constant.
        """
        if instruction.opcode != "while":
            return 1
        if known := _TRIPS.search(instruction.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
        lines = self.computations.get(condition[1], []) if condition else []
        limits = [i.attributes for i in lines if i.opcode == "constant" and i.type[:3] == "s32"]
        counts = any("direction=LT" in i.attributes for i in lines)
        return int(limits[0]) if counts and len(limits) == 1 else 1

    def memory_traffic(self) -> int:
        """Bytes that all instructions read from and write to the device's main memory (HBM).

        Every operand and result of an instruction outside of fusions counts once, at its logical
        size, unless its layout places it in on-chip memory, `S(1)`; of what a slice reads only the
        part that it takes counts.
        """
        tables = {n: {i.name: i.type for i in c} for n, c in self.computations.items()}
        total = 0
        for where, i, times, fused in self.walk():
            if not fused and i.opcode not in _FREE and not i.opcode.endswith("-done"):
                operands = [tables[where].get(o, "") for o in i.operands]
                total += times * _traffic(i, operands, self._sliced(i))
        return total

    def _sliced(self, instruction: Instruction) -> set[int]:
        """Numbers of the operands of which an instruction reads no more than it needs."""
        if instruction.opcode in _SLICES:
            return set(range(len(instruction.operands)))
        if instruction.opcode != "fusion":
            return set()
        body = [i for callee in _callees(instruction) for i in self.computations.get(callee, [])]
        numbers = {i.name: int(i.attributes) for i in body if i.opcode == "parameter"}
        uses = [operand for i in body for operand in i.operands]
        taken_from = [i.operands[0] for i in body if i.opcode in _SLICES]
        return {numbers[name] for name in taken_from if name in numbers and uses.count(name) == 1}

    def estimated_cycles(self) -> int:
        """XLA's own estimate of the time of one run, in clock cycles; only generated code has it."""
        found = ((_CYCLES.search(i.attributes), times) for _, i, times, _ in self.walk())
        return sum(int(cycles[1]) * times for cycles, times in found if cycles)

    def recomputed(self) -> int:
        """Instructions that XLA itself chose to compute twice, to fit into memory."""
        return sum(1 for _, i, _, fused in self.walk() if not fused and ".remat" in i.name)


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    kind, rest = _split_type(match[2])
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    inside, attributes = _split_brackets(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = inside if opcode in ("constant", "parameter") else attributes
    return Instruction(match[1], kind, opcode, operands, attributes)


def _split_type(text: str) -> tuple[str, str]:
    """'f32[2]{0} add(...)' or '(f32[], s32[]) tuple(...)' -> (type, rest)."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = _split_brackets(text[1:])
    return f"({inside})", rest.lstrip()


def _split_brackets(text: str) -> tuple[str, str]:
    """The text up to the bracket that closes an open one, and what follows it."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _first(kind: str) -> str:
    """The first array of a type."""
    match = _ARRAY.search(kind)
    return match[0] if match else ""


def _traffic(instruction: Instruction, operands: list[str], sliced: set[int]) -> int:
    """Bytes of main memory that one instruction reads and writes."""
    result, opcode = instruction.type, instruction.opcode
    if opcode == "async-start":  # ((operands), result, flag)
        result = _first(_split_brackets(result[2:])[1])
    elif opcode.removesuffix("-start") in KINDS:
        result = "".join(operands)
    elif opcode.endswith("-start"):  # (result, operand, flag)
        result = _first(result)
    reads = [type_bytes(o, main_memory_only=True) for o in operands]
    reads = [min(r, type_bytes(result)) if n in sliced else r for n, r in enumerate(reads)]
    return sum(reads) + type_bytes(result, main_memory_only=True)


def _callees(instruction: Instruction) -> list[str]:
    if instruction.opcode not in ("fusion", "while", "call", "conditional", "async-start"):
        return []
    named = r"\b(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)"
    found = re.findall(named, instruction.attributes)
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    return found + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])


def type_bytes(kind: str, main_memory_only: bool = False) -> int:
    """Logical bytes of the arrays of a type, without padding."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(kind):
        if main_memory_only and re.search(r"S\([1-9]", layout):
            continue
        width = _BYTES[dtype] if dtype in _BYTES else int(dtype[1:]) / 8
        total += math.prod(int(s) for s in sizes.split(",") if s) * width
    return int(total)


def group_size(attributes: str) -> int:
    """Devices of a communication, from replica_groups in any of its three spellings; else 1."""
    mesh = re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:[^{}]*\{([^}]*)\})?", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'", mesh[2]) if mesh[2] else list(sizes)
        return math.prod(int(sizes[axis]) for axis in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else 1


def sum_by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    """kind -> {count, bytes, wire_bytes} of one run."""
    result: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(int))
    for one in collectives:
        row = result[one.kind]
        row["count"] += one.times
        row["bytes"] += one.times * one.size
        row["wire_bytes"] += round(one.times * one.wire)
    return {kind: dict(row) for kind, row in result.items()}


def memory_use(buffer_assignment: str) -> dict[str, int]:
    """Bytes of main memory by use, from the text of XLA's buffer assignment.

    Returns:
        arguments; aliased: those of them that hold results afterwards, too; outputs: the other
        results; temporaries; constants; and peak, the sum without `aliased`.
    """
    use = dict.fromkeys(("arguments", "aliased", "outputs", "temporaries", "constants"), 0)
    for size, about in re.findall(r"^allocation \d+: size (\d+)(.*)$", buffer_assignment, re.M):
        if re.search(r"\bcolor [1-9]", about) or "thread-local" in about:
            continue  # on-chip memory
        if "parameter " in about:
            use["arguments"] += int(size)
            use["aliased"] += int(size) * ("maybe-live-out" in about)
        elif "preallocated-temp" in about:
            use["temporaries"] += int(size)
        elif "constant" in about:
            use["constants"] += int(size)
        else:
            use["outputs"] += int(size)
    return use | {"peak": sum(use.values()) - use["aliased"]}
