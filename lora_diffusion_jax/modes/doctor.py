"""What --mode=doctor tells: versions, devices, mesh, memory, disk, cache, data, and what is wrong."""

import dataclasses
import datetime
import fcntl
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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lora_diffusion_jax import compile_cache, factory
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training import checkpoint, sharding, workdir

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections"),
    *("clu", "tensorflow-datasets", "array_record", "tensorboardX", "safetensors", "jaxtyping"),
)
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "libtpu")
GIB = 2**30
PROBE_SECONDS = 120
_PROBE = """
import json, jax
devices = jax.local_devices()
limits = [(d.memory_stats() or {}).get("bytes_limit") for d in devices]
print(json.dumps([devices[0].platform, devices[0].device_kind, limits, jax.process_count()]))
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `wrong` says in a sentence what to do about it."""

    text: str
    wrong: str = ""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What JAX finds in a program of its own: an unknown flag, say, would end this one."""

    platform: str = ""
    kind: str = ""
    limits: tuple[int | None, ...] = ()  # bytes of memory of each
    error: str = ""  # the last line of what it said, if it failed


def examine(config: ConfigDict | None, directory: str | None) -> int:
    """Prints the findings; returns 0, or 1 where something is wrong."""
    wrong = []
    for finding in findings(config, directory):
        print(finding.text, flush=True)
        if finding.wrong:
            wrong.append(finding.wrong)
            print(f"  WRONG: {finding.wrong}", flush=True)
    count = f"{len(wrong)} thing{'s are' if len(wrong) > 1 else ' is'} wrong"
    print(f"\n{count}; see above." if wrong else "\nAll is well.")
    return 1 if wrong else 0


def findings(config: ConfigDict | None, directory: str | None) -> Iterator[Finding]:
    """All checks in order; what needs working devices is left out where there are none."""
    versions = installed(PACKAGES)
    plugins = {name: v for name, v in installed(PLUGINS).items() if v}
    yield check_python(sys.version_info[:3])
    yield check_versions(versions)
    devices = probe()
    yield check_devices(devices, os.environ, accelerators(), plugins)
    yield check_host_memory(*host_memory())
    yield check_cache(compile_cache.cache_place(), os.environ)
    if directory is not None:
        yield from check_workdir(Path(directory), _checkpoint_bytes(config) if config else 0)
    if not config:
        yield Finding("config: none given; with --config=FILE or --workdir=DIR mesh and data too")
        return
    if config.data.workers:
        yield check_shared_memory(_free("/dev/shm"), config.data.workers)
    complete = yield from check_data(config)
    if complete is not None and not devices.error:
        yield from check_mesh(complete, devices)


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Version by package, '' for what is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def check_python(version: tuple[int, ...]) -> Finding:
    """3.11 or newer."""
    text = f"python {'.'.join(map(str, version))} on {platform.platform()}"
    old = version < (3, 11)
    return Finding(text, "Python 3.11 or newer is needed; make the .venv with it." if old else "")


def check_versions(versions: Mapping[str, str]) -> Finding:
    """Everything is there, and jax and jaxlib are of one release."""
    text = "  ".join(f"{name} {version or 'MISSING'}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if not version]
    if missing:
        return Finding(text, f"Install {', '.join(missing)}: pip install -r requirements.txt")
    if _release(versions["jax"]) != _release(versions["jaxlib"]):
        return Finding(
            text,
            f"jax {versions['jax']} and jaxlib {versions['jaxlib']} are of two releases; "
            "pip install -U jax jaxlib (or jax[cuda13], jax[tpu]) brings them together.",
        )
    return Finding(text)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def accelerators() -> list[str]:
    """'gpu', 'tpu': what the machine shows, whatever JAX sees."""
    found = []
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"):
        found.append("gpu")
    if glob.glob("/dev/accel[0-9]*"):
        found.append("tpu")
    return found


def probe() -> Devices:
    """Asks JAX for its devices, in a program of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Devices(error=f"no answer within {PROBE_SECONDS} s")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip(" -")]
        told = [line for line in lines if not line.startswith(("For simplicity", " "))]
        last = (told or lines or [f"exit status {done.returncode}"])[-1]
        return Devices(error=last.split("] ")[-1].strip())  # without the C++ log's file and line
    name, kind, limits, _ = json.loads(done.stdout.splitlines()[-1])
    return Devices(name, kind, tuple(limits))


