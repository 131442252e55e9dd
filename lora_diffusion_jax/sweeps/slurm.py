"""Runs of a sweep as an array of Slurm jobs, by submitit."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError, needs_package
from lora_diffusion_jax.sweeps import local, state

FAILED = "failed.txt"  # in a run's directory: how its last job failed, if it did
FOLDER = "slurm"  # of a sweep: what submitit needs, and what the jobs print
_CLUSTERS = ("slurm", "local")
_GENERIC = (  # submitit's own names; all others are options of sbatch
    *("name", "timeout_min", "mem_gb", "nodes", "tasks_per_node", "cpus_per_task"),
    *("gpus_per_node", "stderr_to_stdout"),
)


class Job:
    """What a job does: it makes one run, in a process of its own.

    Before Slurm takes the machine away, or at its time limit, submitit calls `checkpoint`: the run saves and
    ends, and the job goes back into the queue.
    """

    def __init__(self, command: Sequence[str], directory: str, name: str):
        self.command, self.directory, self.name = list(command), directory, name
        self.pid: int | None = None

    def __call__(self) -> None:
        """Returns when the run is over; an error if it failed."""
        folder = Path(self.directory) / self.name
        (folder / FAILED).unlink(missing_ok=True)
        child = local.start(self.command, Path(self.directory), self.name, {})
        self.pid = child.process.pid
        while (status := child.process.poll()) is None:
            time.sleep(local.POLL_SECONDS)
        if status:
            text = (
                f"{local.ending(status)}\n{local.last_lines(folder / local.LOG, child.log_start)}"
            )
            files.write_text(folder / FAILED, text + "\n")
            raise RuntimeError(text)

    def checkpoint(self) -> Any:
        """Stops the run, which saves first; returns what is submitted again: the same job."""
        from submitit.helpers import DelayedSubmission

        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            # The signal may have interrupted `poll`, which would wait for itself here.
            while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(local.POLL_SECONDS)
        return DelayedSubmission(Job(self.command, self.directory, self.name))

    __submitit_checkpoint__ = checkpoint  # its name from submitit 1.6 on


def parse_settings(text: str) -> dict[str, Any]:
    """'partition=gpu;timeout_min=600' -> submitit's parameters, and `cluster`.

    Raises:
        UserError: it cannot be read so.
    """
    settings: dict[str, Any] = {}
    for part in filter(str.strip, text.split(";")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name.isidentifier() and equals and value):
            raise UserError(
                f"--slurm: {part.strip()!r} is no setting; write NAME=VALUE and separate settings by "
                "semicolons, for example --slurm='partition=gpu;timeout_min=600;gpus_per_node=1'."
            )
        if name not in ("cluster", *_GENERIC) and not name.startswith("slurm_"):
            name = f"slurm_{name}"
        settings[name] = int(value) if value.isdecimal() else value
    if settings.get("cluster", "slurm") not in _CLUSTERS:
        raise UserError(
            f"--slurm: cluster is {settings['cluster']!r}; it must be slurm, or local, which runs the jobs "
            "on this machine, to try things out."
        )
    return settings


def submit(
    directory: Path,
    entries: Mapping[str, state.Entry],
    settings: Mapping[str, Any],
    jobs: int | None,
) -> list[str]:
    """Submits the runs that are waiting as one array, notes their jobs, and returns their names.

    Args:
        directory: of the sweep.
        entries: its runs.
        settings: of `parse_settings`.
        jobs: how many run at a time; None: as many as Slurm permits.

    Raises:
        UserError: submitit is not installed, does not know a setting, or Slurm refuses the jobs.
    """
    submitit, settings = _submitit(), dict(settings)
    cluster = settings.pop("cluster", "slurm")
    waiting = [n for n, entry in entries.items() if entry.state == "waiting" and entry.listed]
    if jobs is not None:
        settings.setdefault("slurm_array_parallelism", jobs)
    settings.setdefault("name", directory.name)
    try:
        executor = submitit.AutoExecutor(str(directory / FOLDER), cluster=cluster)
        executor.update_parameters(**settings)
        made = [Job(entries[name].command, str(directory), name) for name in waiting]
        found = executor.submit_array(made) if made else []
    except Exception as error:  # submitit raises what its plugins raise
        text = " ".join(str(error).split())
        raise UserError(
            f"submitit could not submit the jobs: {text or type(error).__name__}"
        ) from error
    for name, job in zip(waiting, found, strict=True):
        entries[name].state = "submitted"
        entries[name].job = f"{cluster}:{job.job_id}"
        before = entries[name].detail
        entries[name].detail = f"job {job.job_id}" + (f"; {before}" if before else "")
    return waiting


def is_queued(directory: Path, job: str) -> bool:
    """Whether a job that `submit` noted waits in Slurm's queue or is at work.

    A job of this machine (`local`) is known by its run's lock alone.
    """
    cluster, _, number = job.partition(":")
    if cluster != "slurm" or not number:
        return False
    return not _submitit().SlurmJob(directory / FOLDER, number).done(force_check=True)


def failure(directory: Path, name: str, job: str) -> str:
    """How the job of a run ended that is neither done nor queued, with its last lines; '' without a job.

    Args:
        directory: of the sweep.
        name: of the run.
        job: as `submit` noted it.
    """
    _, _, number = job.partition(":")
    if not number:
        return ""
    folder = directory / name
    if (folder / FAILED).is_file():
        return f"job {number} failed: {(folder / FAILED).read_text(errors='replace').strip()}"
    # Slurm killed it, or it never began: what there is of its output, or of submitit's own.
    for path in (folder / local.LOG, *sorted((directory / FOLDER).glob(f"{number}_*_log.err"))):
        lines = local.last_lines(path).split("\n") if path.is_file() else []
        starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
        if lines := list(filter(None, lines[starts[-1] + 1 :] if starts else lines)):
            return "\n".join([f"job {number} ended before the run did", *lines])
    return f"job {number} ended without a word\nIt may have been cancelled: ask sacct -j {number}"


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        wanted = needs_package("--launcher=slurm", error.name, "train,eval,slurm")
        raise UserError(wanted) from error
    return submitit
