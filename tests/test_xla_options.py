"""The option that main.py sets for XLA, and that XLA for CPU understands it."""

import os
import subprocess
import sys

import pytest

from lora_diffusion_jax import host
from lora_diffusion_jax.xla_options import MERGED, OPTION, merge_kernels

# The sine and the cosine of one array: two kernels, or one.
PROGRAM = """
import jax, jax.numpy as jnp
from lora_diffusion_jax.xla_options import merge_kernels
print(merge_kernels())
f = jax.jit(lambda x: (jnp.sin(x), jnp.cos(x)))
print(f.lower(jnp.ones((64, 64))).compile().as_text().count(" fusion("))
"""


@pytest.fixture(autouse=True)
def no_accelerators(monkeypatch):
    monkeypatch.setattr(host, "ACCELERATORS", ())


def test_other_flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert merge_kernels()
    assert merge_kernels()  # as a child of a process that has set it
    assert os.environ["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {OPTION}{MERGED}"


def test_the_users_extra_options_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{OPTION}another")
    assert not merge_kernels()
    assert os.environ["XLA_FLAGS"] == f"{OPTION}another"


def test_machines_with_an_accelerator_are_left_alone(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(host, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not merge_kernels()
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_merges_kernels():
    def kernels(flags: str) -> tuple[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
            capture_output=True,
            text=True,
            check=True,
        )
        said, count = done.stdout.split()
        return said, int(count)

    said, merged = kernels("")
    if said == "False":
        pytest.skip("there is an accelerator")
    assert merged < kernels(f"{OPTION}xla_none")[1]
