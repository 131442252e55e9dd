"""What --mode=info says of a run before it starts: its time, memory and disk on the devices at hand."""

import math

from ml_collections import ConfigDict

from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.factory import networks, objectives, training
from lora_diffusion_jax.modes import measure
from lora_diffusion_jax.modes.train import (
    check_training,
    quick_config,
    stored_bytes,
)
from lora_diffusion_jax.training import sharding

HOW = ("auto", "step", "off")  # values of --measure
SAMPLES = 50_000  # images of an FID
GRID = 80  # images of a grid during training, at most
# Large networks take a minute to compile and seconds an image on a CPU.
CPU_AUTO = 2e11  # FLOP of the largest step that is measured there without being asked for
CPU_STEP = 1e12  # and of the largest that is measured at all: else one of fewer images
# A training image costs three evaluations by FLOP. On CPUs it took 3 to 4 times as long as one.
STEP_EVALUATIONS = 4

Row = tuple[str, str, str]  # what, how much, and where that comes from


def estimate(config: ConfigDict, num_images: int, how: str) -> str:
    """The table of what a run will take, as lines of text.

    Args:
        config: of a run, with the sizes of its data set.
        num_images: of its data set; 0 where that is not known.
        how: auto: the step is measured unless it is large and the device a CPU; step: always.

    Raises:
        UserError: the config cannot be trained, or not on these devices.
    """
    check_training(config)
    denoiser, mesh = networks.build_denoiser(config), training.build_mesh(config)
    batch, flops = config.train.batch_size, networks.forward_flops(config, denoiser)
    sharding.check_batch_size(batch, mesh, config.train.microbatch or None)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    evaluation = measure.time_evaluation(config, denoiser, mesh, flops if on_cpu else None)
    if on_cpu and how == "auto" and 3 * flops * batch > CPU_AUTO:
        step = measure.trace_step(config, denoiser, mesh, num_images)
    else:
        part = min(batch, measure.images_at_once(CPU_STEP, 3 * flops, mesh)) if on_cpu else batch
        step = measure.measure_step(config, denoiser, mesh, num_images, part)
    rows = [
        *step_rows(config, evaluation, step),
        *run_rows(config, denoiser, evaluation, step),
        *memory_rows(config, measure.free_memory(mesh), step),
        disk_row(config, denoiser),
    ]
    device = mesh.devices.flat[0]
    kind = "CPU" if on_cpu else device.device_kind
    title = f"What this run takes on {mesh.size} x {kind}, measured on blank images:"
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([title, *lines])


def seconds_per_step(batch: int, evaluation: measure.Timed, step: measure.Step) -> float:
    """Measured, or derived from a smaller step or from evaluations."""
    if step.timed is None:
        return STEP_EVALUATIONS * evaluation.of(batch)
    return step.timed.of(batch)


def step_rows(config: ConfigDict, evaluation: measure.Timed, step: measure.Step) -> list[Row]:
    """Compiling, and one step."""
    batch, rows = config.train.batch_size, []
    seconds = seconds_per_step(batch, evaluation, step)
    if step.compile_seconds is not None:
        rows.append(("compiling the step", duration(step.compile_seconds), "at the first start"))
    if step.timed is None:
        evaluations = f"{STEP_EVALUATIONS} evaluations an image"
        how = f"derived: {evaluations} ({duration(evaluation.seconds)} for {evaluation.images})"
        how += "" if step.compile_seconds else "; --measure=step measures it"
    else:
        how = f"measured, {number(batch / seconds)} images a second"
        if step.batch < batch:
            how = f"derived from a measured step of {step.batch} images"
    return [*rows, (f"a step of {batch:,} images", duration(seconds), how)]


