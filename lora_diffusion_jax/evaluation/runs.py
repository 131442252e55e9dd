"""Networks evaluated by their samples: one checkpoint, or all of a run or a sweep."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_diffusion_jax import files, remote
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results, tables
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect_resumable
from lora_diffusion_jax.evaluation.evaluator import Evaluator
from lora_diffusion_jax.evaluation.features import cache_folder, tree_hash
from lora_diffusion_jax.evaluation.results import Record
from lora_diffusion_jax.processes import from_leader, is_leader
from lora_diffusion_jax.processes.interrupts import pause_point

POLL_SECONDS = 30
IMAGES_DEPEND_ON = ("weights_hash", "seeds", "sampler", "lora", "dtype")  # among the labels
Repeats = Sequence[Sequence[int]]  # the seeds of each repeat, one per image; all equally long


class Network(NamedTuple):
    """A network ready to sample from."""

    generator: Any  # a generate.Generator
    variables: Variables
    labels: Record  # for its results: settings that its images depend on, and further facts

    def images(self, seeds: Sequence[int], skip: int) -> Iterator[np.ndarray]:
        """Yields uint8 batches [n, H, W, C], one image per seed, without the first `skip`.

        Whole batches of an undisturbed run are sampled: an image's place in its batch can change
        how XLA rounds it, and flip a byte.
        """
        surplus = skip % self.generator.call_size
        for batch in self.generator.batches(self.variables, seeds[skip - surplus :]):
            batch.check_finite()
            yield batch.images[surplus:]
            surplus = 0


class Run(Protocol):
    """A run's directory, or a checkpoint file, which has no steps."""

    @property
    def where(self) -> str: ...

    def steps(self) -> list[int]: ...  # of its checkpoints, in order

    def is_complete(self) -> bool: ...  # no further checkpoint will come

    def settings(self, step: int) -> Record: ...  # labels known before a checkpoint is opened

    def open(self, step: int | None) -> Network: ...  # None for a file


def evaluate(
    run: Run, step: int | None, repeats: Repeats, evaluator: Evaluator
) -> Iterator[Record]:
    """Yields the results of one network: one per metric and repeat, then summaries of the repeats.

    Partial sums are kept in the workdir (of a file: in the cache) until the last result has been
    consumed, so that a stopped evaluation continues.
    """
    network = run.open(step)
    evaluator.check(len(repeats[0]), network.generator.image_shape, run.where)
    evaluator.check_classes(network.generator.num_classes, run.where)
    labels = network.labels | {
        "weights_hash": tree_hash(network.variables),
        "workdir": remote.url_of(run.where),
    }
    finished: list[FeatureSet] = []
    rows: list[list[Record]] = []
    for seeds in repeats:
        labels |= {"seeds": results.seeds_text(seeds)}
        found = collect_resumable(
            evaluator.detector,
            functools.partial(network.images, seeds),
            len(seeds),
            _partial_folder(run.where, step),
            {name: labels[name] for name in IMAGES_DEPEND_ON},
            keep_rows=evaluator.needs_rows,
            mesh=network.generator.mesh,
        )
        if "accuracy" in evaluator.metrics:
            found.classes = network.generator.choose_labels(np.asarray(seeds))
        finished.append(found)
        rows.append([])
        for record in evaluator.records(found, labels):
            rows[-1].append(record)
            yield record
    if len(rows) > 1:
        yield from map(results.summary, zip(*rows, strict=True))
    for found in finished:
        found.remove_partial()


