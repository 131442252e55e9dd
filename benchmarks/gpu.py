"""Sampling and training on one GPU, beside the authors' PyTorch code in the same run.

    python -m benchmarks.gpu [--peer=FOLDER] [--compile] [--batch=256] [--rounds=3] [--images=50000]
        [--what=accuracy,sampling,training,run] [--precisions=float32,tf32,bfloat16]

FOLDER is a checkout of the authors' code (lthilnklover/diffusion_lora); it needs PyTorch. Both sides
have the CIFAR-10 DDPM++ with LoRA, 57,746,907 parameters, and take turns. One JSON line per
measurement: the median of the rounds in images per second, the share of the GPU's peak (MFU), and
for the peer the ratio to ours at the same precision.

sampling    18 steps of Heun, 35 evaluations, latents on the GPU to uint8 images
training    augmentation, loss, gradients, Adam, average of the weights; the batch is on the GPU
accuracy    greatest difference of D(x; sigma) from float32's, relative to its greatest value
compilation seconds of what is timed
run         --images=N: N images through the generator, in seconds, host copies included
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory as well

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.factory import networks, training
from lora_diffusion_jax.training.state import create_state

# TFLOP/s without sparsity: NVIDIA's data sheets of H100 SXM and H200
PEAK = {"float32": 67, "tf32": 494, "bfloat16": 989}
MATMUL = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
STEPS, EVALUATIONS = 18, 35
WHAT = ("accuracy", "sampling", "training", "run")
Call = Callable[[], Any]


def config_of(precision: str, batch: int) -> ConfigDict:
    """configs/cifar10_edm.py at a precision."""
    config = importlib.import_module("configs.cifar10_edm").get_config()
    config.dtype = "bfloat16" if precision == "bfloat16" else "float32"
    config.train.batch_size = config.sampler.batch_size = batch
    return config


def random_variables(config: ConfigDict, denoiser: Denoiser) -> Any:
    """Variables of the network: N(0, 1/20^2), about 1 for the scales of norms.

    They are drawn on the host: on a GPU, initialising takes longer to compile than the benchmark to run.
    """
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = float(path[-1].key == "scale")
        return jnp.asarray(random.normal(mean, 1 / 20, leaf.shape), leaf.dtype)

    shapes = networks.variable_shapes(config, denoiser)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def programs(config: ConfigDict) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A jitted sampling run and the function of a training step, each with its arguments."""
    batch, side, channels = config.train.batch_size, config.data.image_size, config.data.channels
    denoiser, mesh = networks.build_denoiser(config), training.build_mesh(config)
    variables = random_variables(config, denoiser)
    generator = training.build_generator(config, denoiser, mesh)
    seeds, labels = jnp.arange(batch, dtype=jnp.uint32), jnp.eye(10)[np.arange(batch) % 10]
    images = jax.random.randint(jax.random.key(1), (batch, side, side, channels), 0, 255)
    images = images.astype(jnp.uint8)
    data = {"image": images, "label": jnp.arange(batch) % 10}
    # A step may take over the arrays of its state.
    state = create_state(jax.tree.map(jnp.copy, variables), training.build_optimizer(config))
    return {
        "sampling": (generator.compiled, (variables, seeds, labels)),
        "training": (
            training.build_step(config, denoiser, mesh),
            (state, data, jax.random.key(2)),
        ),
    }


def ours(
    config: ConfigDict, precision: str, what: Sequence[str] = ("sampling", "training")
) -> tuple[dict[str, Call], dict[str, float]]:
    """Calls of a compiled sampling run, of a training step, or of both, and how long each compiled."""
    made, loaded, compiling = programs(config), {}, {}
    with jax.default_matmul_precision(MATMUL[precision]):
        for name in what:
            function, given = made[name]
            jitted = jax.jit(function, donate_argnums=0) if name == "training" else function
            lowered = jitted.lower(*given)
            start = time.perf_counter()
            loaded[name] = lowered.compile()
            compiling[name] = time.perf_counter() - start

    _, (state, *data) = made["training"]
    current = [state]
    variables, *latents = made["sampling"][1]

    def sample() -> Any:
        return np.asarray(jax.block_until_ready(loaded["sampling"](variables, *latents))[0])

    def train() -> Any:
        current[0], metrics = loaded["training"](current[0], *data)
        return jax.block_until_ready(metrics)

    calls = {"sampling": sample, "training": train}
    return {name: calls[name] for name in what}, compiling


def peer(
    folder: str, config: ConfigDict, precision: str, compiled: bool, device: str = "cuda"
) -> dict[str, Call]:
    """The same two calls of the authors' network, sampler, loss and optimizer."""
    sys.path.insert(0, folder)
    import torch

    model, data, batch = config.model, config.data, config.train.batch_size

    blocks = {n: importlib.import_module(f"training.{n}") for n in ("networks", "lora", "loss")}
    augment_pipe = importlib.import_module("training.augment").AugmentPipe(
        p=config.augment.p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
    )
    net = blocks["networks"].EDMPrecond(
        img_resolution=data.image_size,
        img_channels=data.channels,
        label_dim=data.num_classes,
        model_type="SongUNet",
        model_channels=model.channels,
        channel_mult=list(model.channel_mult),
        num_blocks=model.num_blocks,
        attn_resolutions=list(model.attn_resolutions),
        augment_dim=model.augment_dim,
        dropout=model.dropout,
    )
    with contextlib.redirect_stdout(None):
        blocks["lora"].inject_trainable_lora(net, lora_rank=4, num_basis=18, mlp_width=[128, 64])
    net = net.to(device).requires_grad_(True)
    count, expected = sum(p.numel() for p in net.parameters()), parameters(config)
    assert abs(count - expected) < 1e-3 * expected, f"{count:,} parameters, ours {expected:,}"
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_of = blocks["loss"].EDMLoss()
    forward = torch.compile(net.model.forward) if compiled else net.model.forward

    def autocast(*inputs: Any, **named: Any) -> Any:  # the preconditioning wants float32 back
        with torch.autocast(device, torch.bfloat16, precision == "bfloat16"):
            return forward(*inputs, **named).float()

    net.model.forward = autocast
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True
    sampler = importlib.import_module("generate_all").edm_sampler
    pipe = augment_pipe if config.augment.p else None
    shape = (batch, data.channels, data.image_size, data.image_size)
    images = torch.randn(shape, device=device).clamp(-1, 1)
    labels = torch.eye(data.num_classes, device=device)[torch.arange(batch) % data.num_classes]

    @torch.no_grad()
    def sample() -> Any:
        net.eval()
        out = sampler(net, torch.randn_like(images), labels, num_steps=config.sampler.num_steps)
        return (out * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu().numpy()

    def train() -> Any:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net=net, images=images, labels=labels, augment_pipe=pipe)
        loss.sum().mul(1 / batch).backward()
        for p in net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                average[name].lerp_(p, 0.001)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"sampling": sample, "training": train}


