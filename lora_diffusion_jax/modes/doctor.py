"""What --mode=doctor prints: versions, devices, memory, cache, data and run, and what is wrong."""

import functools
import glob
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lora_diffusion_jax import compile_cache, files, host, remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.data import complete, open_source
from lora_diffusion_jax.factory.networks import build_denoiser, variable_shapes
from lora_diffusion_jax.factory.pretrained import config_from_dict
from lora_diffusion_jax.factory.training import build_mesh
from lora_diffusion_jax.modes.measure import host_memory
from lora_diffusion_jax.modes.train import stored_bytes
from lora_diffusion_jax.training import checkpoint, sharding, transfer, workdir, writers

GIB = 2**30
PROBE_SECONDS = 120  # a TPU that another process holds does not answer
# Run in a child process: a flag that XLA does not know aborts the process that asks for devices.
PROBE = """
import json, jax
found = jax.local_devices()
memory = (found[0].memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps({"count": len(found), "platform": found[0].platform, "memory": memory}))
"""


def examine(config: ConfigDict | None, directory: str | None) -> int:
    """Prints a line per finding; returns 1 if there is a problem, else 0."""
    checks = [machine, devices, cache]
    if directory is not None:
        checks.append(functools.partial(run, Path(directory), may_be_new=config is not None))
    if config is not None:
        checks.append(functools.partial(training, config))
    problems = 0
    for findings in checks:
        try:
            for line in findings():
                print(remote.named(line), flush=True)
        except UserError as error:  # what else this check would find depends on it
            problems += 1
            print(f"PROBLEM: {remote.named(str(error))}", flush=True)
    count = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "No problems"
    print(f"\n{count} found.")
    return min(problems, 1)


def machine() -> Iterator[str]:
    """Versions that results depend on, and the host."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    free = host_memory()
    known = "unknown" if free is None else f"{free / GIB:.1f} GiB"
    yield f"host: {host.usable_cores()} cores, {known} of memory available"
    if free is not None and free < 2 * GIB:
        raise UserError("Less than 2 GiB of memory is available; stop other programs first.")


@functools.cache
def probe() -> dict[str, Any]:
    """The devices that JAX finds: count, platform, memory of each (bytes); or else the error."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [x for x in done.stderr.splitlines() if x.strip(" -") and not x.startswith("For simp")]
    return {"error": lines[-1].rpartition("] ")[2] if lines else f"status {done.returncode}"}


def devices() -> Iterator[str]:
    """What JAX computes on; a problem where an accelerator is idle."""
    found = probe()
    if "error" in found:
        advice = "Correct JAX_PLATFORMS or XLA_FLAGS, or reinstall jax."
        raise UserError(f"JAX finds no devices ({found['error']}). {advice}")
    size = f", {found['memory'] / GIB:.1f} GiB each" if found["memory"] else ""
    yield f"devices: {found['count']} x {found['platform']}{size}"
    for kind, plugin, name in (("GPU", "cuda13", "nvidia[0-9]*"), ("TPU", "tpu", "accel[0-9]*")):
        if found["platform"] == "cpu" and glob.glob(f"/dev/{name}"):
            raise UserError(
                f"This machine has a {kind} that JAX does not use; unset JAX_PLATFORMS, install its "
                f'plugin (pip install -U "jax[{plugin}]"), or update its driver.'
            )


def cache() -> Iterator[str]:
    """The compilation cache."""
    folder = compile_cache.cache_dir()
    yield f"compilation cache: {folder or 'off (JAX_ENABLE_COMPILATION_CACHE)'}"
    if folder and "://" not in folder:
        if problem := compile_cache.find_other_writer(Path(folder)):
            raise UserError(problem[0].upper() + problem[1:])
        with files.disk_errors(folder, "Set JAX_COMPILATION_CACHE_DIR to a writable folder."):
            compile_cache.tidy(Path(folder), compile_cache.max_bytes())


