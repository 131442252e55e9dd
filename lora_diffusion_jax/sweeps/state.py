"""What is known of a sweep: sweep.json, and what its runs' directories say."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.grids import Changes
from lora_diffusion_jax.training import checkpoint, workdir
from lora_diffusion_jax.training.writers import read_metrics
from lora_diffusion_jax.untrusted import read_json

FILE = "sweep.json"
STATES = ("waiting", "submitted", "running", "stopped", "failed", "done")
_ADVICE = "Restore it, or remove it and run the sweep's command again: its runs go on."


@dataclasses.dataclass
class Entry:
    """What sweep.json holds of a run.

    Attributes:
        changes: the fields in which it departs from the sweep's config.
        command: a program and its arguments.
        state: one of STATES, as the sweep last saw it.
        detail: the last lines of a run that failed, or whose last job did, or who else is running it.
        job: the number of a batch system's job, or ''.
        listed: whether the sweep still asks for this run.
    """

    changes: Changes
    command: list[str]
    state: str = "waiting"
    detail: str = ""
    job: str = ""
    listed: bool = True

    @property
    def shell_command(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)


def read(directory: Path) -> dict[str, Entry]:
    """The runs in a sweep's file by name; none if there is no file.

    Raises:
        UserError: it is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    found = read_json(path, infinite=True, advice=_ADVICE)
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, dict):
        raise UserError(f"{path} holds no runs. {_ADVICE}")
    return {name: _entry(path, name, fields) for name, fields in runs.items()}


def _entry(path: Path, name: str, fields: Any) -> Entry:
    try:
        entry = Entry(**fields)
    except TypeError:
        entry = None
    kinds = {"changes": dict, "command": list, "state": str, "detail": str, "job": str}
    if (
        entry is None
        or name != Path(name).name
        or name in ("", ".", "..")
        or not all(isinstance(getattr(entry, field), kind) for field, kind in kinds.items())
        or not all(isinstance(word, str) for word in entry.command)
        or entry.state not in STATES
    ):
        raise UserError(
            f"{path} describes the run {name!r} in a way that no sweep writes. {_ADVICE}"
        )
    entry.changes = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.changes.items()}
    return entry


def write(directory: Path, runs: Mapping[str, Entry]) -> None:
    """Writes the file that `read` reads, whole or not at all."""
    record = {"runs": {name: dataclasses.asdict(entry) for name, entry in runs.items()}}
    with files.disk_errors(directory):
        files.write_text(directory / FILE, json.dumps(record, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is, from its metrics.jsonl.

    Attributes:
        images: seen, as of its last line; 0 before the first.
        values: by metric name, the newest of each.
    """

    images: int = 0
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


class Watcher:
    """Reads the progress of runs; a file is read again only when it has changed."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[tuple[int, int], Progress]] = {}

    def look(self, directory: Path) -> Progress:
        """The progress of the run in a directory."""
        path = directory / "metrics.jsonl"
        try:
            found = path.stat()
        except OSError:
            return Progress()
        stamp = (found.st_mtime_ns, found.st_size)
        if self._seen.get(path, (None,))[0] != stamp:
            self._seen[path] = stamp, _progress(directory)
        return self._seen[path][1]


def _progress(directory: Path) -> Progress:
    images, values = 0, dict[str, float | None]()
    for line in read_metrics(directory):
        values |= {name: value for name, value in line.items() if "/" in name}
        images = line.get("images", images)
    return Progress(images, values)


def is_done(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run in a directory has trained to its end, drawn its samples and been evaluated."""
    train, steps = config["train"], checkpoint.saved_steps(directory)
    if not steps or steps[-1] * train["batch_size"] < train["total_images"]:
        return False
    last = [line for line in read_metrics(directory) if line["step"] == steps[-1]]
    evaluation, data = config["eval"], config["data"]
    # Training images of a folder or ZIP have nothing beside them to be compared with, arrays no features.
    compared = evaluation["reference"] or data["eval_path"] or data["name"]
    compared = compared and not data.get("floats") and data.get("channels", 0) in (0, 1, 3)
    wanted = {"samples"} | ({"eval"} if evaluation["num_samples"] and compared else set())
    return wanted <= {line.get("callback") for line in last}


def holder(directory: Path) -> str:
    """The process that is at work on the run in a directory, as its lock says; '' if there is none."""
    if not (directory / workdir.LOCK).exists():
        return ""
    try:
        with files.Lock(directory / workdir.LOCK, taken="{holder}"):
            return ""
    except files.TakenError as error:
        return str(error)
