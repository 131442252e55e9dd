"""From a grid to runs: names, configs and commands, all checked before anything starts."""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from lora_diffusion_jax import cli
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.grids import Changes, Grid, over, product

MAX_RUNS = 10_000
_MAX_NAME = 120  # characters of a directory's name; file systems take 255
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
_PAIRS = {")": "(", "]": "[", "}": "{"}


class Text(str):
    """A value as it stands on a command line, where the config's field decides on its type."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its directory.
        changes: the fields in which it departs from the sweep's config.
        overrides: what gives them, and the sweep's own overrides, on a command line.
        config: with all of these applied.
    """

    name: str
    changes: Changes
    overrides: tuple[str, ...]
    config: ConfigDict


def grid_of(module: ModuleType) -> Grid:
    """What the function `sweep(add)` of a config file adds.

    `add` takes the changes of one run, {"lora.rank": 4}, or a grid of them.

    Raises:
        UserError: there is no such function, or it fails.
    """
    if not callable(getattr(module, "sweep", None)):
        raise UserError(
            f"{module.__file__} has no function sweep(add), and --sweep is not given: nothing says what to "
            "vary. Give --sweep='lora.rank=1,2,4;train.seed=0-3', for example."
        )
    grid: Grid = []

    def add(changes: Changes | Iterable[Changes]) -> None:
        grid.extend([changes] if isinstance(changes, dict) else changes)
        for found in grid:
            if not isinstance(found, dict) or not all(isinstance(field, str) for field in found):
                raise TypeError(
                    f"add got {found!r}, expected fields and values: {{'lora.rank': 4}}"
                )

    with cli.config_errors(Path(str(module.__file__))):
        module.sweep(add)
    return grid


def parse_grid(text: str, config: ConfigDict) -> Grid:
    """The product of 'lora.rank=1,2,4;lora.mode=baseline,with_lora;train.seed=0-3'.

    A comma within brackets or quotes separates nothing: model.channel_mult=(1,2),(1,2,2). For an integer
    field, 0-3 is 0,1,2,3.

    Raises:
        UserError: it cannot be read so.
    """
    known = flatten_dict(config.to_dict(), sep=".")
    grids: dict[str, Grid] = {}
    for part in filter(str.strip, _split(text, ";")):
        field, equals, listed = part.partition("=")
        field = field.strip()
        if not (field and equals and listed.strip()):
            raise UserError(
                f"--sweep: {part.strip()!r} is no list of values; write FIELD=VALUE,VALUE and separate "
                "fields by semicolons, for example --sweep='lora.rank=1,2,4;train.seed=0-3'."
            )
        if field in grids:
            raise UserError(f"--sweep gives {field} twice; list all its values once.")
        values = [_unquoted(value.strip()) for value in _split(listed, ",")]
        if field in known and config_path.get_type(field, config) is int:
            values = [number for value in values for number in _numbers(value)]
        grids[field] = over(field, map(Text, values))
    if not grids:
        raise UserError("--sweep is empty; write FIELD=VALUE,VALUE.")
    return product(*grids.values())


