"""What each row of the paper's table costs before it is run: the table of docs/reproducing.md.

    python -m benchmarks.costs

Parameters and FLOP are those of the networks themselves, the rate is that which benchmarks.gpu measured.
"""

import dataclasses
import itertools

from lora_diffusion_jax import cli, lora
from lora_diffusion_jax.factory import networks, objectives

# FLOP/s of the CIFAR-10 network with LoRA on one NVIDIA H200, bfloat16, batch 256 (docs/scaling.md).
TRAINING = 2528 * 3 * 40.587e9  # images a second; a training image costs three evaluations
SAMPLING = 275 * 35 * 40.587e9
SAMPLES = 50_000
HEAD = """\
| network | mode | parameters | GFLOP | EFLOP | training | sampling | FID, paper | here |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of table 1 of arXiv 2405.03958: its config with overrides, and the paper's FID."""

    group: str  # data
    title: str  # network and mode
    config: str
    fid: str
    overrides: tuple[str, ...] = ()

    def line(self) -> str:
        """The row in Markdown."""
        config = cli.override(
            cli.load_config(self.config)[0], [f"--config.{field}" for field in self.overrides]
        )
        denoiser = networks.build_denoiser(config)
        flops, images = networks.forward_flops(config, denoiser), config.train.total_images
        count = lora.count(networks.variable_shapes(config, denoiser)["params"])
        nfe = objectives.count_evaluations(
            config, objectives.build_sampler(config, denoiser), denoiser
        )
        train, sample = 3 * flops * images, flops * nfe * SAMPLES
        cells = [
            self.title,
            f"{count:,}",
            f"{flops / 1e9:.1f}",
            f"{train / 1e18:,.3g}",
            f"{train / TRAINING / 3600:,.0f} h",
            f"{sample / SAMPLING / 60:,.0f} min",
            self.fid,
            "not yet",
        ]
        return f"| {' | '.join(cells)} |"


def rows() -> list[Row]:
    """All rows, in the order of the paper."""
    modes = ("baseline", "only_lora", "with_lora")
    found = []
    for classes, iddpm, edm in (
        ("unconditional", ("3.69", "3.64", "3.37"), ("1.97", "1.99", "1.96 / 1.91")),
        ("conditional", ("3.38", "2.91", "3.12"), ("1.79", "1.82", "1.75")),
    ):
        conditional = classes == "conditional"
        both = ("lora.adapter=time_class",) if conditional else ()
        for kind, config, fids, more in (
            ("IDDPM", "cifar10_iddpm", iddpm, both),
            ("EDM", "cifar10_edm", edm, ()),
        ):
            for mode, fid in zip(modes, fids, strict=True):
                group, title = f"CIFAR-10, {classes}", f"{kind} | {mode}"
                fields = (f"class_conditional={conditional}", f"lora.mode={mode}", *more)
                found.append(Row(group, title, config, fid, fields))
    for mode, fid in zip(modes, ("19.2", "18.2", "not at hand"), strict=True):
        group, title = "ImageNet-64, unconditional", f"IDDPM | {mode}"
        found.append(Row(group, title, "imagenet64_iddpm", fid, (f"lora.mode={mode}",)))
    return found


def tables() -> str:
    """All rows in Markdown, a table for each data set."""
    lines = []
    for group, members in itertools.groupby(rows(), lambda row: row.group):
        lines += [f"**{group}**", "", HEAD, *(row.line() for row in members), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
