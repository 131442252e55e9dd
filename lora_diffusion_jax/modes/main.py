"""Train, sample, describe, import and export diffusion networks with conditioned LoRA."""

# Each mode imports what it needs: --help and mistakes in flags answer at once.

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from lora_diffusion_jax import cli, files, memory, processes, remote
from lora_diffusion_jax.errors import UserError

if TYPE_CHECKING:
    from lora_diffusion_jax.factory.pretrained import Pretrained

HELP = """Diffusion networks whose attention layers carry conditioned low-rank adapters (LoRA): training,
sampling, analysis. A run is a directory, --workdir; the same command again resumes it. A config is
a Python file or the name of a packaged one (digits, cifar10_edm, ...).

modes:
  train       train a config in a workdir, or go on with the run that is there
  sample      write images of a run: a folder, an .npz, or a grid as .png
  info        parameters, LoRA sites and data set of a config; time, memory and disk a run takes here
  doctor      versions, devices, memory, disk, data and checkpoints, and what is wrong with them
  analyze     what the adapters do: composition weights, norms, losses without them, conditions between
  likelihood  bits per dimension of held-out images
  sweep       many runs of one config, several at a time, and a page that compares them
  compare     kinds of runs of a sweep seed by seed: held-out loss per noise level, intervals, p
  import      turn an official checkpoint or an export into a workdir
  export      write weights as safetensors, or the whole sampler as a program
  push        write a folder for the Hugging Face Hub, with a model card, and upload it

the commands used most:
  %(prog)s --mode=train  --config=digits --workdir=DIR --config.lora.rank=8
  %(prog)s --mode=sample --workdir=DIR --seeds=0-63 --out=grid.png
  %(prog)s --mode=info   --config=cifar10_edm --config.dtype=bfloat16
  %(prog)s --mode=doctor --workdir=DIR
  %(prog)s --mode=sweep  --config=digits --workdir=DIR2 --sweep='lora.rank=1,2,4;train.seed=0-2'

config fields:  --helpfull lists them with their defaults (lora_diffusion_jax/default_config.py)
evaluation:     eval_fid.py --help (installed: lora-diffusion-fid)
documentation:  README.md and docs/ of the repository; `make docs` builds pages of them
"""


