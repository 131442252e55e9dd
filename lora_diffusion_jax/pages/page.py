"""index.html: one page that shows runs, with nothing from elsewhere."""

import base64
import functools
import hashlib
import itertools
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from lora_diffusion_jax import files
from lora_diffusion_jax.pages import tables
from lora_diffusion_jax.pages.collect import COMPARISON, Run, Source, collect, pictures, spreads

FILES = ("index.html", "table.csv", "table.md")
_HERE = Path(__file__).parent


def write(directory: Path, title: str, sources: Sequence[Source]) -> list[Run]:
    """Writes FILES into a directory: a page of runs, and its table in two plain forms.

    Returns:
        What is shown of the runs.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    runs = [collect(source) for source in sources]
    table = tables.make_table(runs)
    texts = (render(directory, title, runs, table), tables.to_csv(table), tables.to_markdown(table))
    with files.disk_errors(directory):
        for name, text in zip(FILES, texts, strict=True):
            files.write_text(directory / name, text)
    return runs


def render(directory: Path, title: str, runs: Sequence[Run], table: tables.Table) -> str:
    """The page as HTML; grids of samples are links relative to `directory`."""
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    return _template().render(
        title=title,
        policy=_policy(style, script),
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        runs=runs,
        table=table,
        numeric={
            title
            for row in table.rows
            for title, cell in zip(table.titles, row, strict=True)
            if cell.number is not None
        },
        spreads=[(_label(s.changes), s) for s in spreads(runs)],
        number=lambda number: tables.number_cell(number).text,
        grids=[(run, _link(directory, run, run.samples)) for run in runs if run.samples],
        comparison=[_quoted(path) for path in pictures(directory, COMPARISON)],
        analyses=[
            (run, [_link(directory, run, path) for path in run.pictures])
            for run in runs
            if run.pictures
        ],
        data=_data(runs),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((_HERE / "page.html").read_text())


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: these two texts, images beside the page, nothing else."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _label(changes: Any) -> str:
    return ", ".join(f"{field}={value}" for field, value in changes.items()) or "all runs"


def _link(directory: Path, run: Run, name: str) -> str:
    """A link from the page to a file of a run."""
    return _quoted((run.source.directory / name).relative_to(directory).as_posix())


def _quoted(path: str) -> str:
    return "./" + urllib.parse.quote(path)


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script needs: the curves, and whether more is to come."""
    names = dict.fromkeys(itertools.chain.from_iterable(run.curves for run in runs))
    first = [name for name in names if name == "train/loss" or name.startswith("eval/")]
    return {
        "metrics": first + [name for name in names if name not in first],
        "runs": [{"name": run.source.name, "curves": run.curves} for run in runs],
        "running": any(run.source.state in ("running", "waiting", "submitted") for run in runs),
    }
