"""What a run logs, at Weights & Biases too."""

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files, processes
from lora_diffusion_jax.errors import UserError, choose, needs_package, printable
from lora_diffusion_jax.training.writers import Sink, log
from lora_diffusion_jax.untrusted import read_file, reason

ID = "wandb_id"  # file in a workdir: the run there, so that resuming goes on with it
FOLDER = "wandb"  # in a workdir: what the package keeps, and offline runs
MODES = ("", "online", "offline")
_FINISH_SECONDS = 60.0  # after a run, for what is still to be sent


def wandb_sink(
    directory: Path,
    config: Mapping[str, Any],
    *,
    project: str,
    entity: str = "",
    mode: str = "",
) -> "WandbSink":
    """Begins a run at Weights & Biases, or goes on with the one of this workdir.

    Only process 0 calls this.

    Args:
        directory: the workdir.
        config: of the run, shown there.
        project: where the run appears.
        entity: a team or user; '' is the default of the account.
        mode: online, or offline: `wandb sync DIR/wandb/offline-run-*` sends it later; '' is what
            $WANDB_MODE says, else online.

    Raises:
        UserError: the package is missing, there is no login, or the server does not answer.
    """
    wandb = check_wandb(mode)
    path = directory / ID
    with files.disk_errors(directory):
        if not path.exists():
            files.write_text(path, secrets.token_hex(4) + "\n")
        identity = read_file(path, 100).decode(errors="replace").strip()
        files.make_folder(directory / FOLDER, directory)
    try:
        run = wandb.init(
            project=project,
            entity=entity or None,
            name=directory.name,
            id=identity,
            resume="allow",
            mode=mode or None,
            dir=str(directory),
            config=dict(config),
            # Training prints for itself, and its code and packages are its owner's.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False
            ),
        )
    except Exception as error:  # wandb raises what its service and its libraries do
        raise UserError(
            f"Weights & Biases did not begin a run ({printable(reason(error), 200)}). Log in with `wandb "
            "login`, check the network, or set log.wandb_mode=offline; log.wandb_project='' leaves it out."
        ) from error
    where = f"{directory / FOLDER}; `wandb sync` sends it later" if run.offline else run.url
    log(f"Weights & Biases: run {identity} of {project}, {where}")
    return WandbSink(wandb, run)


def check_wandb(mode: str) -> Any:
    """The package; UserError if it is not installed or there is no such mode."""
    choose("log.wandb_mode", mode, MODES)
    try:
        import wandb
    except ModuleNotFoundError as error:
        wanted = needs_package("log.wandb_project", error.name, "train,eval,wandb")
        raise UserError(f"{wanted}, or leave log.wandb_project empty.") from error
    return wandb


class WandbSink(Sink):
    """A run at Weights & Biases. A failure of it is told once, and ends it, but not the training."""

    def __init__(self, wandb: Any, run: Any):
        self._wandb, self._run = wandb, run
        # What a run that was killed sent after its last checkpoint is there; its repetition is the same.
        self._next = int(getattr(run, "starting_step", 0))

    def write(self, images: int, step: int, values: Mapping[str, Any]) -> None:
        """Sends numbers, and pictures uint8 [H, W, C], at their number of images."""
        if images < self._next:
            return
        self._try(lambda: self._run.log(self._converted(step, images, values), step=images))

    def close(self, failed: bool) -> None:
        """Sends what is left, for at most a minute."""
        finish = functools.partial(self._try, lambda: self._run.finish(exit_code=int(failed)))
        sending = threading.Thread(target=finish, daemon=True)
        sending.start()
        sending.join(_FINISH_SECONDS)
        if sending.is_alive():
            self._fail("it takes too long to send the rest; `wandb sync` sends it later")

    def _converted(self, step: int, images: int, values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"step": step, "images": images}
        for name, value in values.items():
            picture = np.asarray(value)
            if picture.ndim:
                flat = picture[..., 0] if picture.shape[-1] == 1 else picture
                found[name] = self._wandb.Image(flat)
            else:
                found[name] = float(picture)
        return found

    def _try(self, send: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            send()
        except Exception as error:  # its service may have died, or the disk be full
            self._fail(reason(error))

    def _fail(self, why: str) -> None:
        self._run = None
        log(
            f"warning: Weights & Biases failed ({printable(why, 200)}); the training goes on without it, and "
            "all is in metrics.jsonl"
        )
        with contextlib.suppress(Exception):
            self._wandb.teardown()  # else it raises when the program exits


def open_sinks(
    directory: Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[Sink]:
    """The sinks that the fields of `config.log` ask for; none in processes other than 0.

    Raises:
        UserError: in every process, if process 0 cannot open one.
    """
    found: list[Sink] = []

    def opening() -> None:
        if settings["wandb_project"]:
            names = ("project", "entity", "mode")
            chosen = {name: settings[f"wandb_{name}"] for name in names}
            found.append(wandb_sink(directory, config, **chosen))

    processes.from_leader("opening what is logged to", opening)
    return found