def parameters(config: ConfigDict) -> int:
    """The number of parameters of a config's network."""
    denoiser = networks.build_denoiser(config)
    shapes = networks.variable_shapes(config, denoiser)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def seconds(call: Call) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call; they take turns."""
    for call in calls.values():  # compiles, and picks the convolutions' algorithms
        call()
        call()
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: float(np.median([t[name] for t in times])) for name in calls}


def differences(precisions: Sequence[str]) -> Iterator[tuple[str, float]]:
    """For each other precision, the greatest difference of D from float32's, over D's greatest value."""
    others = [precision for precision in precisions if precision != "float32"]
    if not others:
        return
    sigma = jnp.exp(jnp.linspace(-5, 4, 64))
    spread = jnp.sqrt(sigma**2 + 0.25)[:, None, None, None]
    shape = networks.image_shape(config_of("float32", 64))
    x = spread * jax.random.normal(jax.random.key(3), (64, *shape))
    labels = jnp.eye(10)[jnp.arange(64) % 10]

    def denoised(precision: str) -> jax.Array:
        config = config_of(precision, 64)
        denoiser = networks.build_denoiser(config)
        variables = random_variables(config, denoiser)
        meshed = networks.for_mesh(denoiser, training.build_mesh(config), train=False)
        with jax.default_matmul_precision(MATMUL[precision]):
            return jax.jit(meshed.apply)(variables, x, sigma, labels)

    exact = denoised("float32")
    for precision in others:
        error = jnp.abs(denoised(precision) - exact).max()
        yield precision, float(error / jnp.abs(exact).max())


def whole_run(precision: str, batch: int, count: int) -> float:
    """Seconds for `count` images through the generator, compilation left out."""
    config = config_of(precision, batch)
    denoiser, mesh = networks.build_denoiser(config), training.build_mesh(config)
    variables = random_variables(config, denoiser)
    generator = training.build_generator(config, denoiser, mesh)
    with jax.default_matmul_precision(MATMUL[precision]):
        list(generator.batches(variables, np.arange(batch)))
        return seconds(
            lambda: [len(b.seeds) for b in generator.batches(variables, np.arange(count))]
        )


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The parser of an argument that lists some of these names, separated by commas."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in names]:
            raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected {', '.join(names)}")
        return given

    return parse


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile, too")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--precisions", type=some_of(PEAK), default=list(PEAK))
    parser.add_argument("--what", type=some_of(WHAT), default=list(WHAT))
    args = parser.parse_args()
    if args.images and "run" not in args.what:
        parser.error("--images is for --what=run; found --what=" + ",".join(args.what))
    if args.what == ["run"] and not args.images:
        parser.error("--what=run needs --images, such as --images=50000")
    device = jax.devices()[0].device_kind

    config = config_of("float32", args.batch)
    flops = networks.forward_flops(config, networks.build_denoiser(config))
    about = {"benchmark": "gpu", "device": device, "batch": args.batch, "gflop": flops / 1e9}
    per_image = {"sampling": EVALUATIONS * flops, "training": 3 * flops}

    def report(**result: Any) -> None:
        short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
        print(json.dumps({**about, **short}), flush=True)

    def report_timed(precision: str, timed: Sequence[str]) -> None:
        config = config_of(precision, args.batch)
        calls, compiling = ours(config, precision, timed)
        report(what="compilation", precision=precision, **compiling)
        sides = {"ours": calls}
        if args.peer:
            sides["eager"] = peer(str(args.peer), config, precision, False)
        if args.peer and args.compile:
            sides["compile"] = peer(str(args.peer), config, precision, True)
        for what in timed:
            took = compare({who: calls[what] for who, calls in sides.items()}, args.rounds)
            for who, spent in took.items():
                rate = args.batch / spent
                report(
                    what=what,
                    precision=precision,
                    who=who,
                    images_per_sec=rate,
                    mfu=rate * per_image[what] / PEAK[precision] / 1e12,
                    ours_is_faster_by=spent / took["ours"],
                )

    if "accuracy" in args.what:
        for precision, difference in differences(args.precisions):
            report(what="accuracy", precision=precision, difference=difference)
    timed = [name for name in per_image if name in args.what]
    for precision in args.precisions:
        if timed:
            report_timed(precision, timed)
        if args.images:
            report(
                what="run",
                precision=precision,
                images=args.images,
                seconds=whole_run(precision, args.batch, args.images),
            )


if __name__ == "__main__":
    main()
