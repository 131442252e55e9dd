"""TPU chips, the roofline of a compiled program, and the table of many."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip as its maker states it.

    Attributes:
        peak_flops: bfloat16 operations per second.
        hbm_bytes: main memory.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second that a chip sends over all its links to other chips (half
            of the bidirectional figure).
        clock: cycles per second, from the peak: matrix units x side^2 x 2 x clock.
        dimensions: of the torus of chips.
    """

    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float
    dimensions: int


# Google Cloud's pages of the system architecture, read in 2026: docs.cloud.google.com/tpu/docs/v4,
# .../v5e, .../v5p, .../v6e. A v4 chip's two cores act as one device (megacore), as on the machines.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 1.05e9, 3),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 1.5e9, 2),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 1.75e9, 3),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 400e9, 1.75e9, 2),
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """'v5e:4x4' -> ('v5e', (4, 4)).

    Raises:
        UserError: an unknown generation, or a shape that it does not have.
    """
    generation, _, shape = name.partition(":")
    sizes = shape.split("x")
    if generation not in CHIPS or not all(s.isdecimal() and int(s) for s in sizes):
        raise UserError(
            f"--topology={name} is not a TPU topology; write the generation ({', '.join(CHIPS)}) "
            "and the chips along each axis, for instance v5e:4x4 or v5p:2x2x4."
        )
    if len(sizes) != CHIPS[generation].dimensions:
        raise UserError(
            f"--topology={name}: chips of {generation} form a torus of "
            f"{CHIPS[generation].dimensions} dimensions, but {len(sizes)} sizes are given."
        )
    return generation, tuple(map(int, sizes))


def roofline(
    chip: Chip, flops: float, hbm_bytes: float, wire_bytes: float
) -> tuple[dict[str, float], str]:
    """Least seconds of one run on one chip by each resource, and which is the longest.

    Args:
        chip: its rates.
        flops: operations.
        hbm_bytes: bytes read from and written to its main memory.
        wire_bytes: bytes that it sends to others.
    """
    seconds = {
        "compute": flops / chip.peak_flops,
        "memory": hbm_bytes / chip.hbm_bandwidth,
        "network": wire_bytes / chip.ici_bandwidth,
    }
    return seconds, max(seconds, key=seconds.__getitem__)


def predict(
    chip: Chip, chips: int, images: int, model_flops: float, seconds: float
) -> dict[str, float]:
    """Rate and MFU of a program that makes or trains `images` in `seconds` on all chips.

    MFU = images / s * model_flops / (chips * peak), with the FLOP per image that the network itself
    needs (three forward passes for training; recomputation does not count).
    """
    rate = images / seconds
    return {"images_per_sec": rate, "mfu": rate * model_flops / (chips * chip.peak_flops)}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The measurements in a file of JSON lines; a later one of the same program replaces it."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"--table={path} cannot be read: {error.strerror}.") from error
    found: dict[tuple, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            found[identity(row)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--table={path}: line {number} is not one that this program wrote."
            ) from error
    return list(found.values())


def identity(row: Mapping[str, Any]) -> tuple:
    """What makes a measurement another one than its neighbour."""
    names = ("config", "program", "topology", "batch", "overrides")
    return tuple(json.dumps(row[name], sort_keys=True) for name in names)


COLUMNS = (
    "config",
    "program",
    "topology",
    "mesh",
    "batch (a chip)",
    "changed",
    "HBM: state + temporaries = peak, GiB",
    "fits",
    "GFLOP a chip",
    "collectives, MB",
    "bound: ms",
    "img/s at most",
    "MFU at most",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the measurements, sorted by config, program, generation and chips."""
    ordered = sorted(
        rows,
        key=lambda r: (r["config"], r["program"] != "step", r["topology"][:3], r["chips"]),
    )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, ordered)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    skipped = ("dtype=bfloat16", "train.batch_size", "sampler.batch_size", "mesh.")
    changed = [o for o in row["overrides"] if not o.startswith(skipped)]
    per_chip = row["batch"] / row["chips"]
    start = [
        row["config"],
        row["program"],
        row["topology"],
        "x".join(map(str, row["mesh"].values())),
        f"{row['batch']:,} ({per_chip:g})",
        ", ".join(changed) or "-",
    ]
    if "hbm" not in row:
        needed = row.get("needed", "more than there is")
        return [*start, needed, "no", *["-"] * 5]
    gib = {name: size / 2**30 for name, size in row["hbm"].items()}
    recomputed = " (XLA recomputes)" if row["recomputed_by_xla"] else ""
    collectives = ", ".join(
        f"{kind} {round(c['count'])}: {_round(c['bytes'] / 1e6)}"
        for kind, c in sorted(row["collectives"].items())
    )
    bound = row["roofline"]["bound"]
    return [
        *start,
        f"{gib['arguments']:.2f} + {gib['temporaries']:.2f} = {gib['peak']:.2f}",
        ("yes" if row["fits"] else "no") + recomputed,
        f"{row['flop']['xla_per_device'] / 1e9:,.0f}",
        collectives or "none",
        f"{bound}: {_round(row['roofline']['seconds'][bound] * 1e3)}",
        f"{_round(row['predicted']['images_per_sec'])}",
        f"{row['predicted']['mfu']:.0%}",
    ]


def _round(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{digits}f}"
