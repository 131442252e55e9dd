"""Kinds of runs of a sweep compared seed by seed: held-out loss per noise level, and what was evaluated."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from lora_diffusion_jax import default_config, files
from lora_diffusion_jax.analysis import paired, plots
from lora_diffusion_jax.analysis.paired import Difference, holm, paired_difference
from lora_diffusion_jax.analysis.updates import level_losses
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.diffusion.precond import Precond
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.factory.networks import num_classes
from lora_diffusion_jax.factory.pretrained import Pretrained, load_workdir
from lora_diffusion_jax.grids import Changes
from lora_diffusion_jax.keys import ANALYSIS, purpose_key
from lora_diffusion_jax.modes.likelihood import heldout_images
from lora_diffusion_jax.npz import write_npz
from lora_diffusion_jax.pages import collect
from lora_diffusion_jax.pages.collect import SEED
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.sweeps import plan, state
from lora_diffusion_jax.training.step import to_float, to_labels

USUAL_NUM = 1000  # held-out images, without --num
LEVELS = 16
FILES = ("compare.json", "compare.md", "compare.npz", "compare.png")
LOSS = "heldout_loss"
_DRAWS = 2**17  # noise levels as training draws them, of which the quantiles are taken


@dataclasses.dataclass
class Kind:
    """The runs of a sweep that differ in their seed alone.

    Attributes:
        label: their changed fields, as in a run's name.
        runs: seed -> the run's directory.
        levels: held-out loss [seeds, LEVELS], of the seeds in ascending order.
        measures: name -> value per seed, [seeds]: the mean held-out loss, and results of eval_fid.py.
        cost: parameters and the FLOP of a training step per image, where they are known.
    """

    label: str
    runs: dict[int, Path]
    levels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, LEVELS)))
    measures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    cost: dict[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A kind beside another in one measure.

    Attributes:
        kind: label of the one.
        against: label of the other.
        measure: what is compared.
        difference: kind - against; of the held-out loss, of its logarithms.
        p_corrected: by Holm's method over all kinds that are compared with `against` in this measure.
    """

    kind: str
    against: str
    measure: str
    difference: Difference
    p_corrected: float

    @property
    def record(self) -> dict[str, Any]:
        """For JSON."""
        labels = {"kind": self.kind, "against": self.against, "measure": self.measure}
        return {**labels, **self.difference._asdict(), "p_corrected": self.p_corrected}


