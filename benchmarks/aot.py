"""Compiles the real training step and sampler for TPUs that are not there, and reports.

    python benchmarks/aot.py --topology=v5e:16x16 --config=configs/cifar10_edm.py \
        [--config.dtype=bfloat16 ...] [--program=step|sampler|both] [--batch=512] [--out=FILE.jsonl]
    python benchmarks/aot.py --table=docs/aot.jsonl

Prints one JSON line a program. By default the compiler is stopped when it has laid out the memory:
its machine code takes most of the time and changes no number here. --generate_code lets it finish,
which adds the size of the code and XLA's own estimate of the time, the sum of its cycles (minutes for
a sampler, far longer for a step).
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before jax is imported: no TPU is looked for, and several of these programs may run at a time.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from benchmarks import aot_hlo, aot_report  # noqa: E402
from lora_diffusion_jax import factory  # noqa: E402
from lora_diffusion_jax.array_types import PyTree  # noqa: E402
from lora_diffusion_jax.errors import UserError  # noqa: E402
from lora_diffusion_jax.training import loop, sharding, state  # noqa: E402
from lora_diffusion_jax.training.feed import Held  # noqa: E402
from lora_diffusion_jax.training.metrics import TrainMetrics  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", None, "Generation and chips along each axis: v5e:4x4, v5p:2x2x4.")
flags.DEFINE_enum("program", "step", ("step", "sampler", "both"), "What to compile.")
flags.DEFINE_integer("batch", None, "Images of a step, or of a call of the sampler, on all chips.")
flags.DEFINE_integer("num_images", None, "Of the data set; for the known ones their own number.")
flags.DEFINE_bool("generate_code", False, "Let the compiler finish; slow.")
flags.DEFINE_string("out", None, "A file that the JSON lines are appended to as well.")
flags.DEFINE_string("table", None, "Prints the table of such a file; compiles nothing.")
flags.DEFINE_string("dump", None, "Compiles here and now, leaving XLA's texts in this folder.")

NUM_IMAGES = {"cifar10": 50_000, "ffhq-64x64.zip": 70_000, "imagenet-64x64.zip": 1_281_167}
ON_DEVICE = 2**30  # bytes; the training loop's own limit
LAID_OUT = "after_optimizations_after_buffer_assignment.txt"
ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm"
    r"|temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)"
)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices, one a chip, of a topology that need not exist.

    Raises:
        UserError: libtpu is missing, or knows no such topology.
    """
    generation, shape = aot_report.parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'The TPU compiler is not installed: pip install "jax[tpu]" (a virtual environment of '
            "its own is best; no TPU is needed), beside requirements.txt."
        )
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if max(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from error


def lower_step(config: ConfigDict, mesh: Mesh, num_images: int) -> jax.stages.Lowered:
    """The training loop's own step: gather, augment, loss, gradients, Adam, EMA, metrics."""
    denoiser, optimizer = factory.build_denoiser(config), factory.build_optimizer(config)

    def init() -> state.TrainState:
        variables = factory.init_variables(config, denoiser, jax.random.key(0))
        return state.create_state(variables, optimizer, factory.trainable(config))

    batch = config.train.batch_size
    if config.train.microbatch:
        raise UserError(
            "train.microbatch makes a loop, whose FLOP XLA counts once; leave it out, and take a "
            "smaller --batch for the memory of a part."
        )
    data, item = _data_shapes(config, batch, num_images)
    shapes = jax.eval_shape(init)
    program = loop.jit_step(factory.build_step(config, denoiser, mesh), shapes, mesh)
    return program.lower(
        shapes,
        jax.eval_shape(TrainMetrics.empty),
        data,
        {**item, "signal": jax.ShapeDtypeStruct((mesh.size,), jnp.int32)},
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def _data_shapes(config: ConfigDict, batch: int, num_images: int) -> tuple[PyTree, PyTree]:
    """(what stays on the devices, what a step sends), as `training.feed` decides."""

    def rows(count: int) -> PyTree:
        shape = count, *factory.image_shape(config)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8)
        return {"image": images, "label": jax.ShapeDtypeStruct((count,), jnp.int32)}

    size = rows(num_images)["image"].size
    if size <= min(ON_DEVICE, config.data.memory_limit_gib * 2**30):
        held = jax.eval_shape(lambda rows: Held.of(rows["image"], rows["label"]), rows(num_images))
        return held, {"index": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return {}, rows(batch)


def lower_sampler(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The whole sampling run of one batch, seeds in, uint8 out, as `generate` calls it."""
    denoiser = factory.build_denoiser(config)
    generator = factory.build_generator(config, denoiser, mesh)
    variables = jax.eval_shape(lambda: factory.init_variables(config, denoiser, jax.random.key(0)))
    layout = sharding.tree_sharding(variables, mesh)
    variables = jax.tree.map(
        lambda v, place: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), variables, layout
    )
    seeds = jax.ShapeDtypeStruct((generator.call_size,), jnp.uint32)
    width = max(generator.num_classes, 1)
    labels = jax.ShapeDtypeStruct((generator.call_size, width), jnp.float32)
    return generator.compiled.lower(variables, seeds, labels)


def compile_here(config: ConfigDict, program: str, topology: str, folder: Path) -> None:
    """Compiles in this process, leaving XLA's texts and `done.json` in a folder."""
    mesh = factory.build_mesh(config, topology_devices(topology))
    began = time.perf_counter()
    if program == "step":
        lowered = lower_step(config, mesh, _num_images(config))
    else:
        lowered = lower_sampler(config, mesh)
    lowered_at = time.perf_counter()
    (folder / "lowered.json").write_text(json.dumps({"lower_seconds": lowered_at - began}))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    clock = aot_report.CHIPS[aot_report.parse_topology(topology)[0]].clock
    about = {
        "code_bytes": compiled.memory_analysis().generated_code_size_in_bytes,
        "xla_seconds": aot_hlo.Module(compiled.as_text()).estimated_cycles() / clock,
        "compile_seconds": time.perf_counter() - lowered_at,
    }
    (folder / "done.json").write_text(json.dumps(about))


def _num_images(config: ConfigDict) -> int:
    name = config.data.name or Path(config.data.path).name
    number = FLAGS.num_images or NUM_IMAGES.get(name)
    if number is None:
        raise UserError(f"The number of images of {name!r} is not known; give --num_images=N.")
    return number


def compile_apart(program: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Runs `compile_here` in a process that is ended as soon as all that is reported is known.

    Returns:
        (what the process wrote to stderr, if it failed; times and what generated code tells).
    """
    command = [sys.executable, *sys.argv, f"--program={program}", f"--dump={folder}"]
    began = time.perf_counter()
    with open(folder / "stderr.txt", "w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            size = 0
            while child.poll() is None:
                time.sleep(1)
                before, size = size, _laid_out(folder)
                if not FLAGS.generate_code and size == before > 0:  # written to the end
                    break
        finally:
            child.kill()
            child.wait()
    about: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    for name in ("lowered.json", "done.json"):
        if (folder / name).exists():
            about |= json.loads((folder / name).read_text())
    failed = not list(folder.glob(f"*{LAID_OUT}"))
    return (folder / "stderr.txt").read_text() if failed else "", about


def _laid_out(folder: Path) -> int:
    """Size of the last text that the compiler writes before it generates code; 0 without it."""
    return sum(path.stat().st_size for path in folder.glob(f"*{LAID_OUT}"))


def measure(config: ConfigDict, program: str) -> dict[str, Any]:
    """Compiles one program for the topology and says what it needs and could reach."""
    chips = topology_devices(FLAGS.topology)
    mesh = factory.build_mesh(config, chips)
    evaluations, batch = 3, config.train.batch_size
    if program == "sampler":
        batch = -(-config.sampler.batch_size // len(chips)) * len(chips)
    about = {
        "config": Path(_value_of("config")).stem,
        "program": program,
        "topology": FLAGS.topology,
        "chips": len(chips),
        "mesh": dict(mesh.shape),
        "batch": batch,
        "batch_per_chip": batch / len(chips),
        "dtype": config.dtype,
        "overrides": sorted(a.partition("config.")[2] for a in sys.argv if "--config." in a),
        "code_generated": FLAGS.generate_code,
    }
    with tempfile.TemporaryDirectory() as folder:
        errors, times = compile_apart(program, Path(folder))
        if errors:
            return about | _failed(errors) | versions()
        (text,), (assigned,) = (list(Path(folder).glob(f"*{n}")) for n in (LAID_OUT, ASSIGNMENT))
        module, hlo = aot_hlo.Module(text.read_text()), text.read_text()
        memory = aot_hlo.memory_use(assigned.read_text())
    flops = xla_flops(hlo)
    if program == "sampler":
        evaluations = module.loop_trips()
        flops *= evaluations  # XLA counts the body of a loop once; little lies outside of it
    model_flops = evaluations * factory.forward_flops(config, factory.build_denoiser(config))
    return (
        about | _summary(module, memory, flops, model_flops, batch, len(chips)) | times | versions()
    )


def _summary(
    module: aot_hlo.Module,
    memory: dict[str, int],
    flops: float,
    model_flops: float,
    batch: int,
    chips: int,
) -> dict[str, Any]:
    """Memory, work, communication and what they allow."""
    chip = aot_report.CHIPS[aot_report.parse_topology(FLAGS.topology)[0]]
    collectives = aot_hlo.sum_by_kind(module.collectives())
    wire = sum(kind["wire_bytes"] for kind in collectives.values())
    traffic = module.memory_traffic()
    seconds, bound = aot_report.roofline(chip, flops, traffic, wire)
    return {
        "hbm": memory,
        "hbm_capacity": int(chip.hbm_bytes),
        "fits": memory["peak"] <= chip.hbm_bytes,
        "recomputed_by_xla": module.recomputed(),
        "flop": {
            "xla_per_device": flops,
            "analytic_per_image": model_flops,
            "analytic_per_device": model_flops * batch / chips,
        },
        "hbm_traffic": traffic,
        "collectives": collectives,
        "roofline": {"seconds": seconds, "bound": bound},
        "predicted": aot_report.predict(chip, chips, batch, model_flops, seconds[bound]),
        "formula": "seconds = max(FLOP / peak, HBM bytes / bandwidth, sent bytes / ICI bandwidth)",
    }


def xla_flops(hlo: str) -> float:
    """Operations per device that XLA counts in a compiled program; a loop's body once."""
    from jaxlib import _hlo, _jax  # the parser of HLO texts has no public name

    module = _hlo.hlo_module_from_text(hlo)
    return _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)["flops"]


def _failed(errors: str) -> dict[str, Any]:
    """What to report of a compilation that failed: too little memory, or an error to raise."""
    full = OUT_OF_MEMORY.search(errors)
    if full:
        needed, there = [group for group in full.groups() if group]
        return {"fits": False, "needed": f"{needed} of {there}"}
    plain = [line for line in errors.splitlines() if line.startswith("error: ")]
    if plain:
        raise UserError(plain[-1].removeprefix("error: "))
    raise RuntimeError(f"The compilation failed:\n{errors[-4000:]}")


def versions() -> dict[str, str]:
    """Of jax and of the TPU compiler."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def _value_of(flag: str) -> str:
    """The value of a flag as it was written."""
    found = [a for a in sys.argv if re.match(rf"--?{flag}=", a)]
    if not found:
        raise UserError(f"--{flag}=... is missing; see the head of benchmarks/aot.py.")
    return found[-1].partition("=")[2]


def run(_: list[str]) -> None:
    """Does what the flags say."""
    if FLAGS.table:
        print(aot_report.table(aot_report.read_lines(FLAGS.table)))
        return
    for flag in ("topology", "config"):
        _value_of(flag)
    config = FLAGS.config
    if FLAGS.batch:
        config.train.batch_size = config.sampler.batch_size = FLAGS.batch
    factory.check(config)
    if FLAGS.dump:
        compile_here(config, FLAGS.program, FLAGS.topology, Path(FLAGS.dump))
        return
    for program in ("step", "sampler") if FLAGS.program == "both" else (FLAGS.program,):
        line = json.dumps(measure(config, program))
        print(line, flush=True)
        if FLAGS.out:
            with open(FLAGS.out, "a") as file:
                file.write(line + "\n")


def main() -> None:
    """Reads the command line; a user's mistake is one plain message and status 2."""
    try:
        if any(re.match(r"--?config=", a) for a in sys.argv):
            config_flags.DEFINE_config_file("config", lock_config=True)
        app.run(run)
    except (UserError, AttributeError, KeyError, OSError, TypeError) as error:
        if not isinstance(error, UserError) and FLAGS.is_parsed():
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
