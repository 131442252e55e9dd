"""Measure how close generated images are to real ones; one JSON line per result on stdout.

    python eval_fid.py ref  --data=NAME|FOLDER|ZIP|NPZ --dest=stats.npz
    python eval_fid.py calc --images=FOLDER|ZIP|NPZ|NAME --ref=stats.npz
    python eval_fid.py gen  --workdir=DIR --ref=stats.npz --num=50000 [--seeds=0-49999]
    python eval_fid.py all  --workdir=DIR --ref=stats.npz [--follow]

`--help` after a verb lists its options; docs/evaluation.md says what the numbers mean.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import experiment, factory, generate, interop
from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier, history, images, report
from lora_diffusion_jax.evaluation.collect import collect, collect_resumable, forget
from lora_diffusion_jax.evaluation.dinov2 import load_dinov2
from lora_diffusion_jax.evaluation.features import Detector, cache_folder, tree_hash
from lora_diffusion_jax.evaluation.inception import load_inception, present_weights
from lora_diffusion_jax.evaluation.inception_network import POOL_DIM
from lora_diffusion_jax.evaluation.quick import source_batches
from lora_diffusion_jax.evaluation.references import (
    INCEPTION_DETECTORS,
    detector_of,
    make_reference,
)
from lora_diffusion_jax.evaluation.statistics import Reference, load_reference, save_reference
from lora_diffusion_jax.training import checkpoint, workdir

FEATURES = ("auto", "edm", "pytorch-fid", "dinov2", "classifier", "rotation")
POLL_SECONDS = 30.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ref|calc|gen|all")
    ref = verbs.add_parser("ref", help="statistics of a data set, in EDM's npz format")
    ref.add_argument("--data", required=True, help="TFDS name, folder, ZIP or npz of images")
    ref.add_argument("--dest", required=True, help="the npz to write")
    ref.add_argument("--keep_features", action="store_true", help="keep every image's features")
    calc = verbs.add_parser("calc", help="judge images in a folder, ZIP or npz")
    calc.add_argument("--images", required=True, help="folder, ZIP or npz of images; TFDS name")
    for verb in (ref, calc):
        verb.add_argument("--data_dir", default="", help="where TFDS data sets lie")
        verb.add_argument("--split", default="train", help="TFDS split or slice")
    gen = verbs.add_parser("gen", help="judge a network's samples without writing them")
    every = verbs.add_parser("all", help="judge every checkpoint of a run or a sweep")
    for verb in (gen, every):
        verb.add_argument("--workdir", required=True, help="a run (gen: or a checkpoint file)")
        verb.add_argument("--seeds", help="one per image, for instance 0-49999")
        verb.add_argument("--weights", choices=("ema", "raw"), default="ema")
        verb.add_argument("--repeats", type=int, default=1, help="3: the official seed ranges")
        verb.add_argument("--batch_size", type=int, help="images sampled at a time")
    gen.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    every.add_argument("--follow", action="store_true", help="wait for new checkpoints")
    for verb in (ref, calc, gen, every):
        verb.add_argument("--num", type=int, help="number of images; another count is an error")
        verb.add_argument("--features", choices=FEATURES, default="auto")
        verb.add_argument("--inception", help="Inception weights file")
        verb.add_argument("--dinov2", help="DINOv2 weights file")
    for verb in (calc, gen, every):
        verb.add_argument("--ref", required=True, help="statistics written by ref, or EDM's")
        verb.add_argument("--metrics", default="fid", help=",".join(report.METRICS))
    return parser


def emit(record: report.Record) -> None:
    """Prints one result."""
    print(report.to_line(record), flush=True)


def say(text: str) -> None:
    """Prints what is not a result."""
    print(text, file=sys.stderr, flush=True)


# Features and references.


def choose_detector(args: argparse.Namespace, reference: Reference | None) -> Detector | None:
    """The detector that the flags or the reference name; None: one trained on the data itself."""
    wanted = args.features
    if wanted in ("edm", "pytorch-fid"):
        return load_inception(args.inception, wanted)
    if wanted == "dinov2":
        return load_dinov2(args.dinov2)
    if reference is not None:
        own = detector_of(reference)
        made_with = reference.meta.get("features", "inception_edm")  # EDM's own files say nothing
        if "features" not in reference.meta and len(reference.mu) != POOL_DIM:
            raise UserError(
                f"{args.ref} has {len(reference.mu)} features and does not say which; Inception's "
                f"are {POOL_DIM}. Make a reference with: eval_fid.py ref"
            )
        if own is not None and wanted in ("auto", own.name):
            return own
        if wanted == "auto" and made_with in INCEPTION_DETECTORS:
            return load_inception(args.inception, INCEPTION_DETECTORS[made_with])
        if wanted == "auto" and made_with.startswith("dinov2"):
            return load_dinov2(args.dinov2)
        raise UserError(
            f"The reference {args.ref} was made with {made_with} features, which "
            f"--features={wanted} is not. Leave --features out, or make a reference with it."
        )
    if wanted == "auto" and present_weights(args.inception) is not None:
        return load_inception(args.inception, "edm")
    return None


def run_ref(args: argparse.Namespace) -> None:
    """Writes the statistics of a data set."""
    source, where = open_images(args, args.data)
    images.check_count(len(source), args.num, where)
    detector = choose_detector(args, None)
    if detector is None:
        if args.features == "classifier" and source.num_classes < 2:
            raise UserError(f"{where} has no classes to learn; use --features=rotation.")
        detector = classifier.fit(source, use_labels=args.features != "rotation")
        say(f"features: {detector.name}, trained on these images")
    reference = make_reference(
        detector, source_batches(source), len(source), args.keep_features, {"data": where}
    )
    save_reference(args.dest, reference)
    facts = {k: v for k, v in reference.meta.items() if k not in ("recipe", "n")}
    emit({"reference": args.dest, "n": len(source), **facts, "reference_hash": reference.hash})


def open_images(args: argparse.Namespace, named: str) -> tuple[Source, str]:
    """The images that --data or --images names, and what to call them."""
    path = Path(named).expanduser()
    if path.suffix == ".npz":
        return images.ArraySource(images.open_npz(path)), str(path)
    if path.exists() or os.sep in named or path.suffix == ".zip":
        return open_source(path=str(path)), str(path)
    return open_source(named, args.data_dir, "", args.split), f"{named}[{args.split}]"


@dataclasses.dataclass(frozen=True)
class Tools:
    """What judges: the metrics' names, the reference and the features."""

    metrics: list[str]
    reference: Reference
    detector: Detector


