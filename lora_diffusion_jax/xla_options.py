"""An option of XLA's compiler for CPUs, which has to be set before JAX is imported."""

import os

from lora_diffusion_jax import host

OPTION = "--xla_backend_extra_options="
MERGED = "xla_cpu_use_multi_output_fusion"


def merge_kernels() -> bool:
    """Has XLA compute arrays of one shape from the same input in one kernel; returns whether it does.

    On CPU that is off by default. With it a training step takes a tenth less time, and a quarter less to
    compile (docs/scaling.md). Versions of XLA without this option ignore it, and so do the programs of
    accelerators; where there is one, nothing is set all the same, nor where XLA_FLAGS already has extra
    options.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if OPTION in flags:
        return MERGED in flags
    if host.has_accelerator():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {OPTION}{MERGED}".strip()
    return True
