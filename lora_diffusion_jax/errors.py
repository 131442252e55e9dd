"""The one exception for mistakes a user can make and correct, and what its messages are made with."""

from typing import Any


class UserError(ValueError):
    """Bad input from outside: its message says what was found, what was expected and what to do.

    Command-line programs print the message alone, without a stack trace, and exit with status 2.
    """


class NotThereError(UserError):
    """What was named does not exist, or not yet; nothing is said about what it would contain."""


def explain(error: BaseException) -> str:
    """A sentence for an unexpected error, with its type and first line."""
    text = printable((str(error).strip().splitlines() or ["without a message"])[0], 300)
    return (
        f"{type(error).__name__}: {text}. This error is unexpected: unless a file is damaged, please report "
        "it. The same command with --debug prints where it happened."
    )


def choose(setting: str, value: Any, known: Any) -> Any:
    """Returns known[value], or value itself where `known` is a sequence.

    Raises:
        UserError: names the setting and the values it may have.
    """
    if value not in known:
        raise UserError(f"{setting} is {value!r}; it must be one of {', '.join(map(str, known))}.")
    return known[value] if isinstance(known, dict) else value


def printable(value: Any, limit: int = 80) -> str:
    """A value from a file as text that is safe in a message: one line, escaped, at most `limit` long.

    A container is named by its type, since printing one that holds itself would never end; a short
    list of numbers is printed.
    """
    listed = isinstance(value, list | tuple) and len(value) <= 16
    numbers = listed and all(type(v) in (int, float) for v in value)
    if not (numbers or value is None or type(value) in (str, bool, int, float)):
        return f"a {type(value).__name__}"
    text = str(value)[: limit + 1]
    text = text[:limit] + "..." if len(text) > limit else text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def needs_package(wanted: str, package: str | None, extras: str) -> str:
    """The sentence for something that was asked for, and the package and our extras that bring it."""
    return (
        f"{wanted} needs the package {package}, which is not installed; pip install "
        f"'lora-diffusion-jax[{extras}]'"
    )


def not_installed(error: ModuleNotFoundError) -> str:
    """The sentence for a package that an extra of this one brings."""
    return (
        f"the package {error.name} is not installed; pip install 'lora-diffusion-jax[train,eval]'"
    )
