"""The kinds of runs of a sweep: those that differ in their seed alone are of one kind."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.evaluation.results import seeds_text
from lora_diffusion_jax.grids import Changes
from lora_diffusion_jax.sweeps import plan, state

SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Some runs of a sweep that differ in their seed alone.

    Attributes:
        label: their changed fields, as in a run's name; `base` where nothing changes.
        changes: the same as values.
        runs: seed -> the run's directory, in ascending order of the seeds.
    """

    label: str
    changes: Changes
    runs: Mapping[int, Path]


@dataclasses.dataclass(frozen=True)
class Kinds:
    """All kinds of a sweep.

    Attributes:
        by_label: the kinds, in the sweep's order.
        by_seed: fields that the seed decides, and that therefore distinguish no kinds.
        unlisted: runs that the sweep no longer asks for.
    """

    by_label: Mapping[str, Kind]
    by_seed: Sequence[str]
    unlisted: Sequence[str]


def find_kinds(directory: Path, fields: Mapping[str, Any]) -> Kinds:
    """The kinds of runs of a finished sweep.

    Args:
        directory: of the sweep.
        fields: all fields of a config, which decide how much of a field's name a label needs.

    Raises:
        UserError: this is no sweep, a run is not done, or the kinds do not have the same two seeds or more.
    """
    entries = state.read(directory)
    listed = {name: entry for name, entry in entries.items() if entry.listed}
    if not listed:
        raise UserError(f"{directory} holds no sweep; give the --workdir of --mode=sweep.")
    if left := [name for name, entry in listed.items() if entry.state != "done"]:
        raise UserError(
            f"{len(left)} of the {len(listed)} runs of {directory} are not done, such as {left[0]} "
            f"({listed[left[0]].state}); no run is left out of a comparison. Run the sweep's command again."
        )
    changes = {name: entry.changes for name, entry in listed.items()}
    for name, changed in changes.items():
        if type(changed.get(SEED)) is not int:
            raise UserError(
                f"The run {name} of {directory} has no {SEED} of its own; a comparison is of runs with "
                f"several seeds. Sweep over {SEED}, too."
            )
    by_seed = decided_by_seed(list(changes.values()))
    kinds = _group(directory, changes, {SEED, *by_seed}, fields)
    _check_seeds(kinds, directory)
    unlisted = [name for name, entry in entries.items() if not entry.listed]
    return Kinds({kind.label: kind for kind in kinds}, by_seed, unlisted)


def decided_by_seed(runs: Sequence[Changes]) -> list[str]:
    """The fields of which each seed has one value of its own, the same in all kinds: `init_from`, say."""
    found = []
    for field in sorted(runs[0].keys() - {SEED}):
        values: dict[Any, set[str]] = {}
        for changed in runs:
            values.setdefault(changed.get(SEED), set()).add(repr(changed.get(field)))
        distinct = {min(v) for v in values.values()}
        if all(len(v) == 1 for v in values.values()) and len(distinct) == len(values) > 1:
            found.append(field)
    return found


def _group(
    directory: Path, changes: Mapping[str, Changes], apart: set[str], fields: Mapping[str, Any]
) -> list[Kind]:
    found: dict[str, tuple[Changes, dict[int, Path]]] = {}
    for name, changed in changes.items():
        shared = {k: v for k, v in changed.items() if k not in apart}
        _, runs = found.setdefault(plan.key_of(shared), (shared, {}))
        if (seed := changed[SEED]) in runs:
            raise UserError(
                f"{directory} holds two runs of one kind and seed, {runs[seed].name} and {name}; restore its "
                f"{state.FILE}."
            )
        runs[seed] = directory / name
    taken: set[str] = set()
    kinds = []
    for shared, runs in found.values():
        label = plan.new_name(shared, fields, taken)
        taken.add(label.casefold())
        kinds.append(Kind(label, shared, dict(sorted(runs.items()))))
    return kinds


def _check_seeds(kinds: Sequence[Kind], directory: Path) -> None:
    first = kinds[0]
    if len(kinds) < 2:
        raise UserError(
            f"All runs of {directory} are of one kind, {first.label}; there is nothing to compare."
        )
    for kind in kinds:
        if kind.runs.keys() != first.runs.keys():
            raise UserError(
                f"{kind.label} has the seeds {seeds_text(sorted(kind.runs))}, {first.label} has "
                f"{seeds_text(sorted(first.runs))}; a comparison needs the same seeds of each kind. Fields "
                "that vary with the seed must have the same value for a seed in all kinds."
            )
    if len(first.runs) < 2:
        raise UserError(
            f"All runs of {directory} have the {SEED} {min(first.runs)}; a comparison needs two seeds or "
            "more of each kind."
        )


def choose_families(kinds: Mapping[str, Kind], against: str) -> list[tuple[Kind, list[Kind]]]:
    """Each kind of --against with those that are compared with it: A;B has B's without A.

    Raises:
        UserError: there is no such kind, one is named twice, or nothing is left to compare with one.
    """
    labels = [label.strip() for label in against.split(";")]
    families: list[tuple[Kind, list[Kind]]] = []
    for number, label in enumerate(labels):
        if label not in kinds:
            raise UserError(
                f"--against={printable(against)}: there is no kind {printable(label)!r}; the sweep has "
                f"{' and '.join(kinds)}. Name one, or several in quotes: --against='A;B'."
            )
        if label in labels[:number]:
            raise UserError(f"--against names {label} twice; name it once.")
        others = [kind for name, kind in kinds.items() if name not in labels[: number + 1]]
        if not others:
            raise UserError(
                f"--against={against}: nothing is left to compare with {label}; leave it out."
            )
        families.append((kinds[label], others))
    return families