def run_rows(
    config: ConfigDict, denoiser: Denoiser, evaluation: measure.Timed, step: measure.Step
) -> list[Row]:
    """The whole training, what it samples on the way, and sampling afterwards."""
    steps = training.build_cadence(config).steps(config.train.batch_size)
    train = steps * seconds_per_step(config.train.batch_size, evaluation, step)
    between, words = samples_during_training(config, denoiser)
    aside, nfe = evaluation.of(between), evaluations_per_image(config, denoiser)
    whole = train + aside + (step.compile_seconds or 0)
    one = f"{duration(evaluation.seconds)} for {evaluation.images:,} images"
    return [
        ("training", duration(train), f"{steps:,} steps, {config.train.total_images:,} images"),
        ("grids and evaluations", duration(aside), words),
        ("the whole run", duration(whole), "besides reading data and writing checkpoints"),
        (
            f"sampling {SAMPLES:,} images",
            duration(evaluation.of(SAMPLES * nfe)),
            f"{nfe:,} evaluations of the network, {one}",
        ),
    ]


def evaluations_per_image(config: ConfigDict, denoiser: Denoiser) -> int:
    """How often sampling evaluates the network."""
    return objectives.count_evaluations(
        config, objectives.build_sampler(config, denoiser), denoiser
    )


def samples_during_training(config: ConfigDict, denoiser: Denoiser) -> tuple[int, str]:
    """How many evaluations, one image each, a run spends on its grids and evaluations; and in words."""
    cadence, total, last = training.build_cadence(config), config.train.total_images, 0
    grids, evals = (
        math.ceil(total / every) for every in (cadence.sample_every, cadence.eval_every)
    )
    if not config.eval.num_samples:
        evals = 0
    elif config.eval.final_num_samples:  # the last one, with the sampler as it is
        evals, last = evals - 1, config.eval.final_num_samples
    quick = quick_config(config) if config.eval.num_steps else config
    images = grids * GRID + evals * config.eval.num_samples
    count = images * evaluations_per_image(quick, denoiser)
    count += last * evaluations_per_image(config, denoiser)
    words = f"{grids:,} of {GRID} images"
    words += f", {evals:,} of {config.eval.num_samples:,}" if evals else ""
    return count, words + (f", one of {last:,}" if last else "")


def memory_rows(config: ConfigDict, room: int | None, step: measure.Step) -> list[Row]:
    """The memory of each device, whether it suffices, and what it is for."""
    memory = step.memory
    there = "" if room is None else f" into the {size(room)} there are"
    if step.exhausted or (room is not None and memory.total > room):
        fits = f"DOES NOT FIT{there}; see train.microbatch"
    else:
        fits = f"fits{there}" if there else "how much the device has is not known"
    if step.batch < config.train.batch_size:
        fits = f"of a step of {step.batch} images, which {fits}"
    about = "" if memory.compiled else "at least " if step.exhausted else "about "
    rows = [
        ("memory of each device", about + size(memory.total), fits),
        ("  weights, moments, EMA", size(memory.state), ""),
        ("  data set and batch", size(memory.data), ""),
    ]
    if memory.work:  # not where compiling failed
        rows.append(("  gradients, activations", about + size(memory.work), ""))
    return rows


def disk_row(config: ConfigDict, denoiser: Denoiser) -> Row:
    """The disk space of the checkpoints."""
    params = networks.variable_shapes(config, denoiser)["params"]
    (each, frozen), train = stored_bytes(config, params), config.train
    kept = min(train.keep + 1, math.ceil(train.total_images / train.checkpoint_every))
    how = f"{kept} checkpoints of {size(each)}, the one being written included"
    if frozen:
        how += f", and the frozen weights once, {size(frozen)}"
    return "disk", size(kept * each + frozen), how


def size(count: float) -> str:
    """1_500_000 -> '1.5 MB'."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{number(count / 1e3)} kB"


def duration(seconds: float) -> str:
    """0.012 -> '12 ms', 5400 -> '1.5 h'; a unit begins where there are two of the one above."""
    for unit, factor in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{number(seconds / factor)} {unit}"
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"


def number(value: float) -> str:
    """Three digits, or all of an integer that has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