def evaluate_all(
    root: Path,
    find_runs: Callable[[], list[str]],
    run_at: Callable[[str], Run],
    repeats: Repeats,
    evaluator: Evaluator,
    *,
    follow: bool,
) -> Iterator[Record]:
    """Yields the results of every checkpoint of some runs, each once; writes a table and plots.

    Results that are in the runs' files already are not measured again.

    Args:
        root: the folder that gets the table and the plots.
        find_runs: lists the runs' paths; called again for new ones.
        run_at: opens a path.
        repeats: the seeds of each repeat.
        evaluator: measures the samples.
        follow: wait for new checkpoints until all runs are complete.

    Raises:
        UserError: no checkpoint yet, without `follow`.
    """
    done: set[tuple[str, int]] = set()

    def look() -> tuple[list[tuple[str, int]], bool]:
        """Every (run, step) that is not done, and whether no more will come."""
        runs = [run_at(path) for path in find_runs()]
        complete = not follow or all(run.is_complete() for run in runs)  # before listing steps
        # URLs: each process has a mirror of its own.
        steps = [(remote.url_of(run.where), step) for run in runs for step in run.steps()]
        if not follow and not steps:
            raise UserError(f"{root}: no run has a checkpoint. Train first, or wait with --follow.")
        return [item for item in steps if item not in done], complete

    complete = False
    while not complete:
        work, complete = from_leader("looking for checkpoints", look)
        for path, step in work:
            done.add((path, step))
            yield from _evaluate_once(run_at(path), step, repeats, evaluator)
        if work and is_leader():
            results.note(_summarise(root, map(run_at, find_runs()), repeats, evaluator))
        for _ in range(0 if complete else POLL_SECONDS):
            sleep(1.0)
            pause_point()


def _partial_folder(where: str, step: int | None) -> Path:
    """Where unfinished sums are kept: with the run's results, of a file or a run elsewhere in the cache."""
    if step is None or remote.is_mirrored(where):
        return cache_folder()
    folder = Path(where) / results.FOLDER
    with files.disk_errors(folder):
        return files.make_folder(folder, where)


def _evaluate_once(run: Run, step: int, repeats: Repeats, evaluator: Evaluator) -> Iterator[Record]:
    """The results of one checkpoint: those in the run's file, or new ones, which are added to it."""
    path = results.results_file(run.where)
    keys = expected_keys(run, step, repeats, evaluator)

    def read_all() -> list[Record] | None:
        results.repair(path)
        known = results.read(path)
        return [known[key] for key in keys] if known.keys() >= set(keys) else None

    known = from_leader("reading the results", read_all)
    if known is not None:
        yield from known if is_leader() else ()
        return
    try:
        for record in evaluate(run, step, repeats, evaluator):
            results.append(path, record)
            yield record
    except UserError:
        if step in run.steps():
            raise
        results.note(f"{run.where}: checkpoint {step} was removed before its evaluation; skipped")


def expected_keys(run: Run, step: int, repeats: Repeats, evaluator: Evaluator) -> list[str]:
    """The keys of all results of a checkpoint, the summaries of repeats last."""
    labels = {
        **run.settings(step),
        "detector_hash": evaluator.detector.hash,
        "reference_hash": evaluator.reference.hash,
    }
    texts = [results.seeds_text(seeds) for seeds in repeats]
    parts: list[Record] = [{"seeds": text} for text in texts]
    if len(texts) > 1:
        parts.append({"seeds": texts, "repeats": len(texts)})
    names = evaluator.names(len(repeats[0]))
    return [results.key_of(labels | part | {"metric": n}) for part in parts for n in names]


def _summarise(root: Path, runs: Iterator[Run], repeats: Repeats, evaluator: Evaluator) -> str:
    """Writes a table, and a plot per metric, of the best over repeats; returns the table."""
    names = evaluator.names(len(repeats[0]))
    found: dict[str, list[Record]] = {}
    for run in runs:
        known, path = results.read(results.results_file(run.where)), Path(run.where)
        steps = sorted({record["step"] for record in known.values()})
        keys = [expected_keys(run, step, repeats, evaluator)[-len(names) :] for step in steps]
        name = path.name if path == root else str(path.relative_to(root))
        found[name] = [known[key] for part in keys for key in part if key in known]
    folder, text = root / results.FOLDER, tables.table(found)
    with files.disk_errors(folder):
        files.make_folder(folder, root)
        files.write_text(folder / "table.txt", text + "\n")
        for name in names:
            tables.plot(found, name, folder / f"{name}.png")
    for name in ("table.txt", *(f"{name}.png" for name in names)):
        remote.push(folder / name)
    return f"{text}\ntable and plots: {folder}"
