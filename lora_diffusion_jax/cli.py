"""The command line that both programs share: arguments, config overrides, processes, signals, exit status."""

import argparse
import contextlib
import copy
import difflib
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from lora_diffusion_jax import compile_cache, default_config, files, processes, remote
from lora_diffusion_jax.errors import UserError, explain, not_installed
from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts

# Packaged configs lie inside an installed package, and beside it in a checkout.
CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
PROCESS_FLAGS = {
    "coordinator_address": "HOST:PORT of process 0",
    "num_processes": "how many there are",
    "process_id": "this one's number, from 0",
    "distributed": "find the others by TPU pod, Slurm, Open MPI or Kubernetes; default: within Slurm",
    "process_timeout": "seconds that processes wait for one another; default: 300",
    "heartbeat_timeout": "seconds of silence after which a process counts as dead; default: 15",
}
_CONFIG_ARGUMENT = re.compile(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", re.DOTALL)


def run(work: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Calls `work` with a command line, and returns the exit status of the program.

    That is what `work` returns, 2 after an error, which is printed as one sentence, or 130 after
    Ctrl-C. `--debug`, which is taken out of the command line, prints where an error was raised.

    Args:
        work: the program.
        argv: its arguments; None: those of this process, which then exits at once after a signal.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.showwarning = _show_warning
    arguments = sys.argv[1:] if argv is None else list(argv)
    processes.session.debug = "--debug" in arguments
    sys.unraisablehook = _quiet_loops
    # Python's resource tracker removes the shared memory of workers that an error ended, and says so.
    quiet = "ignore:resource_tracker:UserWarning"
    filters = list(filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")))
    if quiet not in filters:
        os.environ["PYTHONWARNINGS"] = ",".join([*filters, quiet])
    try:
        status = work([a for a in arguments if a != "--debug"])
    except Exception as error:
        if processes.session.debug:
            traceback.print_exception(error)
        if not isinstance(error, UserError) or processes.is_leader():  # else it is printed there
            print(f"error: {_sentence(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # before there was anything to save
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        status = 130
    finally:
        remote.close()
    if argv is None and status > 128 and processes.alone():
        # An ordinary exit would wait for what the devices are doing, perhaps for minutes. Several
        # processes need it nevertheless, to leave one another in order.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
    compile_cache.note_warning(str(message))


def _quiet_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    """Leaves out what orbax's closed event loops raise while they are collected, after an error."""
    if str(unraisable.exc_value) != "Event loop is closed" or processes.session.debug:
        sys.__unraisablehook__(unraisable)


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return remote.named(str(error))
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(__package__):
        return not_installed(error)
    return remote.named(explain(error))


@contextlib.contextmanager
def joined(args: argparse.Namespace, config: ConfigDict | None = None) -> Iterator[None]:
    """Joins the other processes, if there are any, and turns the compilation cache on.

    An error of the work inside ends all processes.

    Args:
        args: the parsed command line, with the process flags.
        config: the run's config, with overrides.

    Raises:
        UserError: a process is missing, or was given another command line.
    """
    processes.join(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        detect=args.distributed,
        limit=args.process_timeout,
        heartbeat_timeout_seconds=args.heartbeat_timeout,
        folder=_shared_folder(getattr(args, "workdir", None)),
    )
    compile_cache.use_compilation_cache()
    with processes.ending_together():
        processes.check_joined()
        command = {k: v for k, v in vars(args).items() if k not in PROCESS_FLAGS}
        if config is not None:
            command["config"] = config.to_json_best_effort(sort_keys=True)
        processes.check_same("the command line", json.dumps(command, sort_keys=True))
        yield


def _shared_folder(workdir: str | None) -> str | None:
    """The workdir, if all processes see it: their secret lies in it until they have joined."""
    if not workdir or remote.is_url(workdir) or remote.is_mirrored(workdir):
        return None
    return None if Path(workdir).is_file() else workdir


def cut_short(work: Callable[[], Any], doing: str = "stopping; finished work is kept") -> int:
    """Calls `work`, which a signal interrupts; returns 0, or 128 + the signal's number.

    Args:
        work: called again, it continues where it was interrupted.
        doing: what is printed when a signal arrives.
    """
    with Interrupts(doing) as interrupts:
        try:
            interrupts.cut_short(work)
        except Interrupted:
            number = interrupts.stopped_by or signal.SIGINT
            if processes.is_leader():
                name = signal.Signals(number).name
                print(f"stopped by {name}; rerun the same command to resume", file=sys.stderr)
            return 128 + number
    return 0


def program() -> list[str]:
    """What starts main.py with this interpreter: that of a checkout, or the installed command."""
    main = Path(__file__).parents[1] / "main.py"
    if main.exists():
        return [sys.executable, str(main)]
    return [str(Path(sys.executable).with_name("lora-diffusion"))]


# Arguments.


class Parser(argparse.ArgumentParser):
    """Flags that are never abbreviated; a mistake in them is a UserError."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        text = "print where an error was raised"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of exiting."""
        raise UserError(f"{message}. See {self.prog} --help.")

    def parse_given(self, argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """The flags of a command line, and the names of those that it gives, be it their defaults."""
        args, absent = self.parse_args(argv), object()
        defaults = {name: self.get_default(name) for name in vars(args)}
        self.set_defaults(**dict.fromkeys(defaults, absent))
        given = {name for name, v in vars(self.parse_args(argv)).items() if v is not absent}
        self.set_defaults(**defaults)
        return args, given

    def add_path(self, name: str, *, urls: bool = False, **settings: Any) -> None:
        """Adds a flag whose value is a path, with ~ and environment variables replaced.

        Args:
            name: of the flag.
            urls: whether it may also be hf://... or the URL of an object store, for `interop.local`; these
                are left as they are.
            settings: of `add_argument`.
        """
        self.add_argument(name, action=_PathOrURL if urls else _Path, **settings)

    def add_switch(self, name: str, default: bool | None, text: str) -> None:
        """Adds --name and --noname."""
        self.add_argument(f"--{name}", action="store_true", default=default, help=text)
        self.add_argument(
            f"--no{name}", f"--no-{name}", action="store_false", dest=name, help=argparse.SUPPRESS
        )

    def add_process_flags(self) -> None:
        """Adds what `joined` needs."""
        numbers: dict[str, type] = {"num_processes": int, "process_id": int}
        numbers |= {"process_timeout": float, "heartbeat_timeout": float}
        for name, text in PROCESS_FLAGS.items():
            if name == "distributed":
                self.add_switch(name, None, text)
            else:
                self.add_argument(f"--{name}", type=numbers.get(name, str), help=text)
        self.set_defaults(process_timeout=300.0, heartbeat_timeout=15.0)

    def add_config_help(self, *, with_file: bool) -> None:
        """Adds --helpfull, and lines on the arguments that `take_config` takes.

        Args:
            with_file: whether --config=FILE is one of them.
        """
        lines = {
            "--config=FILE": "a config file, or the name of a packaged config such as digits",
            "--config.GROUP.FIELD=VALUE": "override a field; the last value of a field counts",
        }
        for flag in lines if with_file else list(lines)[1:]:
            self.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=lines[flag]
            )
        full = "this text, and all config fields with their defaults"
        self.add_argument(
            "--helpfull", action=_HelpFull, nargs=0, default=argparse.SUPPRESS, help=full
        )


class _Path(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        setattr(namespace, self.dest, files.expand(value, self.option_strings[0]))


class _PathOrURL(_Path):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        if value.startswith(files.HUB):
            setattr(namespace, self.dest, value)
        elif remote.is_url(value):
            setattr(namespace, self.dest, remote.check_url(value, self.option_strings[0]))
        else:
            super().__call__(parser, namespace, value)


class _HelpFull(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        print("\nconfig fields and their defaults:")
        for name, value in flatten_dict(default_config.base().to_dict(), sep=".").items():
            print(f"  --config.{name}={value}")
        parser.exit()


def take_config(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Takes the config's arguments out of a command line.

    `--config.a.b value` and, for booleans, `--config.a.b` and `--noconfig.a.b` work as well.

    Returns:
        The other arguments; the value of --config or None; and overrides as `--config.a.b=value`, one
        per field: the last that was given.
    """
    left, others, name, overrides = list(argv), [], None, {}
    while left:
        argument = left.pop(0)
        match = _CONFIG_ARGUMENT.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        no, field, value = match.groups()
        if no:
            value = "false"
        elif value is None and left and not left[0].startswith("--"):
            value = left.pop(0)
        elif value is None and field:
            value = "true"
        if field:
            overrides[field] = f"--config.{field}={value}"
        elif value:
            name = value
        else:
            raise UserError("--config needs a value: a file, or the name of a packaged config.")
    return others, name, list(overrides.values())


# Configs.


def load_config(name: str) -> tuple[ConfigDict, ModuleType]:
    """Loads a config file.

    Args:
        name: a path that ends in .py, or the name of a packaged config, such as `digits`.

    Returns:
        What its get_config() returns, and the module.

    Raises:
        UserError: there is no such file, or it fails.
    """
    path = Path(files.expand(name, "--config")).resolve()
    if path.suffix != ".py":
        packaged = {p.stem: p for folder in CONFIG_FOLDERS for p in folder.rglob("[!_]*.py")}
        if name not in packaged:
            raise UserError(
                f"--config={name}: there is no such config. Give the path of a .py file, or one of "
                f"{', '.join(sorted(packaged))}."
            )
        path = packaged[name]
    if not path.is_file():
        raise UserError(f"--config={name}: there is no such file.")
    for folder in path.parents[:2]:
        # A package of configs, which may import one another: `from configs import digits`.
        if (folder / "__init__.py").exists() and folder.name not in sys.modules:
            sys.modules[folder.name] = package = ModuleType(folder.name)
            package.__path__ = [str(folder)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec  # None for a suffix that is not .py
    module = importlib.util.module_from_spec(spec)
    with config_errors(path):
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no function get_config() that returns a ConfigDict.")
    return config, module


@contextlib.contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """Turns whatever the code of a config file raises into a UserError that names its line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "unknown")
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}, line {line}: {kind}{text}") from error


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A locked copy of a config with `--config.a.b=value` arguments applied.

    `sampler.name` is applied first, because it decides which other fields `sampler` has.

    Raises:
        UserError: an unknown field, or a value of the wrong type.
    """
    config = copy.deepcopy(config)
    for argument in sorted(overrides, key=lambda a: not a.startswith("--config.sampler.name=")):
        field, _, text = argument.removeprefix("--config.").partition("=")
        _check_field(config, field)
        if field == "sampler.name" and text != config.sampler.name:
            config.sampler = default_config.sampler(text, config.sampler)
        _set_field(config, field, argument)
    return config


def _check_field(config: ConfigDict, field: str) -> None:
    """Raises UserError, naming similar fields and the group's, unless the config has this one."""
    known = flatten_dict(config.to_dict(), sep=".")
    if field in known:
        return
    group, path = config, ""
    for name in field.split("."):
        if not isinstance(group.get(name), ConfigDict):
            break
        group, path = group[name], f"{path}{name}."
    else:
        raise UserError(f"{field} is a group of fields; set one of them: {', '.join(group)}.")
    near = [path + close for close in difflib.get_close_matches(name, group)]
    near += [other for other in known if other.rpartition(".")[2] == field]
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    where = path.rstrip(".") or "the config"
    raise UserError(
        f"The config has no field {field}.{guess} Fields of {where}: {', '.join(group)}."
    )


def _set_field(config: ConfigDict, field: str, argument: str) -> None:
    """Sets a field as ml_collections parses its value."""
    old = config_path.get_value(field, config)
    kind = config_path.get_type(field, config).__name__
    if isinstance(old, tuple) and old:
        kind += f" of {type(old[0]).__name__}"
    values = flags.FlagValues()  # private: absl's global flags are not used
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=True, sys_argv=["", argument]
        )
        values(["", argument])
        new = config_path.get_value(field, config)
        if isinstance(old, tuple) and any(type(x) is not type(y) for x in new for y in old[:1]):
            raise TypeError("an element of another type, which ml_collections lets pass")
    except (flags.Error, SyntaxError, TypeError, ValueError) as error:
        example = "" if old is None else f", such as {old!r}"
        raise UserError(f"{argument}: expected a value of type {kind}{example}.") from error
