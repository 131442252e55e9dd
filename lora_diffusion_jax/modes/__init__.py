"""What a user can do, one file per mode; the installed programs start here."""

import importlib
import sys
from collections.abc import Sequence

from lora_diffusion_jax import memory, xla_options
from lora_diffusion_jax.errors import not_installed


def lora_diffusion(argv: Sequence[str] | None = None) -> int:
    """`lora-diffusion`: the same as main.py."""
    return _start("main", argv)


def lora_diffusion_fid(argv: Sequence[str] | None = None) -> int:
    """`lora-diffusion-fid`: the same as eval_fid.py."""
    return _start("evaluate", argv)


def _start(mode: str, argv: Sequence[str] | None) -> int:
    if argv is None:  # before numpy and JAX are imported
        memory.keep_freed_memory()
        xla_options.merge_kernels()
    try:  # without the extras, the package installs `lora` alone
        program = importlib.import_module(f"{__name__}.{mode}")
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error)}", file=sys.stderr)
        return 2
    return program.main(argv)