def _split(text: str, separator: str) -> list[str]:
    """Splits at a separator outside of brackets and quotes."""
    parts, opened, quote = [""], [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _PAIRS.values():
            opened.append(character)
        elif character in _PAIRS and opened and opened[-1] == _PAIRS[character]:
            opened.pop()
        elif character == separator and not opened:
            parts.append("")
            continue
        parts[-1] += character
    if quote or opened:
        raise UserError(
            f"--sweep: {printable(text)!r} has a bracket or quote that is never closed."
        )
    return parts


def _unquoted(text: str) -> str:
    """A value that stands in quotes as a whole, without them: '' is the empty text."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _numbers(text: str) -> list[str]:
    """'0-3' -> ['0', '1', '2', '3']; other text as it is."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return [text]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MAX_RUNS:
        raise UserError(f"--sweep: {text} is no range of up to {MAX_RUNS:,} numbers; write 0-3.")
    return [str(number) for number in range(first, last + 1)]


def make_plan(
    config: ConfigDict,
    overrides: Sequence[str],
    grid: Grid,
    named: Mapping[str, Changes],
    check: Callable[[ConfigDict], ConfigDict],
) -> list[Run]:
    """The runs of a grid, in its order.

    Args:
        config: of the file, without overrides.
        overrides: `--config.a.b=value` arguments that all runs share.
        grid: what they do not share.
        named: runs that have names already, from an earlier sweep; a run keeps its name.
        check: refuses a config that cannot be trained, and completes it.

    Raises:
        UserError: a field does not exist or has a value of another type, a config is refused, two runs
            are the same, or there are none.
    """
    if not 0 < len(grid) <= MAX_RUNS:
        raise UserError(f"The sweep has {len(grid):,} runs; expected 1 to {MAX_RUNS:,}.")
    shared = {argument.removeprefix("--config.").partition("=")[0] for argument in overrides}
    fields = flatten_dict(config.to_dict(), sep=".")
    names = {key_of(changes): name for name, changes in named.items()}
    taken = {name.casefold() for name in named}
    runs: list[Run] = []
    same: dict[str, str] = {}  # a config's text -> the run that has it
    for asked in grid:
        if both := shared & asked.keys():
            raise UserError(
                f"{min(both)} is both swept over and overridden for all runs; leave one of the two out."
            )
        given = (*overrides, *(_argument(field, value) for field, value in asked.items()))
        changed = cli.override(config, given)
        changes = {field: config_path.get_value(field, changed) for field in asked}
        _check_values(asked, changes)
        name = names.get(key_of(changes)) or new_name(changes, fields, taken)
        taken.add(name.casefold())
        text = json.dumps(changed.to_dict(), sort_keys=True)
        if text in same:
            raise UserError(
                f"The sweep asks for the same config twice, as {same[text]} and as "
                f"{_name(changes, fields)}; leave one out."
            )
        same[text] = name
        try:
            runs.append(Run(name, changes, given, check(changed)))
        except UserError as error:
            raise UserError(f"Run {name}: {error} Nothing was started.") from error
    return runs


def _argument(field: str, value: Any) -> str:
    """The override that gives a field a value of Python, or one that is text already."""
    if value is None:
        raise UserError(
            f"The sweep sets {field} to None, which no command line can; leave {field} out of that run."
        )
    return f"--config.{field}={tuple(value) if isinstance(value, list) else value}"


def _check_values(asked: Changes, found: Changes) -> None:
    """Refuses values of Python that only look like the field's type once they are text."""
    for field, value in asked.items():
        wanted = tuple(value) if isinstance(value, list) else value
        kinds = {type(wanted), type(found[field])}
        alike = len(kinds) == 1 or kinds == {int, float}  # 1 for 1.0
        if not (isinstance(value, Text) or (alike and wanted == found[field])):
            raise UserError(
                f"The sweep sets {field} to {printable(value)}; expected a value of type "
                f"{type(found[field]).__name__}."
            )


def key_of(changes: Changes) -> str:
    """Changes as text that does not depend on their order, nor on whether they come from JSON."""
    return json.dumps(changes, sort_keys=True)


def new_name(changes: Changes, fields: Mapping[str, Any], taken: set[str]) -> str:
    """A name that no other run has, even where a file system ignores case."""
    name = _name(changes, fields)
    if name.casefold() not in taken:
        return name
    return f"{name}-{hashlib.sha256(key_of(changes).encode()).hexdigest()[:6]}"


def _name(changes: Changes, fields: Mapping[str, Any]) -> str:
    """'rank=4,mode=baseline': each changed field by its last word if that names no other field."""
    last = collections.Counter(field.rpartition(".")[2] for field in fields)
    parts, exact = [], True
    for field, value in changes.items():
        word = field.rpartition(".")[2]
        text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
        safe = _UNSAFE.sub("-", text)
        exact &= safe == text
        parts.append(f"{word if last[word] == 1 else field}={safe}")
    name = ",".join(parts) or "base"
    if exact and len(name) <= _MAX_NAME:
        return name
    return f"{name[:_MAX_NAME]}-{hashlib.sha256(key_of(changes).encode()).hexdigest()[:6]}"


def command(config: str, directory: Path, run: Run) -> list[str]:
    """The command that makes a run, with this interpreter: a program and its arguments."""
    return [
        *cli.program(),
        "--mode=train",
        f"--config={config}",
        f"--workdir={directory / run.name}",
        *run.overrides,
    ]
