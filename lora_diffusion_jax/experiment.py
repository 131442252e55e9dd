"""What the modes of main.py do: train, sample, describe, import and export, put together."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from lora_diffusion_jax import factory, generate, interop, lora, outputs, processes
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier, quick, references
from lora_diffusion_jax.evaluation.features import Detector, tree_hash
from lora_diffusion_jax.evaluation.metrics import frechet_distance
from lora_diffusion_jax.evaluation.report import check_reference, metric_name
from lora_diffusion_jax.evaluation.statistics import load_reference
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.training import checkpoint, loop, sharding, state, workdir, writers
from lora_diffusion_jax.training.state import INIT

# Fields whose change does not hinder resuming a run.
HARMLESS = (
    "train.total_images",
    "train.*_every",
    "train.keep",
    "train.microbatch",
    "train.remat",
    "train.max_nonfinite",
    "sampler.*",
    "eval.*",
    "mesh.*",
    "data.name",
    "data.data_dir",
    "data.path",
    "data.eval_*",
    "data.workers",
    "data.memory_limit_gib",
    "init_from",
)
# Fields that an imported network leaves open until it is first trained: all but its architecture.
OPEN_AFTER_IMPORT = (
    *("train.*", "augment.p", "dtype", "model.*dropout"),
    *("data.fingerprint", "data.image_width", "data.split", "data.class_folders"),
)
FINISH_LIMIT = 3600.0  # seconds that other processes wait for the compression of an npz
NOT_WRITTEN = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".zip", ".npy", ".pt", ".h5")


def train(config: ConfigDict, directory: str | os.PathLike) -> loop.Result:
    """Trains a config in a workdir, or goes on with the run that is there.

    Raises:
        UserError: the config, its data or the workdir cannot be used.
    """
    factory.check(config)
    source = factory.open_source(config)
    config = factory.complete(config, source)
    if config.dtype == "float16":
        raise UserError(
            "dtype=float16 needs a loss scale in training, which is not there; use bfloat16 "
            "(float16 works for sampling)."
        )
    start = _start(config, directory)
    denoiser = factory.build_denoiser(config, start and start.variables)
    mesh = factory.build_mesh(config)
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.microbatch or None)
    generator = factory.build_generator(config, denoiser, mesh)
    harmless = HARMLESS if _knows_its_data(directory) else (*HARMLESS, *OPEN_AFTER_IMPORT)
    return loop.train(
        directory,
        config=config.to_dict(),
        init=_initial_state(config, denoiser, None if _has_checkpoint(directory) else start),
        step_fn=factory.build_step(config, denoiser, mesh),
        batches=factory.build_batches(config, source, mesh),
        mesh=mesh,
        schedule=factory.build_schedule(config),
        seed=config.train.seed,
        harmless=harmless,
        callbacks=_callbacks(config, directory, denoiser, generator, source),
        flops_per_image=3 * factory.forward_flops(config, denoiser),
    )


def _knows_its_data(directory: str | os.PathLike) -> bool:
    """Whether a workdir's config names the images it was trained on; an imported network's cannot."""
    if not (Path(directory) / workdir.CONFIG).exists():
        return True
    return bool(workdir.read_config(directory).get("data", {}).get("fingerprint"))


def _start(config: ConfigDict, directory: str | os.PathLike) -> interop.Pretrained | None:
    """The network that a run starts from: init_from, or for iDDPM, whose noise levels come with the
    weights, the run's own checkpoint; None for a fresh one.
    """
    if _has_checkpoint(directory):
        return factory.load_workdir(directory) if config.precond.name == "iddpm" else None
    return interop.load_pretrained(config.init_from) if config.init_from else None


def _initial_state(
    config: ConfigDict, denoiser: Any, start: interop.Pretrained | None
) -> loop.Init:
    """The state to begin with: fresh weights, or those of `start` with fresh adapters."""
    key = state.purpose_key(config.train.seed, INIT)
    optimizer, trainable = factory.build_optimizer(config), factory.trainable(config)

    def fresh() -> state.TrainState:
        variables = factory.init_variables(config, denoiser, key)
        return state.create_state(variables, optimizer, trainable)

    if start is None:
        return fresh
    variables = jax.jit(functools.partial(factory.init_variables, config, denoiser))(key)
    variables = overlay(variables, start.variables, config.init_from)
    return state.create_state(variables, optimizer, trainable)


def _has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run has saved anything, as process 0 sees it: file systems may differ for a while."""

    def look() -> bool:
        exists = (Path(directory) / checkpoint.FOLDER).is_dir()
        return exists and bool(checkpoint.saved_steps(directory))

    return processes.from_leader("looking for checkpoints", look)


