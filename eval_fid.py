"""Measure how close generated images are to real ones; see lora_diffusion_jax/modes/evaluate.py."""

import argparse
import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from lora_diffusion_jax import compile_cache, processes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.results import note as say
from lora_diffusion_jax.modes.evaluate import VERBS, build_parser
from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts


def process_flags() -> argparse.ArgumentParser:
    """Options about the processes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--coordinator_address", help="HOST:PORT of process 0, of several")
    parser.add_argument("--num_processes", type=int, help="how many processes there are")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="find them by TPU pod, Slurm, Open MPI or Kubernetes; default: by Slurm",
    )
    parser.add_argument("--process_timeout", type=float, default=300.0, help="seconds of waiting")
    return parser


def join(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; all must have been given the same arguments."""
    place = args.coordinator_address, args.num_processes, args.process_id
    processes.join(*place, detect=args.distributed, limit=args.process_timeout)
    processes.check_joined()
    told = {name: value for name, value in vars(args).items() if name != "process_id"}
    processes.check_same("the command line", json.dumps(told, sort_keys=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; a user's mistake is one plain message and status 2, a signal 128 + its number."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args, args_overrides = build_parser(process_flags()).parse_known_args(argv)
    args.overrides = args_overrides
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    with Interrupts("saving what is done") as interrupts:
        try:
            if args.overrides and args.verb in ("ref", "calc"):
                raise UserError(f"{args.overrides[0]} is not an option of {args.verb}.")
            join(args)
            compile_cache.use_compilation_cache()
            with processes.ending_together():
                interrupts.cut_short(functools.partial(VERBS[args.verb], args))
        except UserError as error:
            if processes.is_leader():  # what the others do not know of has been said before
                say(f"error: {error}")
            return 2
        except Interrupted:
            number = interrupts.agreed or interrupts.received
            name = signal.Signals(number).name
            say(f"stopped by {name}; the same command goes on from here")
            return 128 + number
    return 0


if __name__ == "__main__":
    status = main()
    if status > 128:  # JAX would first finish what the devices are at, perhaps for minutes
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
