"""Results of a run on disk: appended JSON lines, and the table and plot made of them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.files import replacing
from lora_diffusion_jax.evaluation.report import Record, is_score, to_line

FOLDER = "evaluation"  # inside a workdir
FILE = "results.jsonl"
# What makes two results the same measurement; the code version is not among them.
KEY = (
    "metric",
    "step",
    "weights",
    "seeds",
    "sampler",
    "lora",
    "dtype",
    "detector_hash",
    "reference_hash",
    "repeats",
)


def results_file(workdir: str | os.PathLike[str]) -> Path:
    """Where a run's results are appended."""
    return Path(workdir) / FOLDER / FILE


def append(path: Path, record: Record) -> None:
    """Appends one result; a half line that a crash left stays alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
        with path.open("a") as file:
            file.write(("\n" if torn else "") + to_line(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"Cannot write results to {path}: {error.strerror}.") from error


def read(path: Path) -> list[Record]:
    """Returns all results of a file, none where there is no file; a torn last line is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off by a crash: that measurement is made again
    return found


def key_of(record: Record) -> str:
    """What a record measures, as a text that two records of one measurement share."""
    return to_line({name: record.get(name) for name in KEY})


def table(runs: Mapping[str, Sequence[Record]]) -> str:
    """Lays out results by run and images seen; the best value of each metric is marked.

    Args:
      runs: results by the run's name, all metrics mixed.
    """
    rows = [(name, r) for name, results in runs.items() for r in results]
    if not rows:
        return "no results"
    top = {id(r) for r in best(runs).values()}
    head = ("run", "images", "step", "metric", "value", "std", "weights", "")
    body = [
        (
            name,
            f"{r.get('images_seen') or 0:,}",
            f"{r.get('step') or 0:,}",
            r["metric"],
            f"{r['value']:.6g}",
            f"{r['std']:.2g}" if "std" in r else "",
            str(r.get("weights", "")),
            "<- best" if id(r) in top else "",
        )
        for name, r in rows
    ]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    right = (1, 2, 4, 5)

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), *map(line, body)])


def best(runs: Mapping[str, Sequence[Record]]) -> dict[str, Record]:
    """Returns the best result of every metric: the highest of a score, the lowest of a distance."""
    found: dict[str, Record] = {}
    for record in (r for results in runs.values() for r in results):
        name = record["metric"]
        sign = -1 if is_score(name) else 1
        if name not in found or sign * record["value"] < sign * found[name]["value"]:
            found[name] = record
    return found


def plot(runs: Mapping[str, Sequence[Record]], metric: str, path: Path) -> None:
    """Draws one metric against images seen, a line per run, the best marked; writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = {n: [r for r in rows if r["metric"] == metric] for n, rows in runs.items()}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in chosen.items():
        rows = sorted(rows, key=lambda r: r.get("images_seen") or 0)
        x = [(r.get("images_seen") or 0) / 1e6 for r in rows]
        axes.plot(x, [r["value"] for r in rows], marker="o", markersize=3, label=name)
    top = best(chosen).get(metric)
    if top is not None:
        x, y = (top.get("images_seen") or 0) / 1e6, top["value"]
        axes.plot([x], [y], "*", color="black", markersize=12)
        axes.annotate(
            f"best {y:.4g}\nat {x:.3g} M images", (x, y), (8, 8), textcoords="offset points"
        )
    axes.set_xlabel("million images seen")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if len(chosen) > 1:
        axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
