"""Measure how close generated images are to real ones; one JSON line per result on stdout.

    python eval_fid.py ref  --data=NAME|FOLDER|ZIP|NPZ --dest=stats.npz
    python eval_fid.py calc --images=FOLDER|ZIP|NPZ|NAME --ref=stats.npz
    python eval_fid.py gen  --workdir=DIR|FILE --ref=stats.npz --num=50000 [--seeds=0-49999]
    python eval_fid.py all  --workdir=DIR --ref=stats.npz [--follow]

`--help` after a verb lists its options; docs/evaluation.md says what the numbers mean.
"""

import argparse
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion_jax import cli, judging, processes
from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier, history, images, report
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect_resumable, forget
from lora_diffusion_jax.evaluation.evaluator import Tools, prepare
from lora_diffusion_jax.evaluation.features import Detector, cache_folder
from lora_diffusion_jax.evaluation.npz import check_target
from lora_diffusion_jax.evaluation.references import (
    FEATURES,
    choose_detector,
    keeps_features,
    make_reference,
)
from lora_diffusion_jax.evaluation.report import say
from lora_diffusion_jax.evaluation.statistics import save_reference


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ref|calc|gen|all")
    ref = verbs.add_parser("ref", help="statistics of a data set, in EDM's npz format")
    ref.add_argument("--data", required=True, help="TFDS name, folder, ZIP or npz of images")
    ref.add_argument("--dest", required=True, help="the npz to write")
    ref.add_argument("--keep_features", action="store_true", help="keep every image's features")
    calc = verbs.add_parser("calc", help="judge images in a folder, ZIP or npz")
    calc.add_argument("--images", required=True, help="folder, ZIP or npz of images; TFDS name")
    for verb in (ref, calc):
        verb.add_argument("--data_dir", help="where TFDS data sets lie")
        verb.add_argument("--split", help="TFDS split or slice; default: train")
    gen = verbs.add_parser("gen", help="judge a network's samples without writing them")
    every = verbs.add_parser("all", help="judge every checkpoint of a run or a sweep")
    for verb in (gen, every):
        verb.add_argument("--workdir", required=True, help="a run (gen: or a checkpoint file)")
        verb.add_argument("--seeds", help="one per image, for instance 0-49999")
        verb.add_argument("--weights", choices=("ema", "raw"), help="default: ema")
        verb.add_argument("--repeats", type=int, default=1, help="3: the official seed ranges")
        verb.add_argument("--batch_size", type=int, help="images sampled at a time")
    gen.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    every.add_argument("--follow", action="store_true", help="wait for new checkpoints")
    for verb in (ref, calc, gen, every):
        verb.add_argument("--num", type=int, help="number of images; another count is an error")
        verb.add_argument("--features", choices=FEATURES, default="auto")
        verb.add_argument("--inception", help="Inception weights file")
        verb.add_argument("--dinov2", help="DINOv2 weights file")
        verb.add_process_flags()
    for verb in (calc, gen, every):
        verb.add_argument("--ref", required=True, help="statistics written by ref, or EDM's")
        verb.add_argument("--metrics", default="fid", help=",".join(report.METRICS))
    return parser


def emit(record: report.Record) -> None:
    """Prints one result."""
    print(report.to_line(record), flush=True)


# Images in files.


def open_images(args: argparse.Namespace, named: str) -> tuple[Source, str, str]:
    """The images that --data or --images names, what to call them, and what tells a change."""
    path = Path(named).expanduser()
    if not named:
        raise UserError("No images are named: give a folder, a ZIP, an npz or a TFDS data set.")
    is_file = path.suffix in (".npz", ".zip") or path.exists() or named.startswith((".", "/", "~"))
    if is_file and (args.split or args.data_dir):
        raise UserError(
            f"--split and --data_dir are for TFDS data sets; {named} is read whole. Leave them out."
        )
    if path.suffix == ".npz":
        source = images.ArraySource(images.open_npz(path))
        return source, str(path), source.fingerprint()
    if is_file:
        source = open_source(path=str(path))
        return source, str(path), f"{source.fingerprint()} {images.newest_change(path)}"
    try:
        split = args.split or "train"
        source = open_source(named, args.data_dir or "", "", split)
    except UserError as error:
        raise UserError(
            f"There is no file or folder {named}, and as a TFDS name: {error}"
        ) from error
    return source, f"{named}[{split}]", source.fingerprint()


