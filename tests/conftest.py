"""Settings shared by all tests: CPU, programs that compile fast, one compilation cache per session."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile

# A test's programs run for milliseconds but XLA optimises them for seconds: without the optimisations
# below a small U-Net and its gradient compile in 4 seconds instead of 25. Subprocesses inherit them.
FAST_COMPILE = (
    "xla_backend_optimization_level=0",
    "xla_cpu_use_fusion_emitters=false",
    "xla_cpu_parallel_codegen_split_count=1",
    "xla_backend_extra_options=xla_cpu_use_multi_output_fusion",  # fewer kernels, as in main.py
)


def known_flags() -> list[str]:
    """FAST_COMPILE without what this version of XLA does not know: it aborts, and names those flags."""
    flags = [f"--{flag}" for flag in FAST_COMPILE]
    trial = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    unknown = trial.stderr.partition("Unknown flag")[2]
    return [flag for flag in flags if flag not in unknown]


os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Collect garbage rarely and record no source locations: together a tenth of tracing.
gc.set_threshold(50_000, 50, 100)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Workers and programs inherit what the first process of the session sets.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lora_diffusion_jax_tests_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known_flags()]).strip()


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
