"""Reference statistics, and how close images or the samples of networks come to them."""

import argparse
import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import cli, files, generate, interop, processes, remote
from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import images, results, runs
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect_resumable
from lora_diffusion_jax.evaluation.detectors import FEATURES, detector_for_source
from lora_diffusion_jax.evaluation.evaluator import METRICS, Evaluator, open_evaluator
from lora_diffusion_jax.evaluation.features import Detector, cache_folder
from lora_diffusion_jax.evaluation.references import make_reference, save_reference
from lora_diffusion_jax.evaluation.results import Record
from lora_diffusion_jax.factory.objectives import sampler_settings
from lora_diffusion_jax.factory.pretrained import config_from_dict, load_workdir, with_config
from lora_diffusion_jax.factory.sampling import open_generator, prepare
from lora_diffusion_jax.npz import check_target
from lora_diffusion_jax.training import checkpoint, workdir

HELP = """FID and other distances between images and a data set. Each result is one line of JSON on stdout.

what to do:
  ref   write the statistics of a data set, once; the others compare with them
  calc  evaluate images in a folder, ZIP or npz
  gen   sample a run or a checkpoint file and evaluate that, without writing images
  all   evaluate every checkpoint of a run, or of all runs below a folder

the commands used most:
  %(prog)s ref  --data=cifar10 --data_dir=DIR --dest=cifar10.npz
  %(prog)s gen  --workdir=RUN --ref=cifar10.npz --num=50000
  %(prog)s gen  --workdir=RUN --ref=cifar10.npz --repeats=3 --config.sampler.num_steps=18
  %(prog)s all  --workdir=RUN --ref=cifar10.npz --follow
  %(prog)s calc --images=FOLDER --ref=cifar10.npz --metrics=fid,kid,is

options:        --help after a verb lists its own: %(prog)s gen --help
config fields:  --helpfull lists them with their defaults; gen and all take them
documentation:  docs/evaluation.md of the repository explains the numbers; `make docs` builds pages
"""
MAX_REPEATS = 100
SMALL_BYTES = 64 * 2**20  # features up to this size go into a reference without --keep_features


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    return cli.run(work, argv)


def work(argv: list[str]) -> int:
    """Runs a verb; returns the exit status."""
    argv, name, overrides = cli.take_config(argv)
    args = build_parser().parse_args(argv)
    args.overrides = overrides
    if args.verb in ("gen", "all"):
        args.workdir = interop.local(args.workdir, "--workdir")
    if name is not None:
        raise UserError(f"--config={name}: a network keeps its config; override single fields.")
    if overrides and args.verb in ("ref", "calc"):
        raise UserError(f"{overrides[0]}: {args.verb} has no config, only gen and all have one.")
    with cli.joined(args):
        return cli.cut_short(functools.partial(VERBS[args.verb], args), "saving what is done")


def build_parser() -> cli.Parser:
    """The verbs and their flags."""
    parser = cli.Parser(description=HELP)
    parser.add_config_help(with_file=False)
    add = parser.add_subparsers(dest="verb", required=True, metavar="ref|calc|gen|all").add_parser
    ref = add("ref", help="statistics of a data set, in EDM's npz format")
    ref.add_path("--data", required=True, help="TFDS name, folder, ZIP or npz of images")
    ref.add_path("--dest", required=True, help="the npz to write")
    ref.add_argument("--keep_features", action="store_true", help="keep every image's features")
    calc = add("calc", help="evaluate images in a folder, ZIP or npz")
    calc.add_path("--images", required=True, help="folder, ZIP or npz of images; TFDS name")
    for verb in (ref, calc):
        verb.add_path("--data_dir", help="directory of TFDS data sets, or of files for --data=hf")
        verb.add_argument("--split", help="split or slice of a named data set; default: train")
        verb.add_argument("--image_key", default="", help="of hf:OWNER/NAME: column of the images")
        verb.add_argument(
            "--class_folders", action="store_true", help="an image's first folder is its class"
        )
        verb.add_argument("--background", default="", help="colour behind transparent pixels")
    gen = add("gen", help="evaluate a network's samples without writing them")
    every = add("all", help="evaluate every checkpoint of a run or a sweep")
    for verb in (gen, every):
        text = "a run, or its URL (gen: or a checkpoint file, or hf://OWNER/NAME)"
        verb.add_path("--workdir", required=True, urls=True, help=text)
        verb.add_argument("--seeds", help="one per image, for instance 0-49999")
        verb.add_argument("--weights", choices=("ema", "raw"), help="default: ema")
        verb.add_argument("--repeats", type=int, default=1, help="3: the official seed ranges")
        verb.add_argument("--batch_size", type=int, help="images sampled at a time")
        verb.add_config_help(with_file=False)
    gen.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    every.add_argument("--follow", action="store_true", help="wait for new checkpoints")
    for verb in (ref, calc, gen, every):
        verb.add_argument("--num", type=int, help="number of images; another count is an error")
        verb.add_argument("--features", choices=FEATURES, default="auto")
        verb.add_path("--inception", help="Inception weights file")
        verb.add_path("--dinov2", help="DINOv2 weights file")
        verb.add_process_flags()
    for verb in (calc, gen, every):
        verb.add_path("--ref", required=True, help="statistics written by ref, or EDM's")
        verb.add_argument("--metrics", default="fid", help=",".join(METRICS))
    return parser