def build_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(description=HELP)
    add = parser.add_argument
    add("--mode", required=True, choices=MODES, help="what to do, see above")
    text = (
        "directory of the run, or gs://BUCKET/PATH, s3://...; without --config, its config is used, and "
        "overrides apply to it; sample, likelihood, analyze, export, info, push: or a file of weights, hf://..."
    )
    parser.add_path("--workdir", urls=True, help=text)
    add("--seeds", help="sample: one image per seed, such as 0,5,7-9; default: 0-63 (analyze: 0-7)")
    add(
        "--class_id",
        help="sample: a class's number or name (number:1, name:1 where both fit), or `all`",
    )
    add(
        "--weights",
        choices=("ema", "raw"),
        help="sample, likelihood, analyze, export, push: which; default: ema",
    )
    add(
        "--step",
        type=int,
        help="sample, likelihood, analyze, export, push: checkpoint; default: the newest",
    )
    add(
        "--num",
        type=int,
        help="likelihood: how many held-out images; default: up to 1000. analyze: how many training "
        "images for the losses; default: up to 32; 0: no losses. compare: how many held-out images",
    )
    add("--route", choices=("vlb", "ode"), help="likelihood: variational bound or probability flow")
    add("--classes", help="analyze: samples in between two classes, such as 3,8 or cat,dog")
    add(
        "--noise_factor",
        type=float,
        help="analyze: samples with a condition of so many times the noise level, such as 2",
    )
    add(
        "--guidance",
        type=float,
        help="analyze: samples with a class's condition led away from that of no class, up to this "
        "weight, such as 4; the class is the first of --classes, or 0",
    )
    parser.add_path(
        "--out",
        help="sample: folder, .npz or .png (a grid); analyze, compare, push: folder; export: .safetensors",
    )
    parser.add_path("--source", urls=True, help="import: the checkpoint file, or hf://OWNER/NAME")
    parser.add_path(
        "--base", urls=True, help="import: for a file of adapters alone, the base's file or workdir"
    )
    add("--repo", default="", help="push: OWNER/NAME on the Hugging Face Hub")
    add("--license", default="", help="push: its identifier on the Hub, such as apache-2.0")
    parser.add_switch("private", False, "push: a repository that is created is private")
    add("--sweep", help="sweep: FIELD=VALUE,VALUE;...; default: what sweep(add) of --config adds")
    add(
        "--against",
        help="compare: the kind of runs that the others are compared with, such as mode=baseline; several "
        "in quotes: 'A;B'",
    )
    add("--jobs", type=int, help="sweep: runs at a time; default: one per GPU or TPU chip")
    launchers = ("local", "print", "slurm")
    add("--launcher", default="local", choices=launchers, help="sweep: how the runs are started")
    text = "sweep: of --launcher=slurm, such as partition=gpu;timeout_min=600;gpus_per_node=1"
    add("--slurm", default="", help=text)
    parser.add_switch(
        "overwrite",
        False,
        "sample: remove other samples from the folder --out; analyze, compare: replace earlier files there; "
        "push: files",
    )
    parser.add_switch("adapters_only", False, "export: leave the base out")
    text = "export: the weights, or the whole sampler as a program for JAX alone"
    add("--what", default="network", choices=("network", "sampler"), help=text)
    add(
        "--measure",
        default="auto",
        choices=("auto", "step", "off"),
        help="info: what is run to tell what a run takes; auto: the training step, on a CPU only if it is "
        "small; step: the step; off: nothing",
    )
    parser.add_config_help(with_file=True)
    parser.add_process_flags()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    return cli.run(work, argv)


def work(argv: list[str]) -> int:
    """Does what --mode says; returns the exit status."""
    given = argv
    argv, name, overrides = cli.take_config(given)
    args, flags = build_parser().parse_given(argv)
    mode = MODES[args.mode].work
    check_flags(args, flags)
    args.workdir = local_workdir(args)
    if args.mode in ("sweep", "compare"):
        if remote.is_url(args.workdir):
            raise UserError(
                f"--workdir={args.workdir}: a sweep keeps its state on this machine's disks; give a folder."
            )
        return sweep(args, name, overrides) if mode is sweep else compare(args, name, overrides)
    config = read_config(args, name)
    if overrides:
        if config is None:
            raise UserError(f"{overrides[0]}: there is no config; give --config or --workdir.")
        config = cli.override(config, overrides)
    if mode is doctor:  # it must work where joining or the cache does not
        return doctor(args, config)
    args.gives_data = any(re.match(r"--config\.data\.(name|path|data_dir)=.", o) for o in overrides)
    if args.mode == "train":
        memory.allocate_in_caller()
    with cli.joined(args, config):
        args.command = shlex.join([*cli.program(), *given])
        if mode in (info, import_file, export_file, push_run, analyze) and not processes.alone():
            raise processes.SharedError(f"--mode={args.mode} runs in a single process.")
        return mode(args, config)


def check_flags(args: argparse.Namespace, given: Collection[str]) -> None:
    """Raises UserError if a mode lacks a flag that it needs, or would ignore one that was given."""
    mode = MODES[args.mode]
    missing = [f"--{flag}" for flag in mode.needs if not getattr(args, flag)]
    if missing:
        raise UserError(f"--mode={args.mode} needs {' and '.join(missing)}.")
    read = {"mode", "debug", *mode.needs, *mode.reads}
    if unread := sorted(set(given) - read):
        others = [
            name for name, other in MODES.items() if unread[0] in (*other.needs, *other.reads)
        ]
        raise UserError(
            f"--mode={args.mode} does not read --{unread[0]}, which is for "
            f"{' and '.join(f'--mode={name}' for name in others)}; leave it out."
        )