def check_devices(
    devices: Devices,
    environment: Mapping[str, str],
    hardware: list[str],
    plugins: Mapping[str, str],
) -> Finding:
    """JAX works, and uses the accelerator that is there."""
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES")
    settings = "".join(f"  {name}={environment[name]}" for name in names if environment.get(name))
    extra = "".join(f"  {name} {version}" for name, version in plugins.items())
    if devices.error:
        text = f"devices: none; JAX says: {devices.error}{extra}{settings}"
        return Finding(text, _why_none(devices.error, environment))
    memory = [f"{limit / GIB:.1f} GiB" for limit in devices.limits[:1] if limit]
    text = f"devices: {len(devices.limits)} x {devices.platform} ({devices.kind})"
    text = ", ".join([text, *(f"{m} each" for m in memory)]) + extra + settings
    unused = [name for name in hardware if name != devices.platform]
    if not unused or devices.platform != "cpu":
        return Finding(text)
    name = unused[0]
    if "cpu" in environment.get("JAX_PLATFORMS", ""):
        return Finding(
            text,
            f"There is a {name.upper()}, but JAX_PLATFORMS={environment['JAX_PLATFORMS']} hides it; "
            "unset JAX_PLATFORMS.",
        )
    wanted = "libtpu" if name == "tpu" else "-plugin"
    if not any(wanted in plugin for plugin in plugins):
        extras = "tpu" if name == "tpu" else "cuda13"
        return Finding(
            text,
            f"There is a {name.upper()}, but the JAX installed is for CPUs alone: "
            f'pip install -U "jax[{extras}]"',
        )
    return Finding(
        text,
        f"There is a {name.upper()} that JAX cannot use: the driver is too old, or another program "
        'holds it. `python -c "import jax; jax.devices()"` says more.',
    )


def _why_none(error: str, environment: Mapping[str, str]) -> str:
    if "Unknown flag" in error:
        return "XLA does not know a flag in XLA_FLAGS; take it out of the environment."
    if environment.get("JAX_PLATFORMS"):
        return (
            f"JAX_PLATFORMS={environment['JAX_PLATFORMS']} names what is not there; unset it, or "
            "install the plugin: jax[cuda13], jax[tpu]."
        )
    return 'JAX does not start; `python -c "import jax; jax.devices()"` says why.'