def emit(record: Record) -> None:
    """Prints one result."""
    print(results.to_line(record), flush=True)


@contextlib.contextmanager
def naming_flags(flag: str) -> Iterator[None]:
    """Errors of the data, which speak of the config of main.py, in the flags of this program."""
    try:
        yield
    except UserError as error:
        flags = {"name": flag, "path": flag}
        fields = r"(?<![\w/])data\.(name|path|data_dir|split|class_folders|background|image_key)\b"
        text = re.sub(fields, lambda m: f"--{flags.get(m[1], m[1])}", str(error))
        raise UserError(text) from error


@naming_flags("data")
def run_ref(args: argparse.Namespace) -> None:
    """Writes the statistics of a data set."""
    check_target(args.dest)
    source, where, identity = open_images(args, "data")
    detector = detector_for_source(source, args.features, args.inception, args.dinov2)
    small = 4 * len(source) * detector.feature_dim <= SMALL_BYTES
    found = _features_of(detector, source, identity, args.keep_features or small)
    if processes.is_leader():
        about = {"data": where, "image_shape": list(source.image_shape)}
        reference = make_reference(detector, found, about)
        save_reference(args.dest, reference)
        facts = {k: v for k, v in reference.meta.items() if k not in ("recipe", "n")}
        emit({"reference": args.dest, "n": len(source), **facts, "reference_hash": reference.hash})
        found.remove_partial()


@naming_flags("images")
def run_calc(args: argparse.Namespace) -> None:
    """Evaluates images in files."""
    source, where, identity = open_images(args, "images")
    evaluator = _open_evaluator(args)
    evaluator.check(len(source), source.image_shape, where)
    evaluator.check_classes(0, where)
    found = _features_of(evaluator.detector, source, identity, evaluator.needs_rows)
    for record in evaluator.records(found, {"images": where}):
        emit(record)
    found.remove_partial()


def run_gen(args: argparse.Namespace) -> None:
    """Evaluates the samples of one network."""
    where = remote.local(args.workdir)
    choose = functools.partial(_choose_step, where, args.step)
    step = processes.from_leader("choosing the checkpoint", choose)
    repeats, run = repeat_seeds(args), _run_at(args, where)
    evaluator = _open_evaluator(args)
    evaluator.check(len(repeats[0]), None, where)
    for record in runs.evaluate(run, step, repeats, evaluator):
        if step is not None:
            results.append(results.results_file(where), record)
        emit(record)


def run_all(args: argparse.Namespace) -> None:
    """Evaluates every checkpoint of a run, or of all runs below a folder; skips known results."""
    root = remote.local(args.workdir)
    find = functools.partial(find_runs, root)
    find()  # an error now if there are none
    repeats, run_at = repeat_seeds(args), functools.partial(_run_at, args)
    evaluator = _open_evaluator(args)
    evaluator.check(len(repeats[0]), None, root)
    for record in runs.evaluate_all(
        Path(root), find, run_at, repeats, evaluator, follow=args.follow
    ):
        emit(record)


VERBS = {"ref": run_ref, "calc": run_calc, "gen": run_gen, "all": run_all}


def _open_evaluator(args: argparse.Namespace) -> Evaluator:
    return open_evaluator(args.metrics, args.ref, args.features, args.inception, args.dinov2)


