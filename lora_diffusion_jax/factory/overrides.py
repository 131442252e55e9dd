"""`--config.a.b=value` arguments applied to the config of a saved run."""

import ast
from collections.abc import Sequence

from ml_collections import ConfigDict

from lora_diffusion_jax.errors import UserError


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """A copy of a config with `--config.a.b=value` arguments in it.

    Raises:
        UserError: something else than such an argument, an unknown field, a value of another type.
    """
    config = config.copy_and_resolve_references()
    for argument in arguments:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(
                f"{argument} is not an option; see eval_fid.py VERB --help. Fields of the config are "
                "set with --config.sampler.num_steps=18 and the like."
            )
        *parents, field = name.split(".")
        group = config
        for parent in parents:
            group = group.get(parent) if isinstance(group, ConfigDict) else None
        if not isinstance(group, ConfigDict) or isinstance(group.get(field), ConfigDict):
            raise UserError(f"{argument}: {name} is no single field of the config.")
        if field not in group:
            raise UserError(f"{argument}: the config has no field {name}.")
        kind = type(group[field])
        wanted = "a number or None" if group[field] is None else f"a value of type {kind.__name__}"
        try:
            read = {str: str, float: float}.get(kind, ast.literal_eval)
            group[field] = read(text)
        except (ValueError, SyntaxError, TypeError) as error:
            raise UserError(f"{argument}: expected {wanted}.") from error
    return config
