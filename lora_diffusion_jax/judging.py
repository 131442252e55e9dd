"""Networks judged by their samples: one checkpoint, or every one of a run or a sweep."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import sleep

import numpy as np

from lora_diffusion_jax import experiment, factory, files, generate, interop, processes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import history, report
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect_resumable, forget
from lora_diffusion_jax.evaluation.evaluator import Tools
from lora_diffusion_jax.evaluation.features import cache_folder, tree_hash
from lora_diffusion_jax.factory.overrides import override
from lora_diffusion_jax.interop.export import is_safetensors, read_export
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.training import checkpoint, workdir

POLL_SECONDS = 30.0
MOST_REPEATS = 100
METRICS_LIMIT = 3600.0  # seconds that other processes wait for process 0's arithmetic
DECIDES = ("seeds", "sampler", "lora", "dtype")  # beside the weights, what images are made of


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which samples of a network are judged.

    Attributes:
        repeats: the seeds of each repeat, one per image; all repeats have as many.
        weights: ema or raw.
        overrides: `--config.a.b=value` arguments.
        batch_size: images sampled at a time; None: the config's.
    """

    repeats: list[list[int]]
    weights: str = "ema"
    overrides: tuple[str, ...] = ()
    batch_size: int | None = None

    @property
    def count(self) -> int:
        """Images of a repeat."""
        return len(self.repeats[0])

    @property
    def texts(self) -> list[str]:
        """The seeds of each repeat as one writes them: '0-49999'."""
        return [report.seeds_text(seeds) for seeds in self.repeats]


def repeat_seeds(text: str | None, num: int | None, repeats: int) -> list[list[int]]:
    """The seeds of each repeat; repeats follow one another without overlap.

    Args:
        text: seeds as '0-49999'; None: the first `num`.
        num: how many there must be; None: as `text` has, or 50,000.
        repeats: how often.

    Raises:
        UserError: numbers that do not fit one another, a seed named twice, fewer than 2.
    """
    if num is not None and num < 2:
        raise UserError(f"--num={num}; a distance needs at least 2 images.")
    if not 1 <= repeats <= MOST_REPEATS:
        raise UserError(f"--repeats={repeats}; choose 1 to {MOST_REPEATS} (papers use 3).")
    if num is not None and num > generate.MOST_SEEDS:
        raise UserError(f"--num={num}; at most {generate.MOST_SEEDS:,} images are sampled at once.")
    seeds = generate.parse_seeds(f"0-{(num or 50_000) - 1}" if text is None else text)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={text} names a seed twice; its image would count twice.")
    if num is not None and len(seeds) != num:
        raise UserError(
            f"--seeds={text} are {len(seeds)} seeds, but --num={num}; one seed makes one image. "
            "Leave one of the two out."
        )
    if len(seeds) < 2:
        raise UserError(f"--seeds={text} is one image; a distance needs at least 2.")
    stride = max(seeds) - min(seeds) + 1
    last = max(seeds) + stride * (repeats - 1)
    if last > generate.LAST_SEED:
        raise UserError(
            f"--repeats={repeats} of these seeds would go up to {last}; the last is "
            f"{generate.LAST_SEED}. Choose lower seeds or fewer repeats."
        )
    return [[seed + stride * k for seed in seeds] for k in range(repeats)]


# One network.


def load_network(where: str, step: int | None, plan: Plan) -> interop.Pretrained:
    """The network of a workdir's checkpoint, or of an official checkpoint file."""
    if Path(where).is_file():
        loaded = interop.load_pretrained(where)
    else:
        loaded = factory.load_workdir(where, weights=plan.weights, at_step=step)
    config = override(factory.config_of(loaded), plan.overrides)
    if plan.batch_size is not None:
        config.sampler.batch_size = plan.batch_size
    return factory.with_config(loaded, config)


def choose_step(where: str, step: int | None) -> int | None:
    """The step to judge: the one asked for, else the newest; None for a checkpoint file.

    Raises:
        UserError: neither a run nor a file, no checkpoint, or a step of a file.
    """
    if not where or not Path(where).exists():
        raise UserError(
            f"--workdir={where} is not there; name a run's directory or a checkpoint file."
        )
    if Path(where).is_file():
        if step is not None:
            raise UserError(f"{where} is a file, which has no steps; leave --step={step} out.")
        return None
    if not (Path(where) / workdir.CONFIG).is_file() and find_runs(where, needed=False):
        raise UserError(
            f"{where} is no run but holds some; judge one of them with gen, or all with: "
            f"eval_fid.py all --workdir={where}"
        )
    workdir.read_config(where)  # first: a plain error where it is no run
    steps = checkpoint.saved_steps(where) if has_checkpoints(Path(where)) else []
    if not steps:
        raise UserError(f"{where} has no checkpoint yet.")
    return steps[-1] if step is None else step