def _features_of(
    detector: Detector, source: Source, identity: Record, keep_rows: bool
) -> FeatureSet:
    return collect_resumable(
        detector,
        lambda done: images.source_batches(source, skip=done),
        len(source),
        cache_folder(),
        identity,
        keep_rows=keep_rows,
    )


# Images in files.


def open_images(args: argparse.Namespace, flag: str) -> tuple[Source, str, Record]:
    """Opens the images that --data or --images names.

    Returns:
        (the images, their name, JSON values that change when they do).

    Raises:
        UserError: they cannot be opened, or there are not exactly --num.
    """
    named = getattr(args, flag)
    if not named:
        raise UserError(f"--{flag} is empty; give a folder, a ZIP, an npz or a TFDS data set.")
    path = Path(named)
    is_file = path.suffix in (".npz", ".zip") or path.exists() or named.startswith((".", "/"))
    if is_file and (args.split or args.data_dir or args.image_key):
        raise UserError(
            f"--split, --data_dir and --image_key apply to named data sets; {named} is read whole. Omit them."
        )
    split = args.split or "train"
    try:
        source: Source
        if path.suffix == ".npz":
            source = images.ArraySource(images.open_npz(path))
        elif is_file:
            source = open_source(
                path=str(path), class_folders=args.class_folders, background=args.background
            )
        else:
            source = open_source(
                named,
                args.data_dir or "",
                "",
                split,
                class_folders=args.class_folders,
                background=args.background,
                image_key=args.image_key,
            )
    except UserError as error:
        unknown = "" if is_file else f"There is no file or folder {named}, and as a TFDS name: "
        raise UserError(f"{unknown}{error}") from error
    where = str(path) if is_file else f"{named}[{split}]"
    check_pictures(where, source.image_shape[2], getattr(source, "dtype", np.uint8))
    if len(source) < 2:
        raise UserError(f"{where} holds {len(source)} images; a distance needs at least 2.")
    if args.num not in (None, len(source)):
        raise UserError(
            f"{where} holds {len(source)} images, but --num={args.num}; a subset is never chosen "
            "silently. Give exactly the images to evaluate, or omit --num."
        )
    changed = newest_change(path) if is_file else 0
    return source, where, {"images": source.fingerprint(), "changed": changed}


def check_pictures(where: str, channels: int, dtype: np.dtype | type) -> None:
    """Raises UserError for arrays that the feature networks, which see pictures, cannot judge."""
    if dtype != np.uint8 or channels not in (1, 3):
        kind = "floats" if dtype != np.uint8 else f"{channels} channels"
        raise UserError(
            f"{where} holds arrays of {kind}; FID and the other metrics need images, uint8 with 1 or 3 "
            "channels. Decode them first."
        )


def newest_change(path: Path) -> int:
    """When a file, or anything below a folder, last changed: nanoseconds since 1970."""
    below = (Path(parent, n) for parent, *both in files.walk(path) for names in both for n in names)
    return max(p.lstat().st_mtime_ns for p in (path, *below))  # links may be broken


# Networks.


