"""Many runs of one config: planned and checked, run or submitted, followed, and shown on a page."""

import argparse
import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_diffusion_jax import cli, files
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.errors import NotThereError, UserError
from lora_diffusion_jax.factory.data import complete, open_source
from lora_diffusion_jax.factory.networks import build_denoiser, check_attention
from lora_diffusion_jax.factory.objectives import build_sampler
from lora_diffusion_jax.modes.train import check_training, may_change, with_defaults
from lora_diffusion_jax.pages import collect, page, tensorboard
from lora_diffusion_jax.sweeps import devices, local, plan, slurm, state
from lora_diffusion_jax.sweeps.display import Display
from lora_diffusion_jax.training import workdir

PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id", "distributed")
PAGE_SECONDS = 10.0  # at least, between two versions of the page while runs are at work


def sweep(args: argparse.Namespace, name: str | None, overrides: Sequence[str]) -> int:
    """Does what --mode=sweep asks for; 1 if a run failed, 128 + the signal's number after a signal.

    Args:
        args: the parsed command line.
        name: of --config.
        overrides: `--config.a.b=value` arguments, for all runs.
    """
    if given := [flag for flag in PROCESS_FLAGS if getattr(args, flag) is not None]:
        raise UserError(
            f"--{given[0]} is for a single run on several machines; a sweep starts its own processes. "
            "Leave it out."
        )
    if name is None:
        raise UserError("--mode=sweep needs --config=FILE.")
    if args.slurm and args.launcher != "slurm":
        raise UserError(
            "--slurm holds settings of --launcher=slurm; give that too, or leave it out."
        )
    directory = Path(args.workdir).absolute()
    if (directory / workdir.CONFIG).exists():
        raise UserError(
            f"{directory} holds a run, and a sweep makes its runs below its directory. Choose another "
            "--workdir."
        )
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    devices.check_jobs(args.jobs)
    slots = devices.slots(args.jobs) if args.launcher == "local" else []
    settings = slurm.parse_settings(args.slurm)
    runs = plan_runs(args, name, overrides, directory)
    if name.endswith(".py"):
        name = str(Path(files.expand(name)).absolute())
    commands = {run.name: plan.command(name, directory, run) for run in runs}
    if args.launcher == "print":
        for run in runs:
            print(shlex.join(commands[run.name]))
        return 0
    with open_sweep(directory) as entries:
        update(directory, entries, runs, commands)
        if args.launcher == "slurm":
            return submit(directory, entries, runs, settings, args.jobs)
        return run_here(directory, entries, runs, slots)


def plan_runs(
    args: argparse.Namespace, name: str, overrides: Sequence[str], directory: Path
) -> list[plan.Run]:
    """The runs that are asked for, checked against all that is known before they start."""
    config, module = cli.load_config(name)
    if args.sweep is None:
        grid = plan.grid_of(module)
    else:
        grid = plan.parse_grid(args.sweep, cli.override(config, overrides))
    named = {run: entry.changes for run, entry in state.read(directory).items()}
    check = Checker(needs_data=args.launcher == "local")
    runs = plan.make_plan(config, overrides, grid, named, check)
    for run in runs:
        check_unchanged(directory / run.name, run.config)
    return runs


class Checker:
    """Refuses a config that cannot be trained here, and fills in what its data set has.

    Args:
        needs_data: whether the data set must be on this machine.
    """

    def __init__(self, *, needs_data: bool):
        self.needs_data = needs_data
        self._sources: dict[str, ImageSource | None] = {}

    def __call__(self, config: ConfigDict) -> ConfigDict:
        check_training(config)
        if (source := self._source(config)) is not None:
            config = complete(config, source)
        check_attention(config)
        build_sampler(config, build_denoiser(config))
        return config

    def _source(self, config: ConfigDict) -> ImageSource | None:
        key = json.dumps(config.data.to_dict(), sort_keys=True)
        if key not in self._sources:
            try:
                self._sources[key] = open_source(config)
            except NotThereError:
                if self.needs_data:
                    raise
                self._sources[key] = None
        return self._sources[key]


def check_unchanged(directory: Path, config: ConfigDict) -> None:
    """Raises UserError if a directory holds a run that this config cannot go on with."""
    if (directory / workdir.CONFIG).exists() and config.data.fingerprint:
        changes = may_change(directory)
        workdir.check_config(directory, config.to_dict(), changes, complete=with_defaults)


@contextlib.contextmanager
def open_sweep(directory: Path) -> Iterator[dict[str, state.Entry]]:
    """Creates and locks a sweep's directory; yields the runs that its file holds."""
    with files.disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    taken = f"Another sweep is at work in {directory} ({{holder}}). Wait for it, or stop it."
    with files.Lock(directory / workdir.LOCK, taken, workdir.this_process()):
        yield state.read(directory)


