"""Compiles the real training step or sampler for TPUs that need not exist; prints one JSON line.

    python -m benchmarks.aot --topology=v5e:16x16 --config=cifar10_edm [--config.dtype=bfloat16 ...]
        [--program=step|sampler] >> docs/aot.jsonl

The compiler is stopped once it has laid out the memory: generating code takes most of the time and
changes none of the numbers.
"""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax is imported: it must not look for a TPU, and several of these programs may run at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jaxlib import _hlo, _jax  # noqa: E402  # the parser of HLO texts has no public name
from ml_collections import ConfigDict  # noqa: E402

from benchmarks import aot_hlo, aot_report  # noqa: E402
from lora_diffusion_jax import cli  # noqa: E402
from lora_diffusion_jax.errors import UserError  # noqa: E402
from lora_diffusion_jax.factory import networks, training  # noqa: E402
from lora_diffusion_jax.training import loop, sharding  # noqa: E402

NUM_IMAGES = {"cifar10": 50_000, "ffhq-64x64.zip": 70_000, "imagenet-64x64.zip": 1_281_167}
LAID_OUT = "*after_optimizations_after_buffer_assignment.txt"
ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"


def build_mesh(config: ConfigDict, topology: str) -> Mesh:
    """A mesh of one device per chip of a topology."""
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology[:2] == "v4" else {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **options)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology={topology}: {error}. Is the extra `tpu` installed?") from error
    return training.build_mesh(config, described.devices)


def lower_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The training loop's program: gather, augment, loss, gradients, Adam, EMA, metrics."""
    denoiser = networks.build_denoiser(config)
    count = NUM_IMAGES[config.data.name or Path(config.data.path).name]
    shapes = training.step_arguments(config, denoiser, mesh, count)
    step = training.build_step(config, denoiser, mesh)
    return loop.jit_step(step, shapes[0], mesh).lower(*shapes)


def lower_sampler(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The whole sampling run of one batch, seeds in, uint8 out."""
    denoiser = networks.build_denoiser(config)
    generator = training.build_generator(config, denoiser, mesh)
    shapes = networks.variable_shapes(config, denoiser)
    layout = sharding.tree_sharding(shapes, mesh)
    variables = jax.tree.map(lambda v, where: v.update(sharding=where), shapes, layout)
    seeds = jax.ShapeDtypeStruct((generator.call_size,), jnp.uint32)
    labels = jax.ShapeDtypeStruct((len(seeds), max(generator.num_classes, 1)), jnp.float32)
    return generator.compiled.lower(variables, seeds, labels)


def lay_out(lowered: jax.stages.Lowered) -> tuple[str, str]:
    """Compiles until memory is laid out: the texts of the program and of its buffers.

    The compiler goes on in a thread, so the process must exit by os._exit.
    """
    folder = Path(tempfile.mkdtemp())
    options = {"xla_dump_to": str(folder)}
    compiling = ThreadPoolExecutor().submit(lowered.compile, compiler_options=options)
    size, before = 0, -1
    while size == 0 or size != before:
        if compiling.done():
            compiling.result()  # raises the compiler's error, for instance if memory does not suffice
        time.sleep(1)
        before, size = size, sum(path.stat().st_size for path in folder.glob(LAID_OUT))
    (program,), (buffers,) = folder.glob(LAID_OUT), folder.glob(ASSIGNMENT)
    return program.read_text(), buffers.read_text()


def measure(config: ConfigDict, program: str, topology: str) -> dict[str, Any]:
    """Compiles one program for a topology and derives what it needs and could reach."""
    mesh, is_step = build_mesh(config, topology), program == "step"
    batch = (config.train if is_step else config.sampler).batch_size
    batch = -(-batch // mesh.size) * mesh.size
    hlo, buffers = lay_out((lower_step if is_step else lower_sampler)(config, mesh))
    module, parsed = aot_hlo.Module(hlo), _hlo.hlo_module_from_text(hlo)
    flops = _jax.hlo_module_cost_analysis(jax.devices()[0].client, parsed)["flops"]
    evaluations = 3 if is_step else module.loop_trips()  # a step costs three forward passes
    flops *= 1 if is_step else evaluations  # XLA counts the body of a loop once
    in_kernels = module.kernel_flops()
    flops += in_kernels
    needed = evaluations * networks.forward_flops(config, networks.build_denoiser(config))
    sent = module.collectives()
    wire = sum(kind["wire_bytes"] for kind in sent.values())
    used = aot_report.Chip(flops, module.memory_traffic(), wire)
    return {
        **{"program": program, "topology": topology, "chips": mesh.size, "batch": batch},
        "mesh": dict(mesh.shape),
        "hbm": aot_hlo.memory_use(buffers),
        "hbm_traffic": used.memory,
        "fused_attention": in_kernels > 0,
        "flop": {"xla_per_device": flops, "analytic_per_image": needed},
        "collectives": sent,
        **aot_report.bound(topology, used, mesh.size, batch, needed),
        **{name: version(name) for name in ("jax", "libtpu")},
    }


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    others, name, overrides = cli.take_config(argv)
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--topology", required=True, help="chips along each axis: v5e:4x4")
    parser.add_argument("--program", default="step", choices=("step", "sampler"))
    args = parser.parse_args(others)
    if name is None:
        parser.error("--config is missing")
    config = cli.override(cli.load_config(name)[0], overrides)
    about = {"config": Path(name).stem, "dtype": config.dtype}
    about["overrides"] = sorted(o.removeprefix("--config.") for o in overrides)
    print(json.dumps(about | measure(config, args.program, args.topology)), flush=True)
    return 0


if __name__ == "__main__":
    os._exit(cli.run(main))  # without waiting for the compiler