def local_workdir(args: argparse.Namespace) -> str | None:
    """--workdir on this machine: a file of weights where a mode takes one, fetched from the Hub if need be.

    Raises:
        UserError: the mode needs a directory, or it cannot be fetched.
    """
    if args.workdir is None or args.mode in FILE_MODES:
        from lora_diffusion_jax.interop.hub import local

        return args.workdir and local(args.workdir, "--workdir")
    if args.workdir.startswith(files.HUB) or Path(args.workdir).is_file():
        kind = "on the Hub" if args.workdir.startswith(files.HUB) else "a file"
        raise UserError(
            f"--workdir={args.workdir} is {kind}, but --mode={args.mode} needs a directory. Start a run from "
            "it with --config.init_from, or make it one with --mode=import --source."
        )
    return args.workdir


def open_run(args: argparse.Namespace) -> "tuple[Pretrained, str]":
    """The network of --workdir, a directory or a file, and which weights these are, ema or raw.

    Raises:
        UserError: it cannot be read, or a file has no such weights or steps.
    """
    from lora_diffusion_jax import interop
    from lora_diffusion_jax.factory.pretrained import load_workdir

    if not Path(args.workdir).is_file():
        weights = args.weights or "ema"
        return load_workdir(args.workdir, weights=weights, at_step=args.step), weights
    if args.step is not None:
        raise UserError(f"{args.workdir} is a file, which has no steps; omit --step={args.step}.")
    loaded, weights = interop.load_pretrained(args.workdir), interop.weights_in(args.workdir)
    if args.weights not in (None, weights):
        raise UserError(f"{args.workdir} holds {weights} weights; omit --weights={args.weights}.")
    return loaded, weights


def read_config(args: argparse.Namespace, name: str | None) -> ConfigDict | None:
    """The config that --config names, else that of the run in --workdir; None without either."""
    if name is not None:
        return cli.load_config(name)[0]
    if args.workdir is None or args.mode == "import":
        return None
    if args.mode in FILE_MODES and Path(args.workdir).is_file():
        from lora_diffusion_jax import interop

        return interop.load_pretrained(args.workdir).config
    from lora_diffusion_jax.factory.pretrained import config_from_dict
    from lora_diffusion_jax.training import workdir

    try:
        directory = remote.local(args.workdir)
        return config_from_dict(workdir.read_config(directory))
    except UserError as error:
        if args.mode == "doctor":  # which reports it
            return None
        if (
            args.mode == "train"
            and not (Path(remote.local(args.workdir)) / workdir.CONFIG).exists()
        ):
            raise UserError(f"{args.workdir} holds no run; start one with --config.") from error
        raise


def train(args: argparse.Namespace, config: ConfigDict) -> int:
    """Trains, or resumes a run; 128 + the signal's number when a signal stopped it."""
    from lora_diffusion_jax.modes.train import train

    return train(config, remote.local(args.workdir), args.command).exit_code


def sample(args: argparse.Namespace, config: ConfigDict) -> int:
    """Writes samples, and prints what they are as a line of JSON."""
    from lora_diffusion_jax import generate
    from lora_diffusion_jax.factory.objectives import build_sampler, count_evaluations
    from lora_diffusion_jax.factory.pretrained import with_config
    from lora_diffusion_jax.factory.sampling import prepare
    from lora_diffusion_jax.modes.sample import describe, sample
    from lora_diffusion_jax.training.writers import log

    seeds = generate.parse_seeds(args.seeds or "0-63")
    run, weights = open_run(args)
    run = prepare(with_config(run, config))
    about = describe(run.config, weights, run.step)
    status = cli.cut_short(
        lambda: sample(run, seeds, args.class_id, args.out, about, overwrite=args.overwrite)
    )
    if status == 0:
        nfe = count_evaluations(run.config, build_sampler(run.config, run.denoiser), run.denoiser)
        log(json.dumps({"images": len(seeds), "out": args.out, **about, "nfe": nfe}))
    return status


