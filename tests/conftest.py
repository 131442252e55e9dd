"""Settings shared by all tests: CPU, and one compilation cache for the whole run."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lora_diffusion_jax_test_cache")
)
