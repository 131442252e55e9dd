"""Train, sample, describe, import and export diffusion networks with conditioned LoRA.

    python main.py --mode=train  --config=configs/digits.py --workdir=DIR [--config.a.b=value ...]
    python main.py --mode=sample --workdir=DIR --seeds=0-63 [--class_id=3|all] --out=FOLDER|FILE.npz|FILE.png
    python main.py --mode=info   --config=configs/cifar10_edm.py [--config.a.b=value ...]
    python main.py --mode=doctor [--config=FILE|--workdir=DIR]
    python main.py --mode=import --source=FILE --workdir=DIR
    python main.py --mode=export --workdir=DIR --out=FILE.safetensors [--adapters_only]

Without --config, the config of the workdir's run is used; overrides apply to it as well.
"""

import contextlib
import functools
import json
import os
import signal
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lora_diffusion_jax.errors import UserError

ARGUMENTS = ("workdir", "seeds", "class_id", "weights", "step", "out")  # alike in all processes
MODES = ("train", "sample", "info", "doctor", "import", "export")
FLAGS = flags.FLAGS

flags.DEFINE_enum("mode", None, MODES, "What to do.", required=True)
flags.DEFINE_string("workdir", None, "Directory of the run.")
flags.DEFINE_string("seeds", "0-63", "sample: one image per seed, for instance 0-63 or 0,5,7-9.")
flags.DEFINE_string("class_id", None, "sample: a class number, or `all` for an even split.")
flags.DEFINE_enum("weights", "ema", ("ema", "raw"), "sample, export: which weights.")
flags.DEFINE_integer("step", None, "sample, export: checkpoint of this step; default: the newest.")
flags.DEFINE_string("out", None, "sample: folder, .npz or .png (a grid); export: .safetensors.")
flags.DEFINE_string("source", None, "import: the checkpoint file.")
flags.DEFINE_string(
    "base", None, "import: for a file of adapters alone, the base's file or workdir."
)
flags.DEFINE_bool("adapters_only", False, "export: leave the base out.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, of several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_bool(
    "distributed",
    None,
    "Find the others by TPU pod, Slurm, Open MPI or Kubernetes; default: by Slurm.",
)
flags.DEFINE_float("process_timeout", 300.0, "Seconds that processes wait for one another.")


def define_config(argv: list[str]) -> None:
    """Defines --config: the file that is named, or else the config of the run in --workdir.

    Both are locked: an override of a field that does not exist is an error.
    """
    given = [a.lstrip("-").partition("=")[0] for a in argv]
    if "config" in given:
        config_flags.DEFINE_config_file("config", lock_config=True)
        return
    config = ConfigDict()
    workdir = _value(argv, "workdir")
    if workdir is not None and _value(argv, "mode") != "import":
        from lora_diffusion_jax.factory import config_from_dict
        from lora_diffusion_jax.training.workdir import read_config

        # The doctor examines what is there, be it damaged or no run at all.
        with contextlib.suppress(*(UserError,) if _value(argv, "mode") == "doctor" else ()):
            config = config_from_dict(read_config(workdir))
    config_flags.DEFINE_config_dict("config", config, lock_config=True)


def _value(argv: list[str], name: str) -> str | None:
    """The value of a flag in a command line that absl has not read yet: --a=b or --a b."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def need(*names: str) -> None:
    """Raises UserError unless the flags that a mode needs were given."""
    missing = [f"--{name}" for name in names if not FLAGS[name].value]
    if missing:
        raise UserError(f"--mode={FLAGS.mode} needs {' and '.join(missing)}.")


def run(_: list[str]) -> int:
    """Joins the other processes, if there are any, and does what --mode says; the exit status."""
    from lora_diffusion_jax import compile_cache, processes

    logging.set_verbosity(logging.WARNING)
    if FLAGS.mode == "doctor":
        from lora_diffusion_jax.modes import doctor

        return doctor.examine(FLAGS.config, FLAGS.workdir)
    address, count, index = FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    limit = FLAGS.process_timeout
    processes.join(address, count, index, detect=FLAGS.distributed, limit=limit)
    compile_cache.use_compilation_cache()
    with processes.ending_together():
        told = {name: FLAGS[name].value for name in ("mode", *ARGUMENTS)}
        if FLAGS.config:
            told["config"] = FLAGS.config.to_json_best_effort(sort_keys=True)
        processes.check_same("the command line", json.dumps(told))
        return do()


def do() -> int:
    """Does what --mode says; returns the exit status."""
    from lora_diffusion_jax import experiment, factory, generate, processes
    from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts
    from lora_diffusion_jax.training import writers

    processes.check_joined()
    if FLAGS.mode in ("import", "export", "info") and not processes.alone():
        raise processes.SharedError(f"--mode={FLAGS.mode} is the work of one process alone.")
    if FLAGS.mode == "train":
        need("workdir")
        return experiment.train(FLAGS.config, FLAGS.workdir).exit_code
    if FLAGS.mode == "info":
        if not FLAGS.config:
            raise UserError("--mode=info needs --config=FILE or --workdir=DIR.")
        print(experiment.info(FLAGS.config))
        return 0
    if FLAGS.mode == "import":
        need("source", "workdir")
        count = experiment.import_checkpoint(FLAGS.source, FLAGS.workdir, FLAGS.base)
        print(f"imported {count:,} parameters into {FLAGS.workdir}")
        return 0
    need("workdir", "out")
    seeds = generate.parse_seeds(FLAGS.seeds) if FLAGS.mode == "sample" else []
    loaded = factory.load_workdir(FLAGS.workdir, weights=FLAGS.weights, at_step=FLAGS.step)
    loaded = factory.with_config(loaded, FLAGS.config)
    if FLAGS.mode == "export":
        experiment.export_checkpoint(
            loaded, FLAGS.out, weights=FLAGS.weights, adapters_only=FLAGS.adapters_only
        )
        print(f"wrote the {FLAGS.weights} weights of step {loaded.step} to {FLAGS.out}")
        return 0
    about = experiment.about(loaded, FLAGS.weights, loaded.step)
    work = functools.partial(
        experiment.sample, loaded, seeds, FLAGS.class_id, FLAGS.out, about=about
    )
    with Interrupts("stopping, what is done is kept") as interrupts:
        try:
            count = interrupts.cut_short(work)
        except Interrupted:
            stopped_by = interrupts.agreed or interrupts.received
            name = signal.Signals(stopped_by).name
            writers.log(f"stopped by {name}; the same command goes on from here")
            return 128 + stopped_by
    writers.log(json.dumps({"images": count, "out": FLAGS.out, **about}))
    return 0


def end(argv: list[str]) -> int:
    """Runs; after a signal it ends at once, where JAX would first finish what its devices are at."""
    from lora_diffusion_jax import processes

    status = run(argv)
    if status > 128 and processes.alone():  # others would take it for a death
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def main() -> None:
    """Reads the command line and runs; a user's mistake is one plain message and status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        define_config(sys.argv[1:])
        app.run(end)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:  # while nothing was under way that could be saved
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        if FLAGS.is_parsed():
            raise  # else an override that does not fit, or a config file that is not there
        sys.exit(_complain(f"{type(error).__name__}: {error}"))


def _complain(message: str) -> int:
    from lora_diffusion_jax import processes

    if processes.is_leader():  # what the others do not know of has been said before
        print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