def update(
    directory: Path,
    entries: dict[str, state.Entry],
    runs: Sequence[plan.Run],
    commands: Mapping[str, list[str]],
) -> None:
    """Brings the runs' states up to date with their directories, and writes the sweep's file.

    Runs that the sweep does not ask for any more stay, and are not started.
    """
    old = dict(entries)
    entries.clear()
    for run in runs:
        entry = old.pop(run.name, None) or state.Entry(run.changes, commands[run.name])
        entries[run.name] = dataclasses.replace(entry, command=commands[run.name], listed=True)
    for name, entry in old.items():
        entries[name] = dataclasses.replace(entry, listed=False)
    configs = {run.name: run.config.to_dict() for run in runs}
    for name, entry in entries.items():
        folder = directory / name
        if name not in configs and (folder / workdir.CONFIG).exists():
            configs[name] = workdir.read_config(folder)
        if holder := state.holder(folder):
            entry.state, entry.detail = "running", holder
        elif name in configs and state.is_done(folder, configs[name]):
            entry.state, entry.detail = "done", ""
        elif entry.job and slurm.is_queued(directory, entry.job):
            entry.state = "submitted"  # its detail may tell of the job before it
        elif entry.listed:
            entry.state, entry.detail = "waiting", slurm.failure(directory, name, entry.job)
        elif entry.state in ("running", "waiting", "submitted"):
            entry.state, entry.detail = "stopped", ""
    state.write(directory, entries)


def submit(
    directory: Path,
    entries: dict[str, state.Entry],
    runs: Sequence[plan.Run],
    settings: Mapping[str, Any],
    jobs: int | None,
) -> int:
    """Submits what is left of a sweep to Slurm; the same command again reports, and submits what failed."""
    for name, entry in entries.items():
        if entry.state == "waiting" and entry.detail:
            print(f"{name}: " + entry.detail.replace("\n", "\n    "))
    submitted = slurm.submit(directory, entries, settings, jobs)
    state.write(directory, entries)
    print(Display(directory, entries, totals(runs)).table())
    write_page(directory, entries)
    print(f"page: {directory / page.FILES[0]}")
    print(f"{len(submitted)} runs were submitted; the same command shows how far they are")
    return 0


def totals(runs: Sequence[plan.Run]) -> dict[str, int]:
    """The images of each run, by name."""
    return {run.name: run.config.train.total_images for run in runs}


def run_here(
    directory: Path,
    entries: dict[str, state.Entry],
    runs: Sequence[plan.Run],
    slots: Sequence[devices.Environment],
) -> int:
    """Runs what is left of a sweep on this machine, and reports."""
    write_page(directory, entries)
    display = Display(directory, entries, totals(runs))
    left = sum(entry.state != "done" and entry.listed for entry in entries.values())
    print(
        f"{len(runs)} runs, {left} of them to do, {len(slots)} at a time, in {directory}",
        flush=True,
    )

    due = time.monotonic() + PAGE_SECONDS

    def changed(states: bool) -> None:
        nonlocal due
        if states:
            state.write(directory, entries)
        display.update()
        if (start := time.monotonic()) > due:
            write_page(
                directory, entries
            )  # reads all runs: at most a tenth of the time goes into it
            due = time.monotonic() + max(PAGE_SECONDS, 10 * (time.monotonic() - start))

    configs = {run.name: run.config.to_dict() for run in runs}
    number = local.Runner(directory, entries, configs, slots, changed).run()
    display.finish()
    tensorboard.write_hparams(directory, write_page(directory, entries))
    print(f"page: {directory / page.FILES[0]}")
    return report(entries, number)


def write_page(directory: Path, entries: Mapping[str, state.Entry]) -> list[collect.Run]:
    """Writes the sweep's page and tables; returns what is shown of the runs."""
    sources = [
        collect.Source(name, directory / name, e.changes, e.state, e.detail, e.shell_command)
        for name, e in entries.items()
    ]
    return page.write(directory, directory.name, sources)


def report(entries: Mapping[str, state.Entry], number: int | None) -> int:
    """Prints why runs failed, and what to do; returns the exit status."""
    listed = {name: entry for name, entry in entries.items() if entry.listed}
    left = sum(entry.state != "done" for entry in listed.values())
    for name, entry in listed.items():
        if entry.state == "failed":
            print(f"\n{name} failed: " + entry.detail.replace("\n", "\n    "))
    if left:
        print(f"\n{left} of {len(listed)} runs are not done; rerun the same command to go on")
    if number is not None:
        return 128 + number
    return 1 if left else 0