def compare(
    directory: Path, against: str, out: Path, *, num: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Compares the kinds of runs of a finished sweep; writes FILES to a folder, returns key figures.

    Args:
        directory: of the sweep.
        against: labels of the kinds that all others are compared with, separated by semicolons.
        out: the folder.
        num: held-out images, evenly spread; None: USUAL_NUM, or all if they are fewer.
        overwrite: replace the files of an earlier comparison.

    Raises:
        UserError: this is no sweep, it is not finished, its kinds do not have the same seeds or not the same
            data and noise levels, there are no held-out images, or `out` cannot be written.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    kinds = find_kinds(directory)
    families = choose_families(kinds, against)
    check_folder(out, overwrite)
    read_results(list(kinds.values()))
    sigmas = measure_losses(list(kinds.values()), num)
    found = [c for one, others in families for c in compare_with(one, others)]
    write(out, kinds, found, sigmas)
    return summary(kinds, found) | {"out": str(out), "files": list(FILES)}


# The kinds of runs.


def find_kinds(directory: Path) -> dict[str, Kind]:
    """The kinds of runs of a sweep by label, in the sweep's order.

    Fields that the seed decides, such as the run that each starts from, tell no kinds apart.

    Raises:
        UserError: see `compare`.
    """
    entries = {name: e for name, e in state.read(directory).items() if e.listed}
    if not entries:
        raise UserError(f"{directory} holds no sweep; give the --workdir of --mode=sweep.")
    if left := [name for name, entry in entries.items() if entry.state != "done"]:
        raise UserError(
            f"{len(left)} of the {len(entries)} runs of {directory} are not done, such as {left[0]} "
            f"({entries[left[0]].state}); no run is left out of a comparison. Run the sweep's command again."
        )
    changes = {name: entry.changes for name, entry in entries.items()}
    apart = {SEED, *decided_by_seed(list(changes.values()))}
    fields = flatten_dict(default_config.base().to_dict(), sep=".")
    kinds: dict[str, Kind] = {}
    for name, changed in changes.items():
        if type(seed := changed.get(SEED)) is not int:
            raise UserError(
                f"The run {name} of {directory} has no {SEED} of its own; a comparison is of runs with "
                f"several seeds. Sweep over {SEED}, too."
            )
        label = plan.name_of({k: v for k, v in changed.items() if k not in apart}, fields)
        kinds.setdefault(label, Kind(label, {})).runs[seed] = directory / name
    check_seeds(list(kinds.values()), directory)
    return kinds


def decided_by_seed(runs: Sequence[Changes]) -> list[str]:
    """The fields that all runs have and whose value depends on the seed alone, and differs between seeds."""
    found = []
    for field in runs[0].keys() - {SEED}:
        values: dict[Any, set[str]] = {}
        for changed in runs:
            values.setdefault(changed.get(SEED), set()).add(repr(changed.get(field)))
        distinct = {min(v) for v in values.values()}
        if all(len(v) == 1 for v in values.values()) and len(distinct) == len(values) > 1:
            found.append(field)
    return found


def check_seeds(kinds: Sequence[Kind], directory: Path) -> None:
    """Raises UserError unless there are two kinds or more, with the same two seeds or more."""
    if len(kinds) < 2:
        raise UserError(f"All runs of {directory} are of one kind; there is nothing to compare.")
    for kind in kinds:
        if kind.runs.keys() != kinds[0].runs.keys() or len(kind.runs) < 2:
            raise UserError(
                f"{kind.label} has the seeds {results.seeds_text(sorted(kind.runs))}, {kinds[0].label} has "
                f"{results.seeds_text(sorted(kinds[0].runs))}; a comparison needs the same seeds of each "
                "kind, at least two."
            )


def choose_families(kinds: Mapping[str, Kind], against: str) -> list[tuple[Kind, list[Kind]]]:
    """Each kind of --against with those that are compared with it; no pair twice.

    Raises:
        UserError: there is no such kind, or one is named twice.
    """
    labels = [label.strip() for label in against.split(";")]
    families: list[tuple[Kind, list[Kind]]] = []
    for number, label in enumerate(labels):
        if label not in kinds or label in labels[:number]:
            raise UserError(
                f"--against={against}: there is no other kind {label!r}; the sweep has "
                f"{' ; '.join(kinds)}. Name one, or several separated by semicolons."
            )
        others = [kind for name, kind in kinds.items() if name not in labels[: number + 1]]
        families.append((kinds[label], others))
    return families


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError for an --out that is no folder, or has a comparison already."""
    if out.suffix in (".json", ".md", ".npz", ".png") or (out.exists() and not out.is_dir()):
        raise UserError(f"--out={out}: a comparison is several files; name a folder.")
    there = [name for name in FILES if (out / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{out} holds {there[0]} already: choose another --out, or add --overwrite to replace it."
        )
    with files.disk_errors(out):  # now, rather than after the work
        out.mkdir(parents=True, exist_ok=True)


# What is measured.


def read_results(kinds: Sequence[Kind]) -> None:
    """Adds the results of eval_fid.py that every run has, means over sampling seeds, and the costs.

    Raises:
        UserError: some runs have a result that others lack, or were sampled with other seeds.
    """
    found: dict[Path, dict[str, tuple[set[str], float]]] = {}
    for kind in kinds:
        runs = [
            collect.collect(collect.Source(kind.label, folder, {})) for folder in kind.runs.values()
        ]
        kind.cost = {"parameters": runs[0].parameters, "gflop": runs[0].gflop}
        found |= {folder: results_of(folder) for folder in kind.runs.values()}
    for name in sorted({name for measured in found.values() for name in measured}):
        seeds = {folder: measured.get(name, (set(), 0.0))[0] for folder, measured in found.items()}
        some = next(text for text in seeds.values() if text)
        if other := [folder for folder, text in seeds.items() if text != some]:
            raise UserError(
                f"{other[0]} has no result {name} for the sampling seeds {', '.join(sorted(some))}, which "
                "another run has. Evaluate all alike: eval_fid.py all --workdir=SWEEP ..."
            )
        for kind in kinds:
            values = [found[kind.runs[seed]][name][1] for seed in sorted(kind.runs)]
            kind.measures[name] = np.array(values)


def results_of(folder: Path) -> dict[str, tuple[set[str], float]]:
    """A run's results of its newest evaluated step with EMA weights: metric -> (sampling seeds, mean)."""
    records = results.read(results.results_file(folder)).values()
    single = [r for r in records if r.get("weights") == "ema" and "repeats" not in r]
    last = max((record["step"] for record in single), default=0)
    values: dict[str, dict[str, float]] = {}
    for record in single:
        if record["step"] == last:
            values.setdefault(record["metric"], {})[record["seeds"]] = record["value"]
    return {name: (set(by), float(np.mean(list(by.values())))) for name, by in values.items()}


def training_levels(precond: Precond) -> np.ndarray:
    """Quantiles (k + 1/2) / LEVELS of the noise levels that training draws, ascending."""
    draws = precond.draw_sigma(purpose_key(0, ANALYSIS), _DRAWS)
    quantiles = (np.arange(LEVELS) + 0.5) / LEVELS
    return np.quantile(np.asarray(draws), quantiles, method="closest_observation")


def measure_losses(kinds: Sequence[Kind], num: int | None) -> np.ndarray:
    """Adds the held-out losses to all kinds; returns the noise levels.

    Raises:
        UserError: runs differ in their data or noise levels, or there are not so many images.
    """
    first: Pretrained | None = None
    with tqdm(total=sum(len(k.runs) for k in kinds), unit="run", disable=None) as bar:
        for kind in kinds:
            loss: Callable[[Any], np.ndarray] | None = None
            rows = []
            for seed in sorted(kind.runs):
                pause_point()
                run = load_workdir(kind.runs[seed])
                if first is None:
                    first, sigmas = run, training_levels(run.denoiser.precond)
                    source = heldout_images(run.config)
                    chosen = choose_images(source, num)
                check_alike(first, run, kind.runs[seed])
                loss = loss or heldout_loss(
                    run, source, chosen, sigmas
                )  # one program for all seeds
                rows.append(loss(run.variables))
                bar.update()
            kind.levels = np.stack(rows)
            kind.measures = {LOSS: kind.levels.mean(axis=1), **kind.measures}
    return sigmas


def choose_images(source: ImageSource, num: int | None) -> np.ndarray:
    """The numbers of `num` evenly spread images.

    Raises:
        UserError: there are not so many.
    """
    num = min(USUAL_NUM, len(source)) if num is None else num
    if not 1 <= num <= len(source):
        raise UserError(
            f"--num={num}; there are {len(source)} held-out images, choose a number from 1 to that."
        )
    return np.arange(num) * len(source) // num


def check_alike(first: Pretrained, run: Pretrained, folder: Path) -> None:
    """Raises UserError unless two runs have the same data and the same loss."""
    for group in ("data", "precond"):
        ours, theirs = (flatten_dict(c.config[group].to_dict()) for c in (first, run))
        if differing := [key for key in ours if ours[key] != theirs.get(key)]:
            field = ".".join((group, *differing[0]))
            raise UserError(
                f"{folder} differs from other runs in {field}, so that their losses cannot be compared; "
                "compare runs of one data set and one preconditioning."
            )


def heldout_loss(
    run: Pretrained, source: ImageSource, chosen: np.ndarray, sigmas: np.ndarray
) -> Callable[[Any], np.ndarray]:
    """A function of variables: the mean loss [LEVELS] of a network over chosen held-out images.

    The noise of an image depends on its number in the data set alone.
    """
    size = min(run.config.sampler.batch_size, len(chosen))
    losses = jax.jit(functools.partial(level_losses, Objective(run.denoiser)))

    def noise_of(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(purpose_key(0, ANALYSIS), number)
        return jax.random.normal(key, source.image_shape)

    def loss(variables: Any) -> np.ndarray:
        parts = []
        for start in range(0, len(chosen), size):
            part = np.resize(chosen[start : start + size], size)  # whole batches: one program
            batch = source.read(part.tolist())
            labels = to_labels(jnp.asarray(batch["label"]), num_classes(run.config))
            noise = jax.vmap(noise_of)(jnp.asarray(part, jnp.uint32))
            images = to_float(jnp.asarray(batch["image"]))
            found = losses(variables, images, labels, noise, jnp.asarray(sigmas, jnp.float32))
            parts.append(np.asarray(found, np.float64)[:, : len(chosen) - start])
        return np.concatenate(parts, axis=1).mean(axis=1)

    return loss


# What is found.


def compare_with(against: Kind, kinds: Sequence[Kind]) -> list[Comparison]:
    """All kinds beside one, in all measures."""
    found = []
    for measure in against.measures:
        scale = np.log if measure == LOSS else np.asarray
        differences = [
            paired_difference(scale(kind.measures[measure]), scale(against.measures[measure]))
            for kind in kinds
        ]
        corrected = holm([difference.p for difference in differences])
        found += [
            Comparison(kind.label, against.label, measure, difference, p)
            for kind, difference, p in zip(kinds, differences, corrected, strict=True)
        ]
    return found


def percent(logarithm: float) -> float:
    """A difference of logarithms as a change in percent."""
    return 100 * float(np.expm1(logarithm))


def summary(kinds: Mapping[str, Kind], found: Sequence[Comparison]) -> dict[str, Any]:
    """Key figures: the change of the held-out loss in percent, per comparison."""
    return {
        "runs": sum(len(kind.runs) for kind in kinds.values()),
        "kinds": len(kinds),
        "seeds": len(next(iter(kinds.values())).runs),
        "heldout_loss_change_percent": {
            f"{c.kind} - {c.against}": round(percent(c.difference.mean), 3)
            for c in found
            if c.measure == LOSS
        },
    }


def write(
    out: Path, kinds: Mapping[str, Kind], found: Sequence[Comparison], sigmas: np.ndarray
) -> None:
    """Writes the numbers as JSON, tables and arrays, and the picture."""
    every = list(kinds.values())
    record = {
        "kinds": [
            {
                "kind": kind.label,
                "seeds": sorted(kind.runs),
                **kind.cost,
                "means": {name: float(v.mean()) for name, v in kind.measures.items()},
                "deviations": {name: float(v.std(ddof=1)) for name, v in kind.measures.items()},
            }
            for kind in every
        ],
        "comparisons": [comparison.record for comparison in found],
        "confidence": paired.CONFIDENCE,
        "noise_levels": sigmas.tolist(),
    }
    arrays = {
        "kinds": np.array([kind.label for kind in every]),
        "seeds": np.array(sorted(every[0].runs)),
        "sigmas": sigmas,
        "heldout_levels": np.stack([kind.levels for kind in every]),
        **{name: np.stack([kind.measures[name] for kind in every]) for name in every[0].measures},
    }
    with files.disk_errors(out):
        files.write_text(out / "compare.json", json.dumps(record, indent=1) + "\n")
        files.write_text(out / "compare.md", tables(every, found))
        plots.write(picture(kinds, found, sigmas), out / "compare.png")
    write_npz(out / "compare.npz", arrays)


def tables(kinds: Sequence[Kind], found: Sequence[Comparison]) -> str:
    """Markdown: means and sample deviations of all kinds; differences, a table for each other kind."""
    names = list(kinds[0].measures)
    lines = [_row("kind", "parameters", "GFLOP", *names), _row(*["---"] * (3 + len(names)))]
    for kind in kinds:
        parameters, gflop = kind.cost["parameters"], kind.cost["gflop"]
        cells = (
            "" if parameters is None else f"{parameters:,.0f}",
            "" if gflop is None else f"{gflop:.3g}",
        )
        values = (f"{v.mean():.4g} ± {v.std(ddof=1):.2g}" for v in kind.measures.values())
        lines.append(_row(kind.label, *cells, *values))
    for against in dict.fromkeys(c.against for c in found):
        lines += ["", f"Difference from {against}, its 95 % interval, and p corrected:", ""]
        lines += [_row("kind", *names), _row(*["---"] * (1 + len(names)))]
        family = [c for c in found if c.against == against]
        for label in dict.fromkeys(c.kind for c in family):
            cells_of = {c.measure: _cell(c) for c in family if c.kind == label}
            lines.append(_row(label, *(cells_of[name] for name in names)))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(comparison: Comparison) -> str:
    """'-2.1 % (-3.0 to -1.2), p 0.047': bold if p is below 0.05."""
    mean, low, high, _ = comparison.difference
    if comparison.measure == LOSS:
        text = f"{percent(mean):+.2f} % ({percent(low):+.2f} to {percent(high):+.2f})"
    else:
        text = f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"
    text += f", p {comparison.p_corrected:.2g}"
    return f"**{text}**" if comparison.p_corrected < 0.05 else text


def picture(
    kinds: Mapping[str, Kind], found: Sequence[Comparison], sigmas: np.ndarray
) -> plots.Figure:
    """Changes of the held-out loss: of each kind, and at each noise level, against the first of --against."""
    against = found[0].against
    shown = [c for c in found if c.against == against and c.measure == LOSS]
    base = np.log(kinds[against].levels)
    levels = [
        [
            paired_difference(np.log(kinds[c.kind].levels[:, k]), base[:, k])
            for k in range(len(sigmas))
        ]
        for c in shown
    ]
    return plots.comparison(
        [c.kind for c in shown],
        np.array([[percent(v) for v in c.difference[:3]] for c in shown]),
        np.array([[[percent(v) for v in d[:3]] for d in row] for row in levels]),
        sigmas,
        f"Held-out loss, change against {against} ({len(base)} seeds, 95 % intervals)",
    )