def features_of(
    detector: Detector, source: Source, changed: str, keep_rows: bool
) -> tuple[FeatureSet, Path]:
    """The features of all images of a source, and the folder of partial sums to be forgotten.

    Args:
        detector: the feature space.
        source: the images.
        changed: another text whenever the images are others.
        keep_rows: keep every image's features.
    """
    identity = {"images": changed, "code": report.source_hash()}
    key = report.to_line({"images": changed, "detector": detector.hash, "rows": keep_rows})
    folder = cache_folder() / "partial" / hashlib.sha256(key.encode()).hexdigest()[:16]
    found = collect_resumable(
        detector,
        lambda done: images.source_batches(source, skip=done),
        len(source),
        folder,
        identity=identity,
        keep_rows=keep_rows,
        progress=True,
    )
    return found, folder


def run_ref(args: argparse.Namespace) -> None:
    """Writes the statistics of a data set."""
    check_target(args.dest)
    source, where, changed = open_images(args, args.data)
    images.check_count(len(source), args.num, where)
    detector = choose_detector(args.features, inception=args.inception, dinov2=args.dinov2)
    if detector is None:
        if args.features == "classifier" and source.num_classes < 2:
            raise UserError(f"{where} has no classes to learn; use --features=rotation.")
        detector = classifier.fit(source, use_labels=args.features != "rotation")
        processes.barrier("training the feature network", judging.METRICS_LIMIT)
        processes.check_same("the feature network", detector.hash)
        say(f"features: {detector.name}, trained on these images")
    keep = keeps_features(detector, len(source), args.keep_features)
    found, folder = features_of(detector, source, changed, keep)
    if not processes.is_leader():
        return
    about = {"data": where, "image_shape": list(source.image_shape)}
    reference = make_reference(detector, found, about)
    save_reference(args.dest, reference)
    facts = {k: v for k, v in reference.meta.items() if k not in ("recipe", "n")}
    emit({"reference": args.dest, "n": len(source), **facts, "reference_hash": reference.hash})
    forget(folder)


def prepared(args: argparse.Namespace) -> Tools:
    """Metrics, reference and detector of calc, gen and all."""
    return prepare(args.metrics, args.ref, args.features, args.inception, args.dinov2)


def run_calc(args: argparse.Namespace) -> None:
    """Judges images that lie in files."""
    source, where, changed = open_images(args, args.images)
    images.check_count(len(source), args.num, where)
    tools = prepared(args)
    tools.check_counts(len(source))
    tools.check_shape(source.image_shape, where)
    found, folder = features_of(tools.detector, source, changed, tools.needs_rows)
    for record in judging.while_the_others_wait(tools.records(found, {"images": where})):
        emit(record)
    if processes.is_leader():
        forget(folder)


# Networks.


def plan_of(args: argparse.Namespace) -> judging.Plan:
    """What of a network to sample."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}; it must be at least 1.")
    return judging.Plan(
        judging.repeat_seeds(args.seeds, args.num, args.repeats),
        judging.choose_weights(args.workdir, args.weights),
        tuple(args.overrides),
        args.batch_size,
    )


def run_gen(args: argparse.Namespace) -> None:
    """Judges the samples of one network."""
    choose = functools.partial(judging.choose_step, args.workdir, args.step)
    step, plan = processes.from_leader("choosing the checkpoint", choose), plan_of(args)
    tools = prepared(args)
    tools.check_counts(plan.count)
    for record in judging.judge(args.workdir, step, plan, tools):
        if step is not None:
            history.append(history.results_file(args.workdir), record)
        emit(record)


def run_all(args: argparse.Namespace) -> None:
    """Judges every checkpoint of a run or of all runs below a folder; what is done is skipped."""
    judging.find_runs(args.workdir)
    plan, tools = plan_of(args), prepared(args)
    tools.check_counts(plan.count)
    for record in judging.judge_all(args.workdir, plan, tools, follow=args.follow):
        emit(record)


VERBS = {"ref": run_ref, "calc": run_calc, "gen": run_gen, "all": run_all}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    return cli.run(work, argv)


def work(argv: list[str]) -> int:
    """Runs a verb; returns the exit status."""
    argv, name, overrides = cli.take_config(argv)
    args = build_parser().parse_args(argv)
    args.overrides = overrides
    if name is not None:
        raise UserError(f"--config={name}: the network's own config is used; override its fields.")
    if overrides and args.verb in ("ref", "calc"):
        raise UserError(f"{overrides[0]}: {args.verb} has no config; gen and all have.")
    with cli.joined(args):
        return cli.cut_short(functools.partial(VERBS[args.verb], args), "saving what is done")


if __name__ == "__main__":
    sys.exit(main())
