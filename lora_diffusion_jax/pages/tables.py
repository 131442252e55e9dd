"""The table of runs, and its two plain forms: table.csv and table.md."""

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_diffusion_jax.pages.collect import Run, changed_fields, metric_names
from lora_diffusion_jax.training.writers import duration


class Cell(NamedTuple):
    """Text to show, and the number it stands for, by which columns are sorted."""

    text: str
    number: float | None = None


class Table(NamedTuple):
    """Columns by title, and a row of cells for each run."""

    titles: list[str]
    rows: list[list[Cell]]


def make_table(runs: Sequence[Run]) -> Table:
    """A row for each run: changed fields, state, metrics, size, cost, speed, time."""
    fields, metrics = changed_fields(runs), metric_names(runs)
    titles = ["run", *fields, "state", "images", *metrics]
    titles += ["parameters", "GFLOP/img (training)", "img/s", "time"]
    rows = []
    for run in runs:
        changes = run.source.changes
        row = [Cell(run.source.name)]
        row += [value_cell(changes[f]) if f in changes else Cell("") for f in fields]
        row += [Cell(run.source.state), _images(run)]
        row += [number_cell(run.metrics.get(name)) for name in metrics]
        row += [_whole(run.parameters), number_cell(run.gflop), number_cell(run.rate)]
        row += [Cell("") if run.seconds is None else Cell(duration(run.seconds), run.seconds)]
        rows.append(row)
    return Table(titles, rows)


def value_cell(value: Any) -> Cell:
    """A config field's value."""
    return Cell(str(value), float(value) if type(value) in (int, float) else None)


def number_cell(number: float | None) -> Cell:
    """A number to five digits; empty if there is none."""
    return Cell("") if number is None else Cell(f"{number:.5g}", number)


def _whole(number: int | None) -> Cell:
    return Cell("") if number is None else Cell(f"{number:,}", number)


def _images(run: Run) -> Cell:
    of = f" of {run.total:,}" if run.total and run.images < run.total else ""
    return Cell(f"{run.images:,}{of}", run.images)


def to_csv(table: Table) -> str:
    """The table for spreadsheets: numbers in full, text that none takes for a formula."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([_no_formula(title) for title in table.titles])
    for row in table.rows:
        writer.writerow([_no_formula(c.text) if c.number is None else c.number for c in row])
    return file.getvalue()


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_markdown(table: Table) -> str:
    """The table in Markdown; what has a meaning there or in HTML is escaped."""
    rows = [[_plain(cell.text) for cell in row] for row in table.rows]
    lines = [[_plain(title) for title in table.titles], ["---"] * len(table.titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~" else c for c in text)
    return " ".join(escaped.replace("&", "&amp;").split())