def choose_weights(where: str, wanted: str | None) -> str:
    """Which weights to judge: the ones asked for, else ema; a file has one kind.

    Raises:
        UserError: a file does not hold those that were asked for.
    """
    if not Path(where).is_file():
        return wanted or "ema"
    held = read_export(where).weights if is_safetensors(where) else "ema"  # snapshots are averages
    if wanted not in (None, held):
        raise UserError(f"{where} holds {held} weights; leave --weights={wanted} out.")
    return held


def judge(where: str, step: int | None, plan: Plan, tools: Tools) -> Iterator[report.Record]:
    """Yields the results of one network: one per metric and repeat, then the summaries.

    Partial sums lie in the workdir (of a file: in the cache) until the last result was taken, so
    that a run that was stopped goes on.

    Args:
        where: a workdir, or a checkpoint file.
        step: which checkpoint; None for a file.
        plan: which samples.
        tools: what judges them.
    """
    network = load_network(where, step, plan)
    generator = factory.build_generator(
        network.config, network.denoiser, factory.build_mesh(network.config)
    )
    tools.check_shape(generator.image_shape, where)
    labels = _labels(where, step, plan, network)
    home = Path(where) / history.FOLDER if step is not None else cache_folder()
    folders, results = [], []
    for seeds, text in zip(plan.repeats, plan.texts, strict=True):
        now = {**labels, "seeds": text}
        found, folder = _features(generator, network, seeds, now, tools, home)
        folders.append(folder)
        results.append([])
        for record in while_the_others_wait(tools.records(found, now)):
            results[-1].append(record)
            yield record
    if len(results) > 1:
        yield from (report.repeated(rows) for rows in zip(*results, strict=True))
    for folder in folders if processes.is_leader() else ():
        forget(folder)


def _features(
    generator: generate.Generator,
    network: interop.Pretrained,
    seeds: list[int],
    labels: report.Record,
    tools: Tools,
    home: Path,
) -> tuple[FeatureSet, Path]:
    """The features of the images of some seeds, and the folder of partial sums to be forgotten."""
    identity = {name: labels[name] for name in ("weights_hash", *DECIDES)}
    key = report.to_line({**identity, "detector": tools.detector.hash, "m": tools.metrics})
    identity |= {"code": report.source_hash()}  # other code starts the same folder anew
    folder = home / "partial" / hashlib.sha256(key.encode()).hexdigest()[:16]
    found = collect_resumable(
        tools.detector,
        functools.partial(_images_from, generator, network, seeds),
        len(seeds),
        folder,
        identity=identity,
        keep_rows=tools.needs_rows,
        mesh=generator.mesh,
        progress=True,
    )
    return found, folder


def while_the_others_wait(records: Iterable[report.Record]) -> Iterable[report.Record]:
    """The records, which process 0 alone computes, perhaps for minutes."""
    if processes.alone():
        return records
    computed: list[report.Record] = []
    compute = functools.partial(computed.extend, records)
    processes.from_leader("computing the metrics", compute, METRICS_LIMIT)
    return computed


def _labels(where: str, step: int | None, plan: Plan, network: interop.Pretrained) -> report.Record:
    return {
        **_settings(network, plan.weights, step),
        "weights_hash": tree_hash(network.variables),
        "images_seen": None if step is None else step * network.config.train.batch_size,
        "workdir": where,
    }


def _settings(network: interop.Pretrained, weights: str, step: int | None) -> report.Record:
    """How the images are made of the weights."""
    config = network.config
    about = experiment.about(network, weights, step)
    return {**about, "lora": config.lora.mode, "dtype": config.dtype}


def _images_from(
    generator: generate.Generator, network: interop.Pretrained, seeds: list[int], done: int
) -> Iterator[np.ndarray]:
    return (batch.images for batch in generator.batches(network.variables, seeds[done:]))


# A run or a sweep.


def judge_all(root: str, plan: Plan, tools: Tools, *, follow: bool) -> Iterator[report.Record]:
    """Yields the results of every checkpoint of a run, or of all runs below a folder, each once.

    What is in the runs' files already is not made again. Ends by a table and plots.

    Args:
        root: a run, or a folder that holds some.
        plan: which samples.
        tools: what judges them.
        follow: wait for new checkpoints until all runs are complete.
    """
    told: set[str] = set()
    shown = None
    while True:
        look = functools.partial(_look, root, plan, tools, follow)
        work, complete = processes.from_leader("looking for checkpoints", look)
        for run, step, is_known in work:
            for record in _judge_once(run, step, is_known, plan, tools):
                if (key := f"{run} {history.key_of(record)}") not in told:
                    told.add(key)
                    yield record
        if processes.is_leader() and (size := len(told)) != shown:
            shown = size
            report.say(summarise(Path(root), find_runs(root), plan, tools))
        if complete:
            return
        for _ in range(int(POLL_SECONDS)):
            sleep(1.0)
            pause_point()