def run(directory: Path, may_be_new: bool) -> Iterator[str]:
    """A workdir's disk, and the run in it."""
    yield from place(directory)
    if may_be_new and not (directory / workdir.CONFIG).exists():
        return
    train = config_from_dict(workdir.read_config(directory)).train
    steps = checkpoint.saved_steps(directory)
    seen = steps[-1] * train.batch_size if steps else 0
    yield f"run: {len(steps)} checkpoints, {seen:,} of {train.total_images:,} images"
    if problems := list(damaged(directory)):
        raise UserError("; ".join(problems) + ".")
    folder = directory / checkpoint.FOLDER
    unverified = [str(s) for s in steps if not checkpoint.is_verified(folder / str(s))]
    if unverified:
        yield (
            f"not verified: checkpoint {', '.join(unverified)}, without checksums (of an older version, or "
            "saved just before a kill)"
        )
    yield "checksums: no damage in what has some of checkpoints, config.json, metrics and results"


def place(directory: Path) -> Iterator[str]:
    """Whether a workdir can be written, and how much room there is."""
    if mirrored := remote.is_mirrored(directory):
        remote.check_writable(directory)
        yield f"workdir: {directory}, can be written"
        directory = Path(tempfile.gettempdir())  # checkpoints lie there until they are in the store
    disk = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    with files.disk_errors(disk, "Choose another workdir."), tempfile.TemporaryFile(dir=disk):
        free = shutil.disk_usage(disk).free
    kind = "temporary files" if mirrored else "workdir"
    yield f"{kind}: {directory}, {free / GIB:.1f} GiB free"
    if free < GIB:
        raise UserError(f"Less than 1 GiB is free on the disk of {directory}; make room.")


def damaged(directory: Path) -> Iterator[str]:
    """What is damaged in a run's directory, compared with its checksums."""
    folder = directory / checkpoint.FOLDER
    if workdir.has_changed(directory):
        yield f"{directory / workdir.CONFIG} has changed since it was written"
    for step in checkpoint.saved_steps(directory):
        transfer.fetch(folder / str(step))
        if problem := checkpoint.find_damage(folder / str(step)):
            yield f"checkpoint {step}: {problem} (training and sampling will use the one before it)"
    for path in checkpoint.set_aside_before(directory):
        yield f"{path} could not be read; delete it if nothing is missing"
    for path in (directory / writers.METRICS, results.results_file(directory)):
        if lines := files.read_lines(path)[1]:
            yield f"{path} has {len(lines)} damaged lines (the next run moves them to {path.name}.damaged)"


def training(config: ConfigDict) -> Iterator[str]:
    """Whether a config's data can be opened, and its network fits the devices."""
    check(config)
    source = open_source(config)
    config = complete(config, source)
    shape = "x".join(map(str, source.image_shape))
    yield f"data: {source.title}, {len(source):,} images, {shape}, {config.data.num_classes} classes"
    if config.data.workers and shutil.disk_usage("/dev/shm").free < GIB // 4:
        raise UserError("Less than 0.25 GiB is free in /dev/shm; set data.workers=0 or enlarge it.")
    params = variable_shapes(config, build_denoiser(config))["params"]
    size, base = stored_bytes(config, params)
    yield f"checkpoint: {size / GIB:.2f} GiB"
    if base:
        yield f"frozen weights, stored once: {base / GIB:.2f} GiB"
    if "error" in probe():  # asking for devices here would end this process
        return
    mesh, part = build_mesh(config), config.train.microbatch or config.train.batch_size
    sharding.check_batch_size(config.train.batch_size, mesh, config.train.microbatch or None)
    yield f"mesh: data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}, {part // mesh.size} images each"
    layout = sharding.tree_sharding(params, mesh)
    shards = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)), params, layout)
    state = 20 * sum(jax.tree.leaves(shards))  # as in a checkpoint, and gradients
    yield f"state: {state / GIB:.2f} GiB per device, besides activations"
    if 0 < probe()["memory"] < 1.1 * state:
        raise UserError("The state does not fit into a device's memory; set mesh.fsdp to split it.")
