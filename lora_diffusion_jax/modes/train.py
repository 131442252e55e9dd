"""Training a config in a workdir: what is built, where it starts from, what it shows on the way."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import (
    default_config,
    files,
    generate,
    interop,
    lora,
    outputs,
    processes,
    remote,
)
from lora_diffusion_jax.array_types import Key, PyTree, Variables
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.evaluator import for_training
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.data import build_batches, complete, open_heldout, open_source
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    forward_flops,
    ignored_inputs,
    init_variables,
    is_pictures,
    resolved,
    variable_shapes,
)
from lora_diffusion_jax.factory.pretrained import config_from_dict, start_from
from lora_diffusion_jax.factory.training import (
    build_cadence,
    build_generator,
    build_mesh,
    build_optimizer,
    build_step,
    metrics_type,
    trainable,
)
from lora_diffusion_jax.keys import INIT, purpose_key
from lora_diffusion_jax.modes.checkpoints import has_checkpoint
from lora_diffusion_jax.pages import collect, page
from lora_diffusion_jax.paths import split
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.sweeps import state as sweep_state
from lora_diffusion_jax.training import checkpoint, loop, state, workdir
from lora_diffusion_jax.training.wandb_sink import check_wandb, open_sinks
from lora_diffusion_jax.training.writers import COMMAND, log

# Fields that may change when a run is resumed: they decide how long it goes on, how it is computed,
# and what is shown and kept, but not what it learns.
RESUMABLE_CHANGES = (
    *("train.total_images", "train.*_every", "train.keep", "train.max_nonfinite"),
    *("train.microbatch", "train.remat", "mesh.*", "sampler.*", "eval.*", "init_from"),
    *("guidance.*", "lora.scale", "lora.interval", "lora.scaled"),
    *("data.name", "data.data_dir", "data.path", "data.eval_*"),  # the fingerprint must agree
    *("data.workers", "data.memory_limit_gib", "data.class_names", "log.*"),
)
# An imported network's config decides its architecture alone; these are open until it is first trained.
OPEN_AFTER_IMPORT = (
    *("train.*", "augment.p", "dtype", "model.*dropout"),
    *(
        "data.fingerprint",
        "data.image_width",
        "data.split",
        "data.class_folders",
        "data.background",
    ),
)


def train(config: ConfigDict, directory: str | os.PathLike, command: str = "") -> loop.Result:
    """Trains a config in a workdir, or resumes the run that is there.

    Args:
        config: of the run.
        directory: its workdir.
        command: what is being done, as a shell takes it; for the run's page.

    Raises:
        UserError: the config, its data or the workdir cannot be used.
    """
    check_training(config)
    source = open_source(config)
    config = complete(config, source)
    denoiser, mesh = build_denoiser(config), build_mesh(config)
    for words in filter(None, (ignored_inputs(config), scale_note(config, source))):
        log(words)
    # All that may fail is built before the workdir is touched.
    run = functools.partial(
        loop.train,
        init=initial_state(config, denoiser, directory),
        step_fn=build_step(config, denoiser, mesh),
        batches=build_batches(config, source, mesh),
        mesh=mesh,
        cadence=build_cadence(config),
        seed=config.train.seed,
        flops_per_image=3 * forward_flops(config, denoiser),  # backward costs two forwards
        metrics=metrics_type(denoiser),
    )
    with workdir.open_workdir(
        directory,
        config.to_dict(),
        may_change(directory),
        complete=with_defaults,
    ) as path:
        look = functools.partial(check_disk, config, denoiser, path)
        processes.from_leader("checking the free disk space", look)
        show = functools.partial(write_page, config, path, command)
        processes.from_leader("noting the command", lambda: note_command(path, command))
        try:
            calls = callbacks(config, path, denoiser, mesh, source, show)
            result = run(
                path, callbacks=calls, sinks=open_sinks(path, config.to_dict(), config.log)
            )
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to report
                show("failed")
            raise
        show("done" if result.stopped_by is None else "stopped")
        return result


def scale_note(config: ConfigDict, source: ImageSource) -> str:
    """What to know of the spread of an array that EDM's preconditioning does not expect; '' if nothing."""
    moments, expected = source.moments(), config.precond.sigma_data
    if not moments or config.precond.name != "edm" or 0.5 < moments[1] / expected < 2:
        return ""
    return (
        f"warning: the values have a standard deviation of {moments[1]:.3g} (mean {moments[0]:.3g}) where "
        f"the network sees them, but precond.sigma_data={expected:g}; set data.mean and data.std, or "
        "sigma_data"
    )


