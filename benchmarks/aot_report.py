"""TPU chips, the roofline of a compiled program, and the table of docs/scaling.md.

python -m benchmarks.aot_report docs/aot.jsonl
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A TPU chip's published rates per second."""

    compute: float  # bfloat16 operations
    memory: float  # bytes read from and written to HBM
    network: float  # bytes sent over all links: half of the bidirectional figure


# Google Cloud's pages of the system architecture, read in 2026: docs.cloud.google.com/tpu/docs/v4,
# .../v5e, .../v5p, .../v6e. A v4 chip's two cores act as one device (megacore), as on the machines.
CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9),
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1640e9, 400e9),
}


def bound(
    topology: str, used: Chip, chips: int, images: int, model_flops: float
) -> dict[str, dict[str, Any]]:
    """The roofline of a program on a number of chips, which handles `images` on all of them.

    `used` are the operations and bytes of one chip. MFU = images / s * model_flops / (chips * peak),
    with the operations that the network itself needs for an image, without recomputation.
    """
    chip = CHIPS[topology.partition(":")[0]]
    seconds = {name: getattr(used, name) / getattr(chip, name) for name in Chip._fields}
    slowest = max(seconds, key=seconds.__getitem__)
    rate = images / seconds[slowest]
    predicted = {"images_per_sec": rate, "mfu": rate * model_flops / (chips * chip.compute)}
    return {"roofline": {"seconds": seconds, "bound": slowest}, "predicted": predicted}


HEAD = (
    "| config | program | topology | mesh | batch (a chip) | changed "
    "| HBM: state + temporaries = peak, GiB | GFLOP a chip | collectives, MB "
    "| bound: ms | img/s at most | MFU at most |\n" + "| --- " * 12 + "|\n"
)


def table(path: str | Path) -> str:
    """Markdown of a file of measurements, sorted by config, program, generation and chips."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows.sort(key=lambda r: (r["config"], r["program"] != "step", r["topology"][:3], r["chips"]))
    return HEAD + "\n".join(f"| {' | '.join(_cells(row))} |" for row in rows)


def _cells(row: Mapping[str, Any]) -> list[str]:
    shown = ("dtype=bfloat16", "train.batch_size", "sampler.batch_size", "mesh.")
    changed = [o for o in row["overrides"] if not o.startswith(shown)]
    changed += ["fused attention"] * row.get("fused_attention", False)
    batch = f"{row['batch']:,} ({row['batch'] / row['chips']:g})"
    mesh = "x".join(map(str, row["mesh"].values()))
    gib = [f"{row['hbm'][name] / 2**30:.2f}" for name in ("arguments", "temporaries", "peak")]
    sent = sorted(row["collectives"].items())
    slowest = row["roofline"]["bound"]
    return [
        *(row["config"], row["program"], row["topology"], mesh, batch, ", ".join(changed) or "-"),
        "{} + {} = {}".format(*gib),
        f"{row['flop']['xla_per_device'] / 1e9:,.0f}",
        ", ".join(f"{k} {c['count']:.0f}: {_round(c['bytes'] / 1e6)}" for k, c in sent) or "none",
        f"{slowest}: {_round(row['roofline']['seconds'][slowest] * 1e3)}",
        _round(row["predicted"]["images_per_sec"]),
        f"{row['predicted']['mfu']:.0%}",
    ]


def _round(value: float) -> str:
    """Three significant digits."""
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


if __name__ == "__main__":
    print(table(sys.argv[1]))
