"""What a user can do, one file per mode; the installed programs start here."""

import importlib
import sys

from lora_diffusion_jax.errors import not_installed


def lora_diffusion() -> int:
    """`lora-diffusion`: the same as main.py."""
    return _start("main")


def lora_diffusion_fid() -> int:
    """`lora-diffusion-fid`: the same as eval_fid.py."""
    return _start("evaluate")


def _start(mode: str) -> int:
    try:  # without the extras, the package installs `lora` alone
        program = importlib.import_module(f"{__name__}.{mode}")
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error)}", file=sys.stderr)
        return 2
    return program.main()
