"""Changed fields and final metrics of runs for TensorBoard's HParams tab."""

from collections.abc import Sequence
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from lora_diffusion_jax import files
from lora_diffusion_jax.pages.collect import Run

FOLDER = "hparams"


def write_hparams(directory: Path, runs: Sequence[Run]) -> None:
    """Writes an event file for each run that has metrics into FOLDER, in place of earlier ones."""
    with files.disk_errors(directory):
        for run in runs:
            metrics = {name: value for name, value in run.metrics.items() if value is not None}
            if not metrics:
                continue
            folder = files.make_folder(directory / FOLDER / run.source.name, directory)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            fields = {
                field: value if isinstance(value, bool | int | float | str) else str(value)
                for field, value in run.source.changes.items()
            }
            events = EventsWriter(str(folder / "events"))
            parts = [*summary.hparams(fields, metrics)]
            parts += [summary.scalar(name, value) for name, value in metrics.items()]
            for part in parts:
                events.write_event(Event(step=run.images, summary=part))
            events.close()
