"""What --mode=doctor prints: versions, devices, memory, cache, data and run, and what is wrong."""

import functools
import glob
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_diffusion_jax import compile_cache
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.data import complete, open_source
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables
from lora_diffusion_jax.factory.pretrained import config_from_dict
from lora_diffusion_jax.factory.training import build_mesh
from lora_diffusion_jax.training import checkpoint, sharding, workdir

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
GIB = 2**30
# Run in a child process: a flag that XLA does not know aborts the process that asks for devices.
PROBE = """
import json, jax
found = jax.local_devices()
memory = (found[0].memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps({"count": len(found), "platform": found[0].platform, "memory": memory}))
"""


def examine(config: ConfigDict | None, directory: str | None) -> int:
    """Prints a line per finding; returns 1 if there is a problem, else 0."""
    checks = [versions, devices, memory, cache]
    if directory is not None:
        checks.append(functools.partial(run, Path(directory), may_be_new=config is not None))
    if config is not None:
        checks.append(functools.partial(training, config, directory))
    problems = 0
    for findings in checks:
        try:
            for line in findings():
                print(line, flush=True)
        except UserError as error:  # what else this check would find depends on it
            problems += 1
            print(f"PROBLEM: {error}", flush=True)
    count = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "No problems"
    print(f"\n{count} found.")
    return min(problems, 1)


def versions() -> Iterator[str]:
    """Python and the packages that results depend on."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


@functools.cache
def probe() -> dict[str, Any]:
    """The devices that JAX finds: count, platform, memory (bytes); else the error."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [x for x in done.stderr.splitlines() if x.strip(" -") and not x.startswith("For simp")]
    return {"error": lines[-1].rpartition("] ")[2] if lines else f"status {done.returncode}"}


def devices() -> Iterator[str]:
    """What JAX computes on; a problem where an accelerator is idle."""
    found, chosen = probe(), os.environ.get("JAX_PLATFORMS", "")
    if "error" in found:
        advice = (
            f"unset JAX_PLATFORMS={chosen}, or install its plugin" if chosen else "reinstall jax"
        )
        if "nknown flag" in found["error"]:
            advice = "remove the flag from XLA_FLAGS"
        raise UserError(f"JAX finds no devices ({found['error']}); {advice}.")
    size = f", {found['memory'] / GIB:.1f} GiB each" if found["memory"] else ""
    yield f"devices: {found['count']} x {found['platform']}{size}"
    for kind, extra, pattern in (("gpu", "cuda13", "nvidia[0-9]*"), ("tpu", "tpu", "accel[0-9]*")):
        if found["platform"] == "cpu" and glob.glob(f"/dev/{pattern}"):
            advice = f'pip install -U "jax[{extra}]", or update the driver'
            advice = f"unset JAX_PLATFORMS={chosen}" if "cpu" in chosen else advice
            raise UserError(f"This machine has a {kind.upper()} that JAX does not use; {advice}.")


def memory() -> Iterator[str]:
    """Cores and memory of the host."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    yield f"host: {os.cpu_count()} cores, {free / GIB:.1f} GiB of memory available"
    if lines and free < 2 * GIB:
        raise UserError("Less than 2 GiB of memory is available; stop other programs first.")


def cache() -> Iterator[str]:
    """The compilation cache."""
    folder = compile_cache.cache_dir()
    yield f"compilation cache: {folder or 'off (JAX_ENABLE_COMPILATION_CACHE)'}"
    problem = compile_cache.write_error(Path(folder)) if folder and "://" not in folder else ""
    if problem:
        raise UserError(f"{folder}: {problem}. Set JAX_COMPILATION_CACHE_DIR to a writable folder.")


def run(directory: Path, may_be_new: bool) -> Iterator[str]:
    """A workdir's disk, and the run in it."""
    parent = _existing(directory)
    yield f"workdir: {directory}, {shutil.disk_usage(parent).free / GIB:.1f} GiB free"
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} is not a writable folder; choose another workdir.")
    if may_be_new and not (directory / workdir.CONFIG).exists():
        return
    train = config_from_dict(workdir.read_config(directory)).train
    folder = directory / checkpoint.FOLDER
    steps = checkpoint.saved_steps(directory) if folder.is_dir() else []
    seen = steps[-1] * train.batch_size if steps else 0
    yield f"run: {len(steps)} checkpoints, {seen:,} of {train.total_images:,} images"
    for path in folder.glob("unreadable-*"):
        raise UserError(f"{path} could not be read; delete it if nothing is missing.")


def training(config: ConfigDict, directory: str | None) -> Iterator[str]:
    """Whether a config's data can be opened, and its network fits the devices and the disk."""
    check(config)
    source = open_source(config)
    config = complete(config, source)
    shape = "x".join(map(str, source.image_shape))
    yield f"data: {source.title}, {len(source):,} images, {shape}, {config.data.num_classes} classes"
    if config.data.workers and shutil.disk_usage("/dev/shm").free < GIB // 4:
        raise UserError(
            "Data workers need 0.25 GiB of /dev/shm; enlarge it, or set data.workers=0."
        )
    init = functools.partial(init_variables, config, build_denoiser(config))
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    saved = 16 * sum(leaf.size for leaf in jax.tree.leaves(params))  # float32: 2 moments, EMA
    yield f"checkpoint: {saved / GIB:.2f} GiB"
    if directory is not None and shutil.disk_usage(_existing(directory)).free < 2 * saved:
        raise UserError(f"The disk of {directory} has no room for two checkpoints; free some.")
    if "error" in probe():  # asking for devices here would end this process
        return
    mesh, part = build_mesh(config), config.train.microbatch or config.train.batch_size
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.microbatch or None)
    layout = sharding.tree_sharding(params, mesh)
    shards = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)), params, layout)
    state = 20 * sum(jax.tree.leaves(shards))  # what is saved, and gradients
    yield f"mesh: data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}, {part // mesh.size} images each"
    yield f"state: {state / GIB:.2f} GiB per device, besides activations"
    if 0 < probe()["memory"] < 1.1 * state:
        raise UserError("The state does not fit into a device's memory; set mesh.fsdp to split it.")


def _existing(path: str | os.PathLike) -> Path:
    """The path, or its nearest parent that exists."""
    return next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