def check_training(config: ConfigDict) -> None:
    """Raises UserError for values that no training could use, whatever its data."""
    check(config)
    if config.dtype == "float16":
        raise UserError(
            "Training in float16 would need loss scaling, which does not exist here; use "
            "dtype=bfloat16 (float16 works for sampling)."
        )
    if config.guidance.name == "autoguidance":
        raise UserError(
            "guidance.name=autoguidance is for finished runs; leave it out of the training's config and give "
            "it to --mode=sample."
        )
    build_cadence(config)
    if config.log.wandb_project:
        check_wandb(config.log.wandb_mode)


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with the values that they stand for, so that configs can be compared."""
    return resolved(config_from_dict(saved))


def stored_bytes(config: ConfigDict, params: PyTree) -> tuple[int, int]:
    """The size of one checkpoint, about, and of the frozen weights, which a run stores once.

    Args:
        config: of the run.
        params: shapes of all parameters.
    """
    trained, frozen = map(lora.count, split(params, trainable(config)))
    return 16 * trained, 4 * frozen  # float32: what is trained, its average and two moments


def check_disk(config: ConfigDict, denoiser: Denoiser, directory: Path) -> None:
    """Raises UserError unless the checkpoints that are still to come fit on the disk."""
    size, frozen = stored_bytes(config, variable_shapes(config, denoiser)["params"])
    there = checkpoint.saved_steps(directory)
    base = 0 if there else frozen
    left = config.train.total_images - (there[-1] if there else 0) * config.train.batch_size
    to_come = -(-max(left, 0) // config.train.checkpoint_every)
    # One more than is kept, while the newest is written.
    new = max(0, min(config.train.keep + 1, len(there) + to_come) - len(there))
    needed = size * new + base * bool(new)
    free = shutil.disk_usage(directory).free
    if remote.is_mirrored(directory):
        if free < 2 * size + frozen:  # the newest, and the next while it is written
            raise UserError(
                f"Two checkpoints of this run take {(2 * size + frozen) / 2**30:.2f} GiB on the disk of "
                f"temporary files before they are in {directory}; {free / 2**30:.1f} GiB are free there. "
                "Make room, or set TMPDIR to a folder on another disk."
            )
        return
    if free < needed:
        raise UserError(
            f"The checkpoints of this run need {needed / 2**30:.1f} GiB more ({size / 2**30:.2f} GiB each, "
            f"train.keep={config.train.keep}), but only {free / 2**30:.1f} GiB are free on the disk of "
            f"{directory}. Make room, choose another workdir, or keep fewer."
        )


def may_change(directory: str | os.PathLike) -> tuple[str, ...]:
    """Patterns of the fields in which the config may differ from the one in the workdir."""
    if (Path(directory) / workdir.CONFIG).exists():
        data = workdir.read_config(directory).get("data", {})
        if not data.get("fingerprint"):  # imported, and never trained
            return (*RESUMABLE_CHANGES, *OPEN_AFTER_IMPORT)
    return RESUMABLE_CHANGES


def initial_state(
    config: ConfigDict, denoiser: Denoiser, directory: str | os.PathLike
) -> loop.InitialState:
    """The state of step 0: fresh weights, or those of `init_from` with fresh adapters and classes."""
    optimizer = build_optimizer(config)

    def fresh(key: Key) -> state.TrainState:  # the loop compiles it: each device makes its part
        variables = init_variables(config, denoiser, key)
        return state.create_state(variables, optimizer, trainable(config))

    if not config.init_from or has_checkpoint(directory):
        return fresh
    source = interop.local(config.init_from, "init_from")
    described = not interop.is_torch_file(source)
    start = interop.load_pretrained(source, config=None if described else config)
    key = purpose_key(config.train.seed, INIT)
    variables = init_variables(config, denoiser, key)
    variables, notes = start_from(start, config, variables, config.init_from)
    for note in notes:
        log(f"init_from={config.init_from}: {note}")
    return state.create_state(variables, optimizer, trainable(config))


def note_command(directory: Path, command: str) -> None:
    """Writes the command of a run into its directory, if it is known."""
    if command:
        with files.disk_errors(directory):
            files.write_text(directory / COMMAND, command + "\n")


def write_page(config: ConfigDict, directory: Path, command: str, state: str) -> None:
    """Writes the page of a run, in process 0."""
    if not processes.is_leader():
        return
    fixed, _ = workdir.differences(default_config.base().to_dict(), config.to_dict())
    settings = {field: new for field, (_, new) in fixed.items() if field != "data.fingerprint"}
    shown = collect.Source(directory.name, directory, {}, state, "", command, settings)
    page.write(directory, directory.name, [shown])


def refresh_page(directory: Path) -> None:
    """Writes the page of a run again, with what its directory holds now."""
    config = config_from_dict(workdir.read_config(directory))
    known = directory / COMMAND
    command = known.read_text().strip() if known.is_file() else ""
    done = sweep_state.is_done(directory, config.to_dict())
    running = sweep_state.holder(directory)
    write_page(config, directory, command, "running" if running else "done" if done else "stopped")


def callbacks(
    config: ConfigDict,
    directory: str | os.PathLike,
    denoiser: Denoiser,
    mesh: jax.sharding.Mesh,
    source: ImageSource,
    show: Callable[[str], None],
) -> dict[str, loop.Callback]:
    """Grids of samples, and an evaluation that may be quicker on the way than at the end.

    `show` is called with the run's state when there is a new grid.
    """
    generator = build_generator(config, denoiser, mesh)
    quick = generator
    if config.eval.num_steps:
        quick = build_generator(quick_config(config), denoiser, mesh)

    def samples(now: state.TrainState, step: int) -> Mapping[str, Any]:
        names = tuple(config.data.class_names)
        picture = sample_grid(quick, state.ema_variables(now), names)
        name = f"{step * config.train.batch_size:010d}.png"
        if processes.is_leader():
            with files.disk_errors(directory):
                folder = files.make_folder(Path(directory) / "samples", directory)
                outputs.write_png(folder / name, picture)
        show("running")
        return {"samples/grid": picture}

    measure = None
    if config.eval.num_samples and not is_pictures(config):
        if config.eval.reference:
            raise UserError(
                f"eval.reference={config.eval.reference} compares images, but the data are an array. Set "
                "--config.eval.reference=''."
            )
        log("no evaluation: distances are of images, and the data are an array")
    elif config.eval.num_samples:
        heldout = None if config.eval.reference else open_heldout(config)
        paths = {
            name: files.expand(config.eval[name], f"eval.{name}")
            for name in ("reference", "inception")
        }
        counts = [n for n in (config.eval.num_samples, config.eval.final_num_samples) if n]
        measure = for_training(source, heldout, counts=counts, **paths)
    if measure is None:
        return {"samples": samples}

    def evaluate(now: state.TrainState, step: int) -> Mapping[str, Any] | None:
        last = step * config.train.batch_size >= config.train.total_images
        # Metrics of one name must come from one sampler: the full one is used only with a number of
        # samples of its own, which is part of the name.
        full = last and config.eval.final_num_samples > 0
        count = config.eval.final_num_samples if full else config.eval.num_samples
        batches = (generator if full else quick).batches(
            state.ema_variables(now), range(count), between=pause_point
        )

        def images() -> Iterator[np.ndarray]:
            for batch in batches:
                batch.check_finite()
                yield batch.images

        try:
            return {f"eval/{k}": v for k, v in measure(images(), count).items()}
        except generate.NotFiniteError as error:  # the training itself may go well
            log(f"not evaluated: {error}")
            return None

    return {"samples": samples, "eval": evaluate}


def quick_config(config: ConfigDict) -> ConfigDict:
    """The config with the sampler used during training: `eval.num_steps` steps."""
    config = config.copy_and_resolve_references()
    config.sampler.num_steps = config.eval.num_steps
    if "respacing" in config.sampler:  # of which num_steps takes the place
        config.sampler.respacing = default_config.sampler(config.sampler.name).respacing
    return config


def sample_grid(
    generator: generate.Generator,
    variables: Variables,
    class_names: Sequence[str] = (),
    *,
    columns: int = 8,
    rows: int = 10,
) -> np.ndarray:
    """A uint8 picture of samples: a titled row per class, for up to `rows` classes, or `rows` rows."""
    rows = min(rows, generator.num_classes) if generator.num_classes else rows
    classes = [k for k in range(rows) for _ in range(columns)] if generator.num_classes else None
    batches = list(
        generator.batches(variables, range(rows * columns), classes, between=pause_point)
    )
    if bad := sum(len(batch.not_finite()) for batch in batches):
        log(f"warning: {bad} of {rows * columns} samples hold NaN or infinity")
    images, labels = (np.concatenate([b[i] for b in batches]) for i in (0, 2))
    return outputs.grid(images, columns, outputs.row_titles(labels, columns, class_names))