def overlay(fresh: Variables, loaded: Variables, origin: str) -> Variables:
    """Fresh variables with every loaded one in its place: a base under new adapters, or both.

    Adapters may be missing from what was loaded, and the scale-and-shift layers (`affine`) of a base
    may be left over (`only_lora` has none); nothing else may.

    Args:
        fresh: the network's own variables.
        loaded: those of a checkpoint.
        origin: the checkpoint's name, for messages.

    Raises:
        UserError: other variables are missing, left over, or of another shape.
    """
    new, old = (flax.traverse_util.flatten_dict(v, sep="/") for v in (fresh, loaded))
    if "buffers/u" not in new:
        old.pop("buffers/u", None)  # iDDPM's noise levels, which another preconditioning has not
    missing = [k for k in new if k not in old and not lora.params.is_adapter(tuple(k.split("/")))]
    over = [k for k in old if k not in new and "/affine/" not in k]
    if any("/affine/" in k for k in new):
        over += [k for k in old if k not in new and "/affine/" in k]
    shapes = [
        f"{k} is {old[k].shape} there, {new[k].shape} here"
        for k in new
        if k in old and old[k].shape != new[k].shape
    ]
    problems = {"it lacks": missing, "left over": over, "other shapes": shapes}
    told = [f"{what}: {_shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise UserError(
            f"init_from={origin} is not a start for this network; {'; '.join(told)}. Choose the "
            "config that it was made with (classes, widths, augmentation, LoRA sizes)."
        )
    merged = {k: np.asarray(old[k], v.dtype) if k in old else v for k, v in new.items()}
    return flax.traverse_util.unflatten_dict(merged, sep="/")