def repeat_seeds(args: argparse.Namespace) -> list[list[int]]:
    """The seeds of each of --repeats: --seeds or the first --num, then the ones that follow.

    Raises:
        UserError: options that contradict one another, a repeated seed, fewer than 2.
    """
    text, num, repeats = args.seeds, args.num, args.repeats
    if not 1 <= repeats <= MAX_REPEATS:
        raise UserError(f"--repeats={repeats}; choose 1 to {MAX_REPEATS} (papers use 3).")
    if num is not None and num < 2:
        raise UserError(f"--num={num}; a distance needs at least 2 images.")
    text = text or f"0-{(num or 50_000) - 1}"
    seeds = generate.parse_seeds(text)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={text} repeats a seed; its image would count twice.")
    if num not in (None, len(seeds)):
        raise UserError(
            f"--seeds={text} has {len(seeds)} seeds, but --num={num}. Omit one of them."
        )
    stride = max(seeds) - min(seeds) + 1
    last = max(seeds) + stride * (repeats - 1)
    if last > generate.MAX_SEED:
        raise UserError(
            f"--repeats={repeats} of these seeds would reach {last}; the largest seed is "
            f"{generate.MAX_SEED}. Choose lower seeds or fewer repeats."
        )
    return [[seed + stride * k for seed in seeds] for k in range(repeats)]


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's directory or a checkpoint file, as `evaluation.runs` wants it.

    Attributes:
        where: its path.
        weights: ema or raw.
        overrides: `--config.a.b=value` arguments.
        batch_size: images sampled at a time; None: the config's.
    """

    where: str
    weights: str
    overrides: Sequence[str] = ()
    batch_size: int | None = None

    def steps(self) -> list[int]:
        """The steps of its checkpoints, in order."""
        return checkpoint.saved_steps(self.where)

    def is_complete(self) -> bool:
        """Whether its last checkpoint exists; an imported network has step 0 alone."""
        train, steps = self._config.train, self.steps()
        return steps == [0] or bool(steps) and steps[-1] * train.batch_size >= train.total_images

    def settings(self, step: int) -> Record:
        """The labels of its results that come from its config."""
        return _settings(self._config, self.weights, step)

    @functools.cached_property
    def _config(self) -> ConfigDict:
        return cli.override(config_from_dict(workdir.read_config(self.where)), self.overrides)

    def open(self, step: int | None) -> runs.Network:
        """The network of one checkpoint; None for a file."""
        if step is None:
            loaded = interop.load_pretrained(self.where)
        else:
            loaded = load_workdir(self.where, weights=self.weights, at_step=step)
        config = cli.override(loaded.config, self.overrides)
        dtype = np.float32 if config.data.floats else np.uint8
        check_pictures(f"The run {self.where}", config.data.channels, dtype)
        config.sampler.batch_size = self.batch_size or config.sampler.batch_size
        loaded = prepare(with_config(loaded, config))
        seen = None if step is None else step * config.train.batch_size
        labels = {**_settings(config, self.weights, step), "images_seen": seen}
        if levels := loaded.config.sampler.get("sigmas"):  # which a search may have found
            labels["sigmas"] = list(levels)
        return runs.Network(open_generator(loaded), loaded.sampled_variables, labels)


def _settings(config: ConfigDict, weights: str, step: int | None) -> Record:
    sampler = sampler_settings(config)
    how = {"sampler": sampler, "lora": config.lora.mode, "dtype": config.dtype}
    return {"weights": weights, "step": step, **how}


def _run_at(args: argparse.Namespace, where: str) -> SavedRun:
    where = remote.local(where) if remote.is_url(where) else where
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}; it must be at least 1.")
    weights = args.weights or "ema"
    if Path(where).is_file():  # a file holds one kind; snapshots are averages
        weights = interop.weights_in(where)
        if args.weights not in (None, weights):
            raise UserError(f"{where} holds {weights} weights; omit --weights={args.weights}.")
    return SavedRun(where, weights, tuple(args.overrides), args.batch_size)


def _choose_step(where: str, step: int | None) -> int | None:
    """The step to evaluate: the one requested, else the newest; None for a checkpoint file.

    Raises:
        UserError: neither a run nor a file, no checkpoint, or a step of a file.
    """
    if not where or not (Path(where).exists() or _runs_below(where)):
        raise UserError(f"--workdir={where} does not exist; name a run or a checkpoint file.")
    if Path(where).is_file():
        if step is not None:
            raise UserError(f"{where} is a file, which has no steps; omit --step={step}.")
        return None
    if not (Path(where) / workdir.CONFIG).is_file() and _runs_below(where):
        raise UserError(
            f"{where} is not a run but contains some. Evaluate one of them with gen, or all with: "
            f"eval_fid.py all --workdir={where}"
        )
    workdir.read_config(where)  # a plain error if it is not a run
    steps = checkpoint.saved_steps(where)
    if not steps:
        raise UserError(f"{where} has no checkpoint yet.")
    return steps[-1] if step is None else step


def _runs_below(directory: str) -> list[str]:
    remote.fetch_configs(Path(directory), workdir.CONFIG)
    return sorted(str(path.parent) for path in Path(directory).glob(f"*/**/{workdir.CONFIG}"))


def find_runs(directory: str) -> list[str]:
    """The run in a directory, or all runs below it; UserError if there are none."""
    if (Path(directory) / workdir.CONFIG).is_file():
        return [directory]
    found = _runs_below(directory)
    if not found:
        raise UserError(f"{directory} is not a run and contains none: it has no {workdir.CONFIG}.")
    return found
