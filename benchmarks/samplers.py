"""Error and distance against evaluations for every solver and grid; one JSON line a measurement.

python -m benchmarks.samplers --workdir=workdirs/digits [--step=N] [--num=64] [--distance=500] \
    [--budgets=4,5,6,8,10,14,20] [--grids=rho,searched] [--plot=FILE.png --lines=FILE.jsonl]

error       root mean square difference to --fine steps of Heun's method on the same latents, in [-1, 1]
fd          `fd_classifier` of that many samples against the data set's held-out images (as in training)

The network is compiled once, for one batch: solvers are replayed step by step around it. With --lines
alone, --plot draws what an earlier run printed.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Images
from lora_diffusion_jax.diffusion.samplers import (
    SAMPLERS,
    BoundDenoiser,
    searched_grid,
    to_uint8,
)
from lora_diffusion_jax.evaluation.evaluator import for_training
from lora_diffusion_jax.factory.data import open_heldout, open_source
from lora_diffusion_jax.factory.pretrained import Pretrained, load_workdir
from lora_diffusion_jax.factory.sampling import open_generator

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_3m": ("dpmpp_3m", {}),
    "unipc 2": ("unipc", {"order": 2}),
    "unipc 3": ("unipc", {"order": 3}),
    "deis 1": ("deis", {"order": 1}),
    "deis 3": ("deis", {"order": 3}),
    "ipndm 2": ("ipndm", {"order": 2}),
    "ipndm 3": ("ipndm", {"order": 3}),
    "ipndm 4": ("ipndm", {"order": 4}),
}
GRIDS: dict[str, dict[str, Any]] = {
    "rho": {},
    "log_snr": {"grid": "log_snr"},
    "uniform": {"grid": "uniform"},
    "searched": {"grid": "searched"},
    "afs": {"afs": True},
    "to_zero": {"to_zero": True},
}


class Bench:
    """A run's network, compiled for one batch of labels, and the latents of its seeds.

    Attributes:
        calls: how often the network was called.
    """

    def __init__(self, run: Pretrained, batch: int) -> None:
        self.run, self.batch, self.calls = run, batch, 0
        self.grids: dict[tuple[int, bool], tuple[float, ...]] = {}
        self.generator = open_generator(run)
        bind = self.generator.bind

        def denoise(variables: Any, labels: Any, x: Images, sigma: jax.Array) -> Images:
            return bind(run.denoiser, variables, labels)(x, sigma)

        self.variables = jax.tree.map(jnp.asarray, run.sampled_variables)
        self.network = jax.jit(denoise)

    def _labels(self, seeds: np.ndarray) -> jax.Array | None:
        if not self.generator.num_classes:
            return None
        return jnp.asarray(self.generator.one_hot(self.generator.choose_labels(seeds)))

    def _latents(self, seeds: np.ndarray) -> Images:
        return self.generator.latents(jnp.asarray(seeds, jnp.uint32))

    def denoise(self, labels: jax.Array | None) -> BoundDenoiser:
        """D(x; sigma) that calls the compiled network and counts."""

        def call(x: Images, sigma: jax.Array) -> Images:
            self.calls += 1
            with jax.disable_jit(False):
                return self.network(self.variables, labels, x, jnp.float32(sigma))

        return BoundDenoiser(call, self.run.denoiser.precond)

    def images(self, name: str, count: int, **settings: Any) -> tuple[Images, int]:
        """The images of the first seeds, and how many evaluations each took."""
        made = []
        for start in range(0, count, self.batch):
            seeds = np.arange(start, start + self.batch)
            self.calls = 0
            with jax.disable_jit():  # a scan is then a loop, and the network stays compiled
                denoise = self.denoise(self._labels(seeds))
                made.append(SAMPLERS[name](denoise, self._latents(seeds), **settings))
        return jnp.concatenate(made)[:count], self.calls

    def grid(self, num_steps: int, to_zero: bool) -> tuple[float, ...]:
        """The noise levels of grid=searched, searched once."""
        if (num_steps, to_zero) not in self.grids:
            seeds = np.arange(self.batch)
            with jax.disable_jit():
                denoise = self.denoise(self._labels(seeds))
                levels = searched_grid(denoise, self._latents(seeds), num_steps, to_zero=to_zero)
            self.grids[num_steps, to_zero] = tuple(levels.tolist())
        return self.grids[num_steps, to_zero]


def measure(
    bench: Bench,
    budgets: list[int],
    grids: list[str],
    fine_steps: int,
    num: int,
    distance: Callable[[Images], float] | None,
) -> Iterator[dict[str, Any]]:
    """One record per solver, grid and number of steps."""
    count = max(num, bench.batch)
    fine, _ = bench.images("heun", count, num_steps=fine_steps)
    for steps in budgets:
        for solver, (name, own) in SOLVERS.items():
            for grid in grids:
                shared = GRIDS[grid]
                second = name == "heun"
                settings = {"to_zero": False, **shared, **own}
                settings["num_steps"] = steps // 2 if second else steps
                if settings["num_steps"] < 2 or (second and grid == "searched"):
                    continue  # that grid is for one evaluation a step
                if grid == "searched":
                    settings["sigmas"] = bench.grid(settings["num_steps"], settings["to_zero"])
                made, nfe = bench.images(name, count, **settings)
                error = float(jnp.sqrt(jnp.mean((made[:num] - fine[:num]) ** 2)))
                record = {"solver": solver, "grid": grid, "nfe": nfe, "error": error, "of": num}
                if distance is not None:
                    record["fd"] = distance(made)
                yield record


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Error, and the distance where it was measured, against evaluations; a row of panels per grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grids = [g for g in ("rho", "searched") if any(r["grid"] == g for r in records)]
    values = [v for v in ("error", "fd") if any(v in r for r in records)]
    figure = Figure(figsize=(5.5 * len(grids), 3.6 * len(values)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(values), len(grids), squeeze=False, sharex=True, sharey="row")
    for row, value in zip(axes, values, strict=True):
        for panel, grid in zip(row, grids, strict=True):
            for i, solver in enumerate(SOLVERS):
                points = sorted(
                    (r["nfe"], r[value])
                    for r in records
                    if r["grid"] == grid and r["solver"] == solver and value in r
                )
                if points:
                    style = {
                        "color": f"C{i % 10}",  # the same in every panel, of which some lack solvers
                        "marker": "o",
                        "markersize": 3,
                        "linestyle": "-" if i < 10 else "--",
                    }
                    panel.plot(*zip(*points, strict=True), label=solver, **style)
            panel.set_yscale("log")
            panel.set_title(f"grid {grid}")
            panel.set_xlabel("evaluations of the network")
            panel.grid(alpha=0.3)
        row[0].set_ylabel(value)
    axes[0][0].legend(fontsize=7, ncols=2)  # the panel with all solvers
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir")
    add("--step", type=int)
    add("--num", type=int, default=64, help="images that the error is a mean of")
    add("--distance", type=int, default=0, help="samples of the distance; 0: leave it out")
    add("--budgets", default="4,5,6,8,10,14,20", help="evaluations, about")
    add("--fine", type=int, default=100, help="steps of the reference")
    add("--grids", default=",".join(GRIDS))
    add("--plot", type=Path)
    add("--lines", type=Path, help="what earlier runs printed, for --plot")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.lines.open()] if args.lines else []
    if args.workdir:
        run = load_workdir(args.workdir, at_step=args.step)
        distance = None
        if args.distance:
            evaluate = for_training(
                open_source(run.config),
                open_heldout(run.config),
                reference="",
                inception="",
                counts=[args.distance],
            )

            def distance(made: Images) -> float:
                found = evaluate([np.asarray(to_uint8(made[: args.distance]))], args.distance)
                return next(v for k, v in found.items() if k.startswith("fd_classifier"))

        bench = Bench(run, max(args.num, args.distance))
        about = {"step": run.step, "device": jax.devices()[0].device_kind}
        budgets = [int(n) for n in args.budgets.split(",")]
        for record in measure(bench, budgets, args.grids.split(","), args.fine, args.num, distance):
            print(json.dumps(record | about), flush=True)
            records.append(record)
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