def likelihood(args: argparse.Namespace, config: ConfigDict) -> int:
    """Prints bits per dimension of the held-out images as a line of JSON."""
    from lora_diffusion_jax.factory.pretrained import with_config
    from lora_diffusion_jax.modes.likelihood import measure
    from lora_diffusion_jax.training.writers import log

    run, weights = open_run(args)
    run = with_config(run, config)

    def work() -> None:
        found = measure(run, args.num, args.route)
        log(json.dumps({**found, "weights": weights, "step": run.step}))

    return cli.cut_short(work, "stopping")


def analyze(args: argparse.Namespace, config: ConfigDict) -> int:
    """Writes pictures of what the adapters do, and prints key figures as a line of JSON."""
    from lora_diffusion_jax import generate
    from lora_diffusion_jax.factory.pretrained import with_config
    from lora_diffusion_jax.modes.analyze import analyze
    from lora_diffusion_jax.modes.train import refresh_page
    from lora_diffusion_jax.pages.collect import ANALYSIS
    from lora_diffusion_jax.training.writers import log

    seeds = generate.parse_seeds(args.seeds) if args.seeds else None
    run, weights = open_run(args)
    run = with_config(run, config)

    def work() -> None:
        found = analyze(
            run,
            Path(args.out),
            num=args.num,
            classes=args.classes,
            noise_factor=args.noise_factor,
            guidance=args.guidance,
            seeds=seeds,
            overwrite=args.overwrite,
        )
        directory = Path(remote.local(args.workdir))
        if Path(args.out).resolve() == directory.resolve() / ANALYSIS:
            refresh_page(directory)
        log(json.dumps({**found, "weights": weights, "step": run.step}))

    return cli.cut_short(work, "stopping")


def compare(args: argparse.Namespace, name: str | None, overrides: list[str]) -> int:
    """Compares the kinds of runs of a sweep, and prints key figures as a line of JSON."""
    if given := [*([f"--config={name}"] if name else []), *overrides]:
        raise UserError(f"{given[0]}: the runs of a sweep have their configs; leave it out.")
    from lora_diffusion_jax.modes.compare import compare
    from lora_diffusion_jax.modes.sweep import write_page
    from lora_diffusion_jax.pages.collect import COMPARISON
    from lora_diffusion_jax.sweeps import state
    from lora_diffusion_jax.training.writers import log

    directory = Path(args.workdir).absolute()

    def work() -> None:
        found = compare(
            directory, args.against, Path(args.out), num=args.num, overwrite=args.overwrite
        )
        if Path(args.out).resolve() == directory.resolve() / COMPARISON:
            write_page(directory, state.read(directory))
        log(json.dumps(found))

    with cli.joined(args):
        return cli.cut_short(work, "stopping")


def info(args: argparse.Namespace, config: ConfigDict | None) -> int:
    """Prints parameters, LoRA sites and data set of a config, and what a run of it takes here."""
    from lora_diffusion_jax.modes.estimate import estimate
    from lora_diffusion_jax.modes.info import describe

    if config is None:
        raise UserError("--mode=info needs --config=FILE or --workdir=DIR.")
    found = describe(config, needs_data=args.gives_data)
    print(found.text, flush=True)
    if args.measure != "off":
        try:
            text = estimate(found.config, found.num_images, args.measure)
        except UserError as error:  # it may be meant for other devices, or for sampling alone
            text = f"What this run takes here is not known: {error}"
        print(f"\n{text}")
    return 0


def import_file(args: argparse.Namespace, config: ConfigDict | None) -> int:
    """Turns a checkpoint file into a workdir."""
    from lora_diffusion_jax.modes.checkpoints import import_checkpoint

    count = import_checkpoint(args.source, remote.local(args.workdir), args.base, config)
    print(f"imported {count:,} parameters into {args.workdir}")
    return 0


