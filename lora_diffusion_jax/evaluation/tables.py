"""Results of several checkpoints and runs side by side: a table, and a plot of each metric."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.evaluation.results import Record, is_score

Runs = Mapping[str, Sequence[Record]]  # results by the run's name, all metrics mixed
_RIGHT = (1, 2, 4, 5)  # columns of numbers


def table(runs: Runs) -> str:
    """Lays out results by run and images seen; the best value of each metric is marked."""
    best_ones = {id(record) for record in best(runs).values()}
    rows = [("run", "images", "step", "metric", "value", "std", "weights", "")]
    for name, results in runs.items():
        rows += [
            (
                name,
                f"{r.get('images_seen') or 0:,}",
                f"{r.get('step') or 0:,}",
                r["metric"],
                f"{r['value']:.6g}",
                f"{r['std']:.2g}" if "std" in r else "",
                str(r.get("weights", "")),
                "<- best" if id(r) in best_ones else "",
            )
            for r in results
        ]
    if len(rows) == 1:
        return "no results"
    return align(rows, _RIGHT)


def align(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows of cells as lines of equal columns; those in `right`, counted from 0, end at one edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, rows))


def best(runs: Runs) -> dict[str, Record]:
    """Returns the best result of every metric: the highest of a score, the lowest of a distance."""
    records = [record for results in runs.values() for record in results]
    found = {}
    for name in {record["metric"] for record in records}:
        choose = max if is_score(name) else min
        found[name] = choose(
            (r for r in records if r["metric"] == name), key=lambda record: record["value"]
        )
    return found


def plot(runs: Runs, metric: str, path: Path) -> None:
    """Plots one metric against images seen, a line per run, the best marked; writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def point(record: Record) -> tuple[float, float]:
        return (record.get("images_seen") or 0) / 1e6, record["value"]

    chosen = {n: [r for r in rows if r["metric"] == metric] for n, rows in runs.items()}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in chosen.items():
        x, y = zip(*sorted(map(point, rows)), strict=True) if rows else ((), ())
        axes.plot(x, y, marker="o", markersize=3, label=name)
    if metric in (top := best(chosen)):
        x, y = point(top[metric])
        axes.plot([x], [y], "*", color="black", markersize=12)
        text = f"best {y:.4g}\nat {x:.3g} M images"
        # Towards the middle of the axes, which it would else run past.
        right, upper = (
            np.mean(limits()) < at for limits, at in ((axes.get_xlim, x), (axes.get_ylim, y))
        )
        place: dict[str, Any] = {
            "ha": "right" if right else "left",
            "va": "top" if upper else "bottom",
        }
        offset = (-8 if right else 8, -8 if upper else 8)
        axes.annotate(text, (x, y), offset, textcoords="offset points", **place)
    axes.set_xlabel("million images seen")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if len(chosen) > 1:
        axes.legend(fontsize="small")
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