def _look(
    root: str, plan: Plan, tools: Tools, follow: bool
) -> tuple[list[tuple[str, int, bool]], bool]:
    """Every (run, step, are its results there already) below a folder, and whether that is all."""
    runs = find_runs(root)
    complete = not follow or all(map(finished, runs))  # first: a step may come in between
    steps = [(str(run), step) for run in runs for step in saved_steps(run)]
    if not follow and not steps:
        raise UserError(
            f"{root}: no run there has a checkpoint yet; train first, or wait with --follow."
        )
    work = []
    for run, step in steps:
        known = _known(run)
        wanted = expected_keys(run, step, plan, tools)
        work.append((run, step, all(key in known for key in wanted)))
    return work, complete


def find_runs(directory: str, *, needed: bool = True) -> list[Path]:
    """The run in a directory, or all runs below it; none is a UserError where some are needed."""
    root = Path(directory)
    if (root / workdir.CONFIG).is_file():
        return [root]
    runs = sorted(path.parent for path in root.glob(f"*/**/{workdir.CONFIG}"))
    if not runs and needed:
        raise UserError(f"{directory} is no run and holds none: no {workdir.CONFIG} was found.")
    return runs


def has_checkpoints(run: Path) -> bool:
    """Whether a run has saved anything yet."""
    return (run / checkpoint.FOLDER).is_dir()


def saved_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    return checkpoint.saved_steps(run) if has_checkpoints(run) else []


def finished(run: Path) -> bool:
    """Whether a run's last checkpoint is there, so that no new one will come."""
    train, steps = factory.config_from_dict(workdir.read_config(run)).train, saved_steps(run)
    # An imported network has step 0 alone, and is not trained on by itself.
    return steps == [0] or (bool(steps) and steps[-1] * train.batch_size >= train.total_images)


def _known(run: str) -> dict[str, report.Record]:
    """The results in a run's file, by key."""
    return {history.key_of(r): r for r in history.read(history.results_file(run))}


def _judge_once(
    run: str, step: int, is_known: bool, plan: Plan, tools: Tools
) -> Iterator[report.Record]:
    """The results of one checkpoint: those in the run's file, or else new ones, which go there."""
    known = _known(run) if processes.is_leader() else {}
    if is_known:
        yield from (known[k] for k in expected_keys(run, step, plan, tools) if k in known)
        return
    try:
        for record in judge(run, step, plan, tools):
            if history.key_of(record) not in known:
                history.append(history.results_file(run), record)
            yield record
    except UserError:
        if step in saved_steps(Path(run)):
            raise
        report.say(f"{run}: checkpoint {step} was removed before it could be judged; skipped")


def expected_keys(run: str, step: int, plan: Plan, tools: Tools) -> list[str]:
    """The keys of all results that judging a checkpoint gives, the summaries last."""
    config = override(factory.config_from_dict(workdir.read_config(run)), plan.overrides)
    labels = {
        **_settings(interop.Pretrained(None, {}, config), plan.weights, step),
        "detector_hash": tools.detector.hash,
        "reference_hash": tools.reference.hash,
    }
    parts: list[report.Record] = [{"seeds": text} for text in plan.texts]
    if len(parts) > 1:
        parts.append({"seeds": plan.texts, "repeats": len(parts)})
    names = tools.names(plan.count)
    return [history.key_of({**labels, **part, "metric": n}) for part in parts for n in names]


def summarise(root: Path, runs: list[Path], plan: Plan, tools: Tools) -> str:
    """Writes a table and a plot per metric, of the best where there are repeats; returns the table."""
    names = tools.names(plan.count)
    found: dict[str, list[report.Record]] = {}
    for run in runs:
        known = _known(str(run))
        steps = sorted({r["step"] for r in known.values()})
        keys = [k for s in steps for k in expected_keys(str(run), s, plan, tools)[-len(names) :]]
        name = run.name if run == root else str(run.relative_to(root))
        found[name] = [known[key] for key in keys if key in known]
    folder = root / history.FOLDER
    text = history.table(found)
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "table.txt", text + "\n")
        for name in names:
            history.plot(found, name, folder / f"{name}.png")
    return f"{text}\ntable and plots: {folder}"
