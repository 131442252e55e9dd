"""Kinds of runs of a sweep compared seed by seed: held-out loss per noise level, and what was evaluated."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from lora_diffusion_jax import default_config
from lora_diffusion_jax.analysis.paired import holm, paired_difference
from lora_diffusion_jax.analysis.updates import level_losses, noise_of
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.diffusion.precond import Precond
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.results import note
from lora_diffusion_jax.factory.networks import num_classes
from lora_diffusion_jax.factory.objectives import refuse_changes
from lora_diffusion_jax.factory.pretrained import Pretrained, load_workdir
from lora_diffusion_jax.factory.training import build_cadence
from lora_diffusion_jax.keys import ANALYSIS, purpose_key
from lora_diffusion_jax.modes import comparison
from lora_diffusion_jax.modes.comparison import LOSS, Comparison, Measured
from lora_diffusion_jax.modes.likelihood import heldout_images
from lora_diffusion_jax.modes.sample import choose_images, make_folder
from lora_diffusion_jax.pages import collect
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.sweeps.evaluated import read_measures
from lora_diffusion_jax.sweeps.kinds import SEED, Kind, choose_families, find_kinds
from lora_diffusion_jax.training.step import to_float, to_labels

USUAL_NUM = 1000  # held-out images, without --num
LEVELS = 16
_DRAWS = 2**17  # noise levels as training draws them, of which the quantiles are taken


def compare(
    directory: Path, against: str, out: Path, *, num: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Compares the kinds of runs of a finished sweep; writes `comparison.FILES`, returns key figures.

    Args:
        directory: of the sweep.
        against: labels of the kinds that all others are compared with, separated by semicolons.
        out: the folder.
        num: held-out images, evenly spread; None: USUAL_NUM, or all if they are fewer.
        overwrite: replace the files of an earlier comparison.

    Raises:
        UserError: this is no finished sweep of several kinds and seeds, its runs differ in more than the
            sweep varies, there are no held-out images, or `out` cannot be written.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    fields = flatten_dict(default_config.base().to_dict(), sep=".")
    found = find_kinds(directory, fields)
    families = choose_families(found.by_label, against)
    make_folder(out, comparison.FILES, "a comparison", overwrite)
    kinds = list(found.by_label.values())
    measures, notes = read_measures([run for kind in kinds for run in kind.runs.values()])
    if found.unlisted:
        notes.append(f"left out, as the sweep no longer asks for them: {', '.join(found.unlisted)}")
    if found.by_seed:
        notes.append(f"{', '.join(found.by_seed)} varies with the seed, and distinguishes no kinds")
    for text in notes:
        note(text)
    heldout = HeldOut(kinds, found.by_seed, num)
    measured = {}
    for kind in kinds:
        levels = heldout.losses(kind)
        values = {name: _of_kind(kind, measure.values) for name, measure in measures.items()}
        cost = _cost(next(iter(kind.runs.values())))
        measured[kind.label] = Measured(kind, levels, {LOSS: levels.mean(axis=1), **values}, **cost)
    about = heldout.about | {
        "results": {name: measure.settings for name, measure in measures.items()},
        "notes": notes,
    }
    pairs = [
        compared
        for one, others in families
        for compared in compare_with(measured[one.label], [measured[k.label] for k in others])
    ]
    comparison.write(out, list(measured.values()), pairs, heldout.sigmas, about)
    return comparison.summary(list(measured.values()), pairs) | {
        "out": str(out),
        "files": list(comparison.FILES),
    }


def _of_kind(kind: Kind, values: Any) -> np.ndarray:
    return np.array([values[run] for run in kind.runs.values()])


def _cost(run: Path) -> dict[str, float | None]:
    """Parameters, and GFLOP of a training step per image, of a run as its directory says."""
    shown = collect.collect(collect.Source("", run, {}))
    return {"parameters": shown.parameters, "gflop": shown.gflop}


def compare_with(against: Measured, others: Sequence[Measured]) -> list[Comparison]:
    """Some kinds beside one, in all measures; p corrected for their number in each measure by itself."""
    found = []
    for measure in against.measures:
        scale: Callable[..., np.ndarray] = np.log if measure == LOSS else np.asarray
        differences = [
            paired_difference(scale(other.measures[measure]), scale(against.measures[measure]))
            for other in others
        ]
        corrected = holm([difference.p for difference in differences])
        found += [
            Comparison(other.label, against.label, measure, difference, p)
            for other, difference, p in zip(others, differences, corrected, strict=True)
        ]
    return found


def training_levels(precond: Precond) -> np.ndarray:
    """Quantiles (k + 1/2) / LEVELS of the noise levels that training draws, ascending."""
    draws = precond.draw_sigma(purpose_key(0, ANALYSIS), _DRAWS)
    quantiles = (np.arange(LEVELS) + 0.5) / LEVELS
    return np.quantile(np.asarray(draws), quantiles, method="closest_observation")


class HeldOut:
    """The held-out images, and what every network of a sweep makes of them.

    The noise of an image depends on its number in the data set alone.

    Args:
        kinds: of the sweep; a run of the first one gives the data and the noise levels.
        by_seed: fields in which the runs may differ with their seed.
        num: images, evenly spread; None: USUAL_NUM, or all if they are fewer.

    Attributes:
        sigmas: the noise levels [LEVELS].
        about: what was measured, as JSON types.

    Raises:
        UserError: a kind changes the data or the preconditioning; or there are not so many images.
    """

    def __init__(self, kinds: Sequence[Kind], by_seed: Sequence[str], num: int | None):
        for kind in kinds:
            if changed := [f for f in kind.changes if f.startswith(("data.", "precond."))]:
                raise UserError(
                    f"{kind.label} changes {changed[0]}, so that its loss is not that of other kinds; "
                    "compare kinds of one data set and one preconditioning."
                )
        self.varied = {SEED, *by_seed}.union(*(kind.changes for kind in kinds))
        self.first = load_workdir(next(iter(kinds[0].runs.values())))
        self.sigmas = training_levels(self.first.denoiser.precond)
        self.sources: dict[bool, ImageSource] = {}  # with labels, or without
        source = self._source(self.first)
        self.chosen = choose_images(source, num, USUAL_NUM, 1, "held-out")
        self.about = {
            "heldout_images": len(self.chosen),
            "heldout_data": source.title,
            "weights": "ema",
            "images_seen": self.first.config.train.total_images,
        }

    def _source(self, run: Pretrained) -> ImageSource:
        """The held-out images, with labels if the network has classes."""
        labelled = num_classes(run.config) > 0
        if labelled not in self.sources:
            self.sources[labelled] = heldout_images(run.config)
        return self.sources[labelled]

    def losses(self, kind: Kind) -> np.ndarray:
        """The mean loss of a kind's runs at each noise level, [seeds, LEVELS].

        Raises:
            UserError: a run differs from others in more than the sweep changes, or its loss is not finite.
        """
        rows, program = [], None
        for path in tqdm(kind.runs.values(), unit="run", desc=kind.label, disable=None):
            pause_point()
            run = load_workdir(path)
            self._check(run, path)
            if program is None:  # one for all seeds
                program = jax.jit(functools.partial(level_losses, Objective(run.denoiser)))
            row = self._loss(run, program)
            if not np.isfinite(row).all():
                level = self.sigmas[~np.isfinite(row)][0]
                raise UserError(
                    f"The held-out loss of {path} at the noise level {level:.3g} is not finite; train it "
                    "again with other settings, or sweep without its kind."
                )
            rows.append(row)
        return np.stack(rows)

    def _loss(self, run: Pretrained, program: Callable[..., jax.Array]) -> np.ndarray:
        """The mean loss of a network at each noise level."""
        source, count = self._source(run), len(self.chosen)
        size, parts = min(run.config.sampler.batch_size, count), []
        for start in range(0, count, size):
            part = np.resize(self.chosen[start : start + size], size)  # whole batches: one program
            batch = source.read(part.tolist())
            found = program(
                run.variables,
                to_float(jnp.asarray(batch["image"])),
                to_labels(jnp.asarray(batch["label"]), num_classes(run.config)),
                noise_of(part, source.image_shape),
                jnp.asarray(self.sigmas, jnp.float32),
            )
            parts.append(np.asarray(found, np.float64)[:, : count - start])
        return np.concatenate(parts, axis=1).mean(axis=1)

    def _check(self, run: Pretrained, path: Path) -> None:
        """Raises UserError unless a run is what the sweep says, at its end, and differs in nothing else."""
        refuse_changes(run.config, "--mode=compare")
        wanted = build_cadence(run.config).steps(run.config.train.batch_size)
        if run.step != wanted:
            raise UserError(
                f"The newest checkpoint of {path} is of step {run.step}, its training ends at {wanted}; run "
                "the sweep's command again."
            )
        ours, theirs = (flatten_dict(c.config.to_dict(), sep=".") for c in (self.first, run))
        differing = (f for f in ours if f not in self.varied and ours[f] != theirs.get(f))
        if field := next(differing, None):
            raise UserError(
                f"{path} has {field}={theirs.get(field)}, other runs have {ours[field]}, and the sweep does "
                "not vary it; compare runs that differ in what the sweep varies."
            )
