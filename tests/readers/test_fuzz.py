"""Real snapshots with random damage: an error line or a harmless reading, within limits, always."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop.infer import infer_config
from lora_diffusion_jax.readers.pickles import read_snapshot, read_torch_state_dict
from tests.readers.watching import nothing_runs
from tests.small import unpacked

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
LONG = [*sorted(GOLDEN.glob("snapshot_*.pkl*")), *sorted(GOLDEN.glob("tensors_*.pt"))]


def load(path: Path) -> None:
    """What a program does with a file before it builds a network."""
    if path.suffix == ".pt":
        read_torch_state_dict(path)
    else:
        infer_config(read_snapshot(path))


def flip(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def overwrite(data: bytearray, rng: np.random.Generator) -> None:
    at = rng.integers(len(data))
    data[at : at + 8] = rng.bytes(int(rng.integers(1, 9)))


def move(data: bytearray, rng: np.random.Generator) -> None:
    """A piece of the file copied to another place, so that valid opcodes meet wrong ones."""
    start, at, count = rng.integers(len(data)), rng.integers(len(data)), rng.integers(1, 200)
    piece = data[start : start + count]
    data[at : at + (len(piece) if rng.integers(2) else 0)] = piece


def cut(data: bytearray, rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 300)]


MUTATIONS: tuple[Callable, ...] = (flip, overwrite, move, cut)


def damage_and_read(source: Path, scratch: Path, count: int, seed: int) -> tuple[int, float]:
    """Reads `count` damaged copies; returns how many were refused and the longest time of one."""
    honest = source.read_bytes()
    rng = np.random.default_rng(seed)
    target = scratch / f"damaged{source.suffix}"
    refused, longest = 0, 0.0
    load(source)
    "".encode("cp437")  # what zipfile imports on first use
    for i in range(count):
        data = bytearray(honest)
        MUTATIONS[i % len(MUTATIONS)](data, rng)
        target.write_bytes(data)
        started = time.monotonic()
        message = ""
        with nothing_runs():
            try:
                load(target)
            except UserError as error:
                message = str(error)
        refused += bool(message)
        assert "\n" not in message
        assert len(message) < 2_000
        longest = max(longest, time.monotonic() - started)
    return refused, longest


@pytest.mark.parametrize("name", ["snapshot_edm_lora.pkl", "tensors_zip.pt", "tensors_legacy.pt"])
def test_damaged_files_never_run_hang_or_crash(name, tmp_path):
    refused, longest = damage_and_read(GOLDEN / name, tmp_path, count=100, seed=0)
    assert refused > 30  # the damage reaches the reader: most of it is noticed
    assert longest < 5


@pytest.mark.slow
@pytest.mark.parametrize("source", LONG, ids=lambda path: path.name)
def test_long_fuzz_within_limits_on_memory_and_time(source, tmp_path):
    """A process of its own, so that the limits of the operating system apply."""
    source = unpacked(source, tmp_path)
    run = [sys.executable, "-m", "tests.readers.test_fuzz", str(source), str(tmp_path), "2000"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (1200, 1200))
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    found = damage_and_read(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), seed=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{sys.argv[1]}: {sys.argv[3]} damaged, {found[0]} refused, longest {found[1]:.3f} s, {peak} MB"
    )
