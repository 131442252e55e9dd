"""What an attachment is, for linen and nnx alike: an adapter, its sites, and where its condition is."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from lora_diffusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Attachment:
    """An adapter for the sites of a model. Not a pytree, so Flax registers no submodule in it.

    Attributes:
        name: of the adapters, below the subtree `lora`; '' puts them there without a name.
        sites: pattern of the adapted layers' paths.
        adapter: the adapter, unbound; each site gets a copy.
        condition: pattern of the tapped submodule's path, or a function of the call's arguments.
    """

    name: str
    sites: str
    adapter: nn.Module
    condition: str | Callable[..., Any]

    def check(self) -> None:
        """Raises UserError for values of other types, and invalid sizes or patterns."""
        if not isinstance(self.adapter, nn.Module):
            raise UserError(
                f"The adapter that lora.attach got is {kind(self.adapter)}; expected an instance of a "
                f"linen module{hint(self.adapter)}."
            )
        if not isinstance(self.sites, str):
            raise UserError(
                f"The argument sites of lora.attach is {kind(self.sites)}; expected one regular expression "
                "for the layers' paths, such as '.*/(qkv|proj)'."
            )
        if not isinstance(self.condition, str) and not callable(self.condition):
            raise UserError(
                f"The condition that lora.attach got is {kind(self.condition)}; expected a regular "
                "expression for the path of a submodule, or a function of the call's arguments."
            )
        if not isinstance(self.name, str) or not (self.name == "" or self.name.isidentifier()):
            raise UserError(
                f"The name that lora.attach got is {self.name!r}; expected a word of letters, digits and "
                "underscores."
            )
        for what, pattern in (("site", self.sites), ("condition", self.condition)):
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"The LoRA {what} pattern {pattern!r} is not a regular expression: {error}."
                    ) from error
        if hasattr(self.adapter, "validate"):
            self.adapter.validate()

    def joined(self, others: Sequence["Attachment"]) -> tuple["Attachment", ...]:
        """The others and this one.

        Raises:
            UserError: another one has the same name.
        """
        for other in others:
            if other.name == self.name:
                raise UserError(
                    f"This module has adapters already, at {other.sites!r}, and their name is "
                    f"{self.name!r}. Give each further attachment a name of its own: name='style'."
                )
        return (*others, self)

    def given(self, args: tuple, kwargs: dict) -> Any:
        """The condition that the function makes of a call's arguments, None for a pattern."""
        if isinstance(self.condition, str):
            return None
        condition = self.condition(*args, **kwargs)
        if condition is None:
            raise UserError(
                "The LoRA condition function returned None; it must return the condition of every call, an "
                "array of zeros where there is none."
            )
        return condition

    def taps(self, path: str) -> bool:
        """Whether the output of the module at the path is the condition."""
        return isinstance(self.condition, str) and matches(self.condition, path)


def matches(pattern: str, path: str) -> bool:
    """Whether the whole of '/path' or 'path' matches, so that r'.*/qkv' also finds a top-level 'qkv'."""
    return bool(re.fullmatch(pattern, path) or re.fullmatch(pattern, "/" + path))


def kind(value: Any) -> str:
    """What something is, for a message: `the class UCLoRA`, `of type list`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"


def hint(value: Any) -> str:
    """What to do about a class where an instance is expected."""
    return "; call it to make one" if isinstance(value, type) else ""


def check_names(path: str, attachments: Sequence[Attachment]) -> None:
    """Raises UserError if several adapters at one site lack a name."""
    if len(attachments) > 1 and not all(attachment.name for attachment in attachments):
        raise UserError(
            f"LoRA site '{path}' has several adapters, of which one has no name. Give each attachment a "
            "name, or exclude the site from a pattern."
        )


def no_layer(pattern: str, candidates: set[str]) -> UserError:
    """The error of a site pattern that matches nothing."""
    return UserError(
        f"The LoRA site pattern {pattern!r} matches no layer. "
        f"Candidates: {', '.join(sorted(candidates)) or 'none (it has no such layer)'}."
    )