def prepare(args: argparse.Namespace) -> Tools:
    """Metrics, reference and detector of calc, gen and all, checked against one another."""
    metrics = report.parse_metrics(args.metrics)
    reference = load_reference(args.ref)
    detector = choose_detector(args, reference)
    report.check_reference(reference, detector, metrics)
    return Tools(metrics, reference, detector)


def run_calc(args: argparse.Namespace) -> None:
    """Judges images that lie in files."""
    tools = prepare(args)
    source, where = open_images(args, args.images)
    images.check_count(len(source), args.num, where)
    keep = report.needs_rows(tools.metrics)
    found = collect(
        tools.detector, source_batches(source), keep_rows=keep, total=len(source), progress=True
    )
    labels = {"images": where, "reference": args.ref}
    for record in report.records(tools.metrics, found, tools.reference, tools.detector, labels):
        emit(record)


# Networks.


def choose_seeds(args: argparse.Namespace) -> list[list[int]]:
    """The seeds of each repeat; repeats follow one another without overlap."""
    if args.num is not None and args.num < 2:
        raise UserError(f"--num={args.num}; a distance needs at least 2 images.")
    if args.repeats < 1:
        raise UserError(f"--repeats={args.repeats}; it must be at least 1.")
    seeds = generate.parse_seeds(args.seeds or f"0-{(args.num or 50_000) - 1}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={args.seeds} names a seed twice; its image would count twice.")
    if args.num is not None and len(seeds) != args.num:
        raise UserError(f"--seeds={args.seeds} are {len(seeds)} seeds, but --num={args.num}.")
    stride = max(seeds) - min(seeds) + 1
    return [[seed + stride * k for seed in seeds] for k in range(args.repeats)]


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.a.b=value` arguments; unknown fields and other types are UserErrors."""
    config = config.copy_and_resolve_references()
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"{argument} is not an option; see eval_fid.py VERB --help.")
        *parents, field = name.split(".")
        group = config
        for parent in parents:
            group = group.get(parent) if isinstance(group, ConfigDict) else None
        if not isinstance(group, ConfigDict) or field not in group:
            raise UserError(f"{argument}: the config has no field {name}.")
        kind = type(group[field])
        try:
            value = text if kind is str else ast.literal_eval(text)
            group[field] = float(text) if kind is float else value
        except (ValueError, SyntaxError, TypeError) as error:
            raise UserError(f"{argument}: expected a value of type {kind.__name__}.") from error
    return config


def load_network(args: argparse.Namespace, step: int | None) -> interop.Pretrained:
    """The network of a workdir's checkpoint, or of an official checkpoint file."""
    if Path(args.workdir).is_file():
        loaded = interop.load_pretrained(args.workdir)
    else:
        loaded = factory.load_workdir(args.workdir, weights=args.weights, at_step=step)
    config = override(factory.config_of(loaded), args.overrides)
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise UserError(f"--batch_size={args.batch_size}; it must be at least 1.")
        config.sampler.batch_size = args.batch_size
    return factory.with_config(loaded, config)


def newest_step(args: argparse.Namespace) -> int | None:
    """The step that gen judges; None for a checkpoint file."""
    if Path(args.workdir).is_file():
        return None
    workdir.read_config(args.workdir)  # first: a plain error where it is no run
    steps = checkpoint.saved_steps(args.workdir)
    if not steps:
        raise UserError(f"{args.workdir} has no checkpoint yet.")
    return args.step if args.step is not None else steps[-1]


def judge(
    args: argparse.Namespace, step: int | None, tools: Tools, repeats: list[list[int]]
) -> Iterator[report.Record]:
    """Yields the results of one checkpoint: one per metric and repeat, then the summaries.

    Partial sums lie in the workdir until the last result was taken, so that a killed run goes on.
    """
    network = load_network(args, step)
    mesh = factory.build_mesh(network.config)
    generator = factory.build_generator(network.config, network.denoiser, mesh)
    if tools.detector.image_shape not in (None, tuple(generator.image_shape)):
        raise UserError(
            f"{args.workdir} makes images of {generator.image_shape} (height, width, channels); "
            f"the reference's {tools.detector.name} features are of {tools.detector.image_shape}."
        )
    labels = {
        **experiment.about(network, args.weights, step),
        "weights_hash": tree_hash(network.variables),
        "images_seen": None if step is None else step * network.config.train.batch_size,
        "workdir": args.workdir,
        "reference": args.ref,
    }
    home = Path(args.workdir) / history.FOLDER if step is not None else cache_folder()
    folders, results = [], []
    for seeds in repeats:
        now = {**labels, "seeds": report.seeds_text(seeds)}
        identity = {name: now[name] for name in ("weights_hash", "sampler", "seeds")}
        key = report.to_line({**identity, "detector": tools.detector.hash, "m": tools.metrics})
        folders.append(home / "partial" / hashlib.sha256(key.encode()).hexdigest()[:16])
        found = collect_resumable(
            tools.detector,
            functools.partial(_images_from, generator, network, seeds),
            len(seeds),
            folders[-1],
            identity=identity,
            keep_rows=report.needs_rows(tools.metrics),
            mesh=mesh,
            progress=True,
        )
        rows = report.records(tools.metrics, found, tools.reference, tools.detector, now)
        results.append([])
        for record in rows:
            results[-1].append(record)
            yield record
    if len(repeats) > 1:
        yield from (report.repeated(rows) for rows in zip(*results, strict=True))
    for folder in folders:
        forget(folder)


def _images_from(
    generator: generate.Generator, network: interop.Pretrained, seeds: list[int], done: int
) -> Iterator[np.ndarray]:
    return (batch.images for batch in generator.batches(network.variables, seeds[done:]))


def run_gen(args: argparse.Namespace) -> None:
    """Judges the samples of one checkpoint."""
    repeats, step = choose_seeds(args), newest_step(args)
    for record in judge(args, step, prepare(args), repeats):
        if step is not None:
            history.append(history.results_file(args.workdir), record)
        emit(record)


def run_all(args: argparse.Namespace) -> None:
    """Judges every checkpoint of a run or of all runs below a folder; what is done is skipped."""
    repeats, tools = choose_seeds(args), prepare(args)
    while True:
        runs = find_runs(args.workdir)
        for run in runs:
            for step in checkpoint.saved_steps(run) if has_checkpoints(run) else []:
                judge_once(args, str(run), step, tools, repeats)
        summarise(args, runs, tools, repeats)
        if not args.follow or all(finished(run) for run in runs):
            return
        time.sleep(POLL_SECONDS)


def find_runs(directory: str) -> list[Path]:
    """The run in a directory, or all runs below it."""
    root = Path(directory)
    if (root / workdir.CONFIG).is_file():
        return [root]
    runs = sorted(path.parent for path in root.glob(f"*/**/{workdir.CONFIG}"))
    if not runs:
        raise UserError(f"{directory} is no run and holds none: no {workdir.CONFIG} was found.")
    return runs


def has_checkpoints(run: Path) -> bool:
    """Whether a run has saved anything yet."""
    return (run / checkpoint.FOLDER).is_dir()


def finished(run: Path) -> bool:
    """Whether a run's last checkpoint is there, so that no new one will come."""
    train = workdir.read_config(run)["train"]
    steps = checkpoint.saved_steps(run) if has_checkpoints(run) else []
    return bool(steps) and steps[-1] * train["batch_size"] >= train["total_images"]


def judge_once(
    args: argparse.Namespace, run: str, step: int, tools: Tools, repeats: list[list[int]]
) -> None:
    """Judges one checkpoint unless its results are there; they are printed either way."""
    path = history.results_file(run)
    known = {history.key_of(r): r for r in history.read(path)}
    args = argparse.Namespace(**{**vars(args), "workdir": run})
    wanted = expected_keys(args, step, tools, repeats)
    if all(key in known for key in wanted):
        for key in wanted:
            emit(known[key])
        return
    try:
        for record in judge(args, step, tools, repeats):
            if history.key_of(record) not in known:
                history.append(path, record)
            emit(record)
    except UserError:
        if step in checkpoint.saved_steps(run):
            raise
        say(f"{run}: the checkpoint of step {step} was removed before it could be judged; skipped")


def expected_keys(
    args: argparse.Namespace, step: int, tools: Tools, repeats: list[list[int]]
) -> list[str]:
    """The keys of all results that judging a checkpoint gives."""
    config = override(factory.config_from_dict(workdir.read_config(args.workdir)), args.overrides)
    labels = {
        **experiment.about(interop.Pretrained(None, {}, config), args.weights, step),
        "detector_hash": tools.detector.hash,
        "reference_hash": tools.reference.hash,
    }
    texts = [report.seeds_text(seeds) for seeds in repeats]
    parts: list[report.Record] = [{"seeds": text} for text in texts]
    if len(repeats) > 1:
        parts.append({"seeds": texts, "repeats": len(repeats)})
    names = report.metric_names(tools.metrics, tools.detector, len(repeats[0]))
    return [history.key_of({**labels, **part, "metric": n}) for part in parts for n in names]


def summarise(
    args: argparse.Namespace, runs: list[Path], tools: Tools, repeats: list[list[int]]
) -> None:
    """Writes the table (also to stderr) and a plot per metric; with repeats, of the minima."""
    names = report.metric_names(tools.metrics, tools.detector, len(repeats[0]))
    found: dict[str, list[report.Record]] = {}
    for run in runs:
        known = {history.key_of(r): r for r in history.read(history.results_file(run))}
        steps = sorted({r["step"] for r in known.values()})
        local = argparse.Namespace(**{**vars(args), "workdir": str(run)})
        keys = [k for s in steps for k in expected_keys(local, s, tools, repeats)[-len(names) :]]
        found[run.name] = [known[key] for key in keys if key in known]
    folder = Path(args.workdir) / history.FOLDER
    text = history.table(found)
    say(text)
    with workdir.plain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_atomically(folder / "table.txt", text + "\n")
        for name in names:
            history.plot(found, name, folder / f"{name}.png")
    say(f"table and plots: {folder}")


VERBS = {"ref": run_ref, "calc": run_calc, "gen": run_gen, "all": run_all}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; a user's mistake is one plain message and status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args, overrides = build_parser().parse_known_args(argv)
    args.overrides = overrides
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    try:
        if overrides and args.verb in ("ref", "calc"):
            raise UserError(f"{overrides[0]} is not an option of {args.verb}.")
        VERBS[args.verb](args)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