def _shorten(names: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + rest


def _callbacks(
    config: ConfigDict,
    directory: str | os.PathLike,
    denoiser: Any,
    generator: generate.Generator,
    source: Any,
) -> dict[str, loop.Callback]:
    """Sample grids, and an evaluation that is quick on the way and full at the end."""

    def samples(now: state.TrainState, step: int) -> Mapping[str, Any]:
        picture = sample_grid(generator, state.ema_variables(now))
        images = step * config.train.batch_size
        if processes.is_leader():
            with workdir.plain_disk_errors(directory):
                outputs.write_png(Path(directory) / "samples" / f"{images:010d}.png", picture)
        return {"samples/grid": picture}

    judge = _judge(config, source)
    if judge is None:
        return {"samples": samples}
    steps = config.eval.num_steps or config.sampler.num_steps
    quick_config = config.copy_and_resolve_references()
    with quick_config.unlocked():
        quick_config.sampler.num_steps = steps
    fast = factory.build_generator(quick_config, denoiser, generator.mesh)

    def evaluate(now: state.TrainState, step: int) -> Mapping[str, Any]:
        last = step * config.train.batch_size >= config.train.total_images
        count = (last and config.eval.final_num_samples) or config.eval.num_samples
        # Numbers of one name are of one sampler: the full one has a number of samples of its own.
        drawer = generator if last and config.eval.final_num_samples else fast
        batches = drawer.batches(state.ema_variables(now), range(count), between=pause_point)
        return {f"eval/{k}": v for k, v in judge((b.images for b in batches), count).items()}

    return {"samples": samples, "eval": evaluate}


Judge = Callable[[Iterable[np.ndarray], int], dict[str, float]]


def _judge(config: ConfigDict, source: Any) -> Judge | None:
    """(samples, number) -> distances by name; None where there is nothing to compare with.

    Against eval.reference in its own features (`fid_2k`), or against the held-out images in those of
    a classifier trained on the training images (`fd_classifier_1k`), beside floor and ceiling.
    """
    if not config.eval.num_samples:
        return None
    if config.eval.reference:
        reference = load_reference(config.eval.reference)  # now, rather than after hours
        detector = references.choose_detector(
            "auto", reference, inception=config.eval.inception or None
        )
        check_reference(reference, detector, ["fid"])

        def against_reference(samples: Iterable[np.ndarray], count: int) -> dict[str, float]:
            drawn = quick.feature_moments(detector, quick.take(samples, count))
            value = frechet_distance(
                *drawn.result(), reference.mu, reference.sigma, root2=reference.root
            )
            return {metric_name("fid", detector, count): value}

        return against_reference
    heldout = factory.open_heldout(config)
    if heldout is None:
        writers.say(
            "no evaluation: there are no held-out images; name some (data.eval_path) or statistics "
            "(eval.reference)"
        )
        return None

    @functools.cache
    def detector() -> Detector:  # at the first evaluation: training it takes a while
        fitted = classifier.fit(source, test_source=heldout)
        # Each process has trained it, or found it in its cache; they must have come to the same.
        processes.barrier("training the feature network", loop.COMPILE_LIMIT)
        processes.check_same("the feature network", fitted.hash)
        return fitted

    @functools.cache
    def evaluator(count: int) -> quick.QuickEvaluator:
        return quick.QuickEvaluator(source, heldout, detector(), num=count)

    def against_heldout(samples: Iterable[np.ndarray], count: int) -> dict[str, float]:
        return {k: v for k, v in evaluator(count)(samples).items() if k.startswith("fd_")}

    return against_heldout


def sample_grid(
    generator: generate.Generator, variables: Variables, *, columns: int = 8, rows: int = 10
) -> np.ndarray:
    """A picture of samples, uint8: one row per class (the first `rows`), or `rows` of any kind."""
    rows = min(rows, generator.num_classes) if generator.num_classes else rows
    classes = np.repeat(np.arange(rows), columns) if generator.num_classes else None
    batches = generator.batches(variables, range(rows * columns), classes, between=pause_point)
    return outputs.grid(np.concatenate([b.images for b in batches]), columns)


def sample(
    run: interop.Pretrained,
    seeds: Sequence[int],
    class_id: str | None,
    out: str | os.PathLike,
    about: Mapping[str, Any],
) -> int:
    """Writes the images of some seeds to a folder of PNGs, a .npz, or one .png grid.

    Cut short, the same call goes on where it stopped.

    Args:
        run: the network, its weights and its config.
        seeds: one per image.
        class_id: a class for all images, `all` for as many of each class in turn, or None to draw
            each from its seed.
        out: where to; the ending says which.
        about: recorded beside the images.

    Returns:
        Number of images.

    Raises:
        UserError: the seeds, the class or the file's name do not fit, or it cannot be written.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    generator = factory.build_generator(run.config, run.denoiser, factory.build_mesh(run.config))
    classes = choose_classes(class_id, len(seeds), generator.num_classes)
    seeds = generate.check_seeds(seeds)
    labels = generator.choose_labels(seeds, classes)
    out = Path(out)
    rows = generator.num_classes if class_id == "all" else 0
    _check_out(out, seeds, rows)
    columns = len(seeds) // rows if rows else 0
    identity = json.dumps({**about, "of": tree_hash((run.variables, seeds, labels))})
    opened: list[outputs.Output] = []  # in process 0

    def begin() -> str:
        with workdir.plain_disk_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
            shape = generator.image_shape
            opened.append(outputs.open_output(out, seeds, labels, shape, identity, columns))
        return np.packbits(opened[0].done).tobytes().hex()

    def finish() -> None:
        with workdir.plain_disk_errors(out.parent):
            opened[0].finish(about)

    bits = bytes.fromhex(processes.from_leader("opening --out", begin))
    left = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(seeds)) == 0
    if not left.all():
        writers.say(f"{len(seeds) - left.sum():,} of {len(seeds):,} images are there already")
    for batch in _draw(generator, run.variables, seeds[left], labels[left]):
        for output in opened:
            with workdir.plain_disk_errors(out.parent):
                output.write(batch)
    processes.from_leader("finishing --out", finish, FINISH_LIMIT)
    return len(seeds)


def _check_out(out: Path, seeds: np.ndarray, rows: int) -> None:
    """Raises UserError for an --out that cannot be written, or seeds that do not suit it.

    Args:
        out: where to.
        seeds: of all images.
        rows: of a grid with one row per class; 0 for any other.
    """
    if out.suffix not in outputs.FILES and out.suffix.lower() in (*NOT_WRITTEN, *outputs.FILES):
        raise UserError(
            f"--out={out}: samples are written as .npz, .png (a grid), or into a folder."
        )
    if out.suffix not in outputs.FILES and len(np.unique(seeds)) < len(seeds):
        raise UserError(
            "A seed is named twice, and a folder holds one file per seed; name each once."
        )
    if out.suffix == ".png" and rows and len(seeds) % rows:
        raise UserError(
            f"{len(seeds)} seeds do not fill {rows} rows, one per class; give a multiple, such as "
            f"--seeds=0-{10 * rows - 1}."
        )


def _draw(
    generator: generate.Generator, variables: Variables, seeds: np.ndarray, labels: np.ndarray
) -> Iterable[generate.Batch]:
    """The images of some seeds and labels, perhaps of none."""
    if not len(seeds):
        return ()
    classes = labels if generator.num_classes else None
    shown = processes.is_leader()
    return generator.batches(variables, seeds, classes, progress=shown, between=pause_point)


def choose_classes(
    class_id: str | None, count: int, num_classes: int
) -> Sequence[int] | int | None:
    """--class_id as classes: None, one number, or for `all` an even split in class order.

    Raises:
        UserError: neither a number nor `all`, or `all` for an unconditional network.
    """
    if class_id is None:
        return None
    if class_id == "all":
        if not num_classes:
            raise UserError("--class_id=all, but this network is unconditional; leave it out.")
        return (np.arange(count) * num_classes // count).tolist()
    if not class_id.isdecimal():
        raise UserError(f"--class_id={class_id} is neither a whole number nor `all`.")
    return int(class_id)


def info(config: ConfigDict) -> str:
    """Parameter table, LoRA sites, cost of an evaluation, and what the data set holds."""
    factory.check(config)
    try:
        source = factory.open_source(config)
        config, about_data = factory.complete(config, source), summarize(source)
    except UserError as error:
        source, about_data = None, f"data set: not opened. {error}"
        if not (config.data.image_size and config.data.channels):
            raise
    denoiser = factory.build_denoiser(config)
    init = functools.partial(factory.init_variables, config, denoiser)
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    base, adapters = lora.split(params)
    sites = lora.list_sites(params)
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    lines = [
        table,
        f"LoRA sites ({config.lora.mode}): {len(sites)}",
        *(f"  {site}" for site in sites),
        about_data,
        f"One evaluation: {factory.forward_flops(config, denoiser) / 1e9:.4g} GFLOP per image",
        f"Base parameters: {lora.count(base):,}",
        f"Adapter parameters: {lora.count(adapters):,}",
        f"Total parameters: {lora.count(params):,}",
    ]
    return "\n".join(lines)


def import_checkpoint(
    source: str | os.PathLike, directory: str | os.PathLike, base: str | None = None
) -> int:
    """Turns a checkpoint file into a workdir that sample, train and evaluate accept.

    Returns:
        Number of parameters.

    Raises:
        UserError: the file cannot be read, or the workdir already holds a run.
    """
    if _has_checkpoint(directory):
        raise UserError(f"{directory} already holds a run; choose another workdir.")
    loaded = interop.load_pretrained(source, base)
    params = loaded.variables["params"]
    weights = checkpoint.SavedWeights(
        params=params, frozen={}, buffers=loaded.variables.get("buffers", {}), ema=params
    )
    config = factory.config_of(loaded).to_dict()
    with workdir.open_workdir(directory) as path:
        workdir.reconcile_config(path, config, (), writers.say)
        with workdir.plain_disk_errors(path):
            checkpoint.save_weights(path, weights)
    return lora.count(params)


def export_checkpoint(
    run: interop.Pretrained, out: str | os.PathLike, *, weights: str, adapters_only: bool
) -> None:
    """Writes a run's weights as safetensors with official names, whole or the adapters alone."""
    height, width, _ = factory.image_shape(run.config)
    if height != width:
        raise UserError(
            f"This network makes images of {height}x{width}; the official format knows square ones "
            "only, and would come back as another network. Keep the workdir."
        )
    if run.config.lora.mode != "baseline" and run.config.lora.sites != factory.SITES:
        raise UserError(
            f"lora.sites={run.config.lora.sites!r} is not {factory.SITES!r}; the official names know "
            "adapters at qkv and proj only."
        )
    architecture = factory.architecture_from_config(run.config)
    write = interop.export_adapters if adapters_only else interop.export_network
    write(out, run.variables, architecture, weights=weights)


def about(run: interop.Pretrained, weights: str, step: int | None) -> dict[str, Any]:
    """What made some samples: which weights, and the sampler's settings."""
    fields = run.config.sampler.to_dict()
    sampler = {k: str(v) if v == float("inf") else v for k, v in fields.items()}  # JSON has no inf
    del sampler["batch_size"]
    return {"weights": weights, "step": step, "sampler": sampler}