def export_file(args: argparse.Namespace, config: ConfigDict) -> int:
    """Writes a run's weights as safetensors, or its sampler."""
    from lora_diffusion_jax import interop
    from lora_diffusion_jax.factory.pretrained import with_config

    run, weights = open_run(args)
    run = with_config(run, config)
    if args.what == "sampler":
        from lora_diffusion_jax.factory.sampling import prepare
        from lora_diffusion_jax.interop.sampler_export import export_sampler
        from lora_diffusion_jax.modes.sample import describe

        if args.adapters_only:
            raise UserError("--adapters_only is for weights; a sampler needs the whole network.")
        run = prepare(run)
        export_sampler(args.out, run, describe(run.config, weights, run.step))
        print(f"wrote the sampler with the {weights} weights of step {run.step} to {args.out}")
        return 0
    interop.export_network(
        args.out,
        run.variables,
        run.config,
        weights=weights,  # type: ignore[arg-type]
        adapters_only=args.adapters_only,
    )
    print(f"wrote the {weights} weights of step {run.step} to {args.out}")
    return 0


def push_run(args: argparse.Namespace, config: ConfigDict) -> int:
    """Writes a run as a folder with a model card, and uploads it."""
    from lora_diffusion_jax.factory.pretrained import with_config
    from lora_diffusion_jax.modes.push import push

    run, weights = open_run(args)
    where = push(
        with_config(run, config),
        Path(args.workdir),
        weights=weights,
        repo=args.repo,
        out=args.out or "",
        license_name=args.license,
        private=args.private,
        overwrite=args.overwrite,
    )
    print(f"published the {weights} weights of step {run.step}: {where}")
    if not args.license:
        print("The model card states no licence; --license=apache-2.0, for example, would.")
    return 0


def sweep(args: argparse.Namespace, name: str | None, overrides: list[str]) -> int:
    """Runs many variants of a config; 1 if one of them failed."""
    from lora_diffusion_jax.modes.sweep import sweep

    return sweep(args, name, overrides)


def doctor(args: argparse.Namespace, config: ConfigDict | None) -> int:
    """Prints what is wrong with the machine, the data or a run; 1 if anything is."""
    from lora_diffusion_jax.modes.doctor import examine

    return examine(config, args.workdir and remote.local(args.workdir))


@dataclasses.dataclass(frozen=True)
class Mode:
    """What main.py can do.

    Attributes:
        work: does it; returns the exit status.
        needs: flags that must be given.
        reads: flags that may be given; all others are errors.
    """

    work: Callable[..., int]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


# Modes that take a file of weights for a run.
FILE_MODES = ("sample", "likelihood", "analyze", "export", "info")
_JOINED = tuple(cli.PROCESS_FLAGS)  # of modes that several processes may run together
_WHICH = ("weights", "step")
MODES = {
    "train": Mode(train, ("workdir",), _JOINED),
    "sample": Mode(
        sample, ("workdir", "out"), (*_WHICH, "seeds", "class_id", "overwrite", *_JOINED)
    ),
    "likelihood": Mode(likelihood, ("workdir",), (*_WHICH, "num", "route", *_JOINED)),
    "analyze": Mode(
        analyze,
        ("workdir", "out"),
        (*_WHICH, "seeds", "num", "classes", "noise_factor", "guidance", "overwrite", *_JOINED),
    ),
    "info": Mode(info, (), ("workdir", "measure", *_JOINED)),
    "import": Mode(import_file, ("source", "workdir"), ("base", *_JOINED)),
    "export": Mode(export_file, ("workdir", "out"), (*_WHICH, "what", "adapters_only", *_JOINED)),
    "push": Mode(
        push_run,
        ("workdir",),
        (*_WHICH, "repo", "out", "license", "private", "overwrite", *_JOINED),
    ),
    # It refuses the flags that join processes, with the reason.
    "sweep": Mode(
        sweep,
        ("workdir",),
        ("sweep", "jobs", "launcher", "slurm", *(f for f in _JOINED if "timeout" not in f)),
    ),
    "compare": Mode(compare, ("workdir", "against", "out"), ("num", "overwrite")),
    "doctor": Mode(doctor, (), ("workdir",)),
}