def host_memory() -> tuple[int, int]:
    """(bytes of the machine, bytes available); zeros where that cannot be read."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)


def check_host_memory(total: int, available: int) -> Finding:
    """At least 2 GiB are free."""
    text = f"host: {os.cpu_count()} cores, {available / GIB:.1f} of {total / GIB:.1f} GiB available"
    low = total and available < 2 * GIB
    return Finding(text, "Little memory is left; end other programs first." if low else "")


def check_shared_memory(free: int | None, workers: int) -> Finding:
    """Data workers hand over batches in /dev/shm."""
    if free is None:
        return Finding("shared memory: /dev/shm cannot be read")
    low = free < GIB // 4
    return Finding(
        f"shared memory: {free / GIB:.2f} GiB free for {workers} data workers",
        "Data workers need it; enlarge /dev/shm (Docker: --shm-size=8g) or set data.workers=0."
        if low
        else "",
    )


def check_cache(place: str, environment: Mapping[str, str]) -> Finding:
    """Compiled programs can be kept."""
    if not place:
        return Finding("compilation cache: off (JAX_ENABLE_COMPILATION_CACHE)")
    if "://" in place:
        return Finding(f"compilation cache: {place}")
    problem = compile_cache.writing_problem(Path(place))
    sizes = [stat.st_size for _, stat in compile_cache.entries(Path(place))]
    limit = compile_cache.max_bytes(environment) / GIB
    text = f"compilation cache: {place}, {len(sizes)} programs, {sum(sizes) / GIB:.3f} of {limit:g} GiB"
    wrong = f"It cannot be written ({problem}); set JAX_COMPILATION_CACHE_DIR to another folder."
    return Finding(text, wrong if problem else "")


def _free(path: str | os.PathLike) -> int | None:
    """Free bytes of the disk that holds a path, or its nearest parent that exists."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def check_workdir(directory: Path, checkpoint_bytes: int) -> Iterator[Finding]:
    """It can be written, has room for two more checkpoints, and what is in it is sound."""
    free = _free(directory)
    need = max(2 * checkpoint_bytes, GIB // 4)
    text = f"workdir {directory}: {0 if free is None else free / GIB:.1f} GiB free"
    if checkpoint_bytes:
        text += f", a checkpoint takes about {checkpoint_bytes / GIB:.2f} GiB"
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        yield Finding(text, f"{parent} cannot be written; permit it or choose another workdir.")
    elif free is not None and free < need:
        yield Finding(text, f"At least {need / GIB:.1f} GiB should be free; make room.")
    else:
        yield Finding(text)
    if not (directory / workdir.CONFIG).exists():
        yield Finding("run: none there yet")
        return
    yield check_lock(directory)
    yield check_checkpoints(directory)


def check_lock(directory: Path) -> Finding:
    """Says whether a run is using the directory; that is no fault."""
    lock = directory / workdir.LOCK
    try:
        with lock.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return Finding("run: not training now")
    except OSError:
        return Finding(f"run: training now ({lock.read_text(errors='replace').strip()})")
    return Finding("run: not training now")


def check_checkpoints(directory: Path) -> Finding:
    """The config can be read and the newest checkpoint is named."""
    try:
        train = factory.config_from_dict(workdir.read_config(directory)).train
        folder = directory / checkpoint.FOLDER
        steps = checkpoint.saved_steps(directory) if folder.is_dir() else []
    except UserError as error:
        return Finding("run: damaged", str(error))
    aside = sorted(path.name for path in folder.glob("unreadable-*"))
    if not steps:
        text = "run: no checkpoint yet"
    else:
        seen = steps[-1] * train.batch_size
        age = time.time() - (folder / str(steps[-1])).stat().st_mtime
        text = (
            f"run: {len(steps)} checkpoints, the newest of step {steps[-1]:,} ({seen:,} of "
            f"{train.total_images:,} images), {datetime.timedelta(seconds=int(age))} old"
        )
    told = f"{', '.join(aside)} could not be read once; delete them when nothing is missed."
    return Finding(text, told if aside else "")


def check_data(config: ConfigDict) -> Iterator[Finding]:
    """The config is valid and its data can be opened; returns it with the data's sizes, or None."""
    try:
        factory.check(config)
        source = factory.open_source(config)
        complete = factory.complete(config, source)
    except UserError as error:
        yield Finding("config and data: not usable", str(error))
        return None
    size = len(source) * math.prod(source.image_shape)
    fits = size <= config.data.memory_limit_gib * GIB
    way = "held in memory" if fits else f"streamed, data.workers={config.data.workers}"
    height, width, channels = source.image_shape
    text = f"data: {source.title}, {len(source):,} images of {height}x{width}x{channels}"
    text += f", {complete.data.num_classes} classes" if complete.class_conditional else ""
    yield Finding(f"{text}; {size / GIB:.2f} GiB decoded, {way}")
    return complete


def check_mesh(config: ConfigDict, devices: Devices) -> Iterator[Finding]:
    """The mesh can be made, divides the batch, and a device has room for its part of the state."""
    try:
        mesh = factory.build_mesh(config)
        sharding.check_batch_size(config.train.batch_size, mesh, config.train.microbatch or None)
    except UserError as error:
        yield Finding("mesh: not possible", str(error))
        return
    part = config.train.microbatch or config.train.batch_size
    text = (
        f"mesh: data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}; {part // mesh.size} images "
        "per device in a forward and backward pass"
    )
    yield check_state(text, _state_bytes(config, mesh), devices.limits[0] or host_memory()[0])


def check_state(text: str, needed: int, room: int) -> Finding:
    """Whether parameters, gradients, moments and EMA fit; activations come on top."""
    text += f"\n  {needed / GIB:.2f} GiB of state per device, of {room / GIB:.1f} GiB; activations extra"
    wrong = "The state alone does not fit; set mesh.fsdp to split it over more devices."
    return Finding(text, wrong if room and needed > 0.9 * room else "")


def _shapes(config: ConfigDict) -> Mapping[str, jax.ShapeDtypeStruct]:
    denoiser = factory.build_denoiser(config)
    init = functools.partial(factory.init_variables, config, denoiser)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def _state_bytes(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Parameters, gradients, two moments and EMA of one device, in float32."""
    shapes = _shapes(config)
    layout = sharding.tree_sharding(shapes, mesh)
    parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, layout)
    return 5 * sum(4 * math.prod(part) for part in jax.tree.leaves(parts, is_leaf=_is_shape))


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)


def _checkpoint_bytes(config: ConfigDict) -> int:
    """Parameters, two moments and EMA; 0 where the config does not say the sizes."""
    if not (config.data.image_size and config.data.channels):
        return 0
    try:
        return 16 * sum(leaf.size for leaf in jax.tree.leaves(_shapes(config)))
    except UserError:  # told by check_data
        return 0
