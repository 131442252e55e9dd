"""What a comparison found, as tables, arrays and a picture."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.analysis import plots
from lora_diffusion_jax.analysis.paired import CONFIDENCE, Difference, paired_difference
from lora_diffusion_jax.evaluation.results import code_version, is_score
from lora_diffusion_jax.npz import write_npz
from lora_diffusion_jax.sweeps.kinds import Kind

FILES = ("compare.json", "compare.md", "compare.npz", "compare.png")
LOSS = "heldout_loss"
SHOWN = 0.05  # a corrected p below it counts as shown


@dataclasses.dataclass(frozen=True)
class Measured:
    """A kind of runs, and what was measured of it; arrays in the order of the seeds.

    Attributes:
        kind: the runs.
        levels: held-out loss [seeds, levels].
        measures: name -> value per seed [seeds]: the mean held-out loss, and results of eval_fid.py.
        parameters: of the network, if known.
        gflop: of a training step per image, if known.
    """

    kind: Kind
    levels: np.ndarray
    measures: Mapping[str, np.ndarray]
    parameters: float | None = None
    gflop: float | None = None

    @property
    def label(self) -> str:
        """The kind's."""
        return self.kind.label


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A kind beside another in one measure.

    Attributes:
        kind: label of the one.
        against: label of the other.
        measure: what is compared.
        difference: kind - against; of the held-out loss, of its natural logarithms.
        corrected_p: by Holm's method over all kinds that are compared with `against` in this measure.
    """

    kind: str
    against: str
    measure: str
    difference: Difference
    corrected_p: float

    @property
    def change(self) -> tuple[float, float, float]:
        """Mean, low and high as they are shown: of the held-out loss in percent."""
        mean, low, high, _ = self.difference
        if self.measure != LOSS:
            return mean, low, high
        return percent(mean), percent(low), percent(high)

    @property
    def record(self) -> dict[str, Any]:
        """For JSON."""
        mean, low, high = self.change
        return {
            "kind": self.kind,
            "against": self.against,
            "measure": self.measure,
            "unit": "percent" if self.measure == LOSS else "difference",
            "mean": mean,
            "low": low,
            "high": high,
            "p": self.difference.p,
            "corrected_p": self.corrected_p,
        }


def percent(logarithm: float) -> float:
    """A difference of logarithms as a change in percent."""
    return 100 * float(np.expm1(logarithm))


def summary(kinds: Sequence[Measured], found: Sequence[Comparison]) -> dict[str, Any]:
    """Key figures: the change of the held-out loss in percent, per comparison."""
    return {
        "runs": sum(len(measured.kind.runs) for measured in kinds),
        "kinds": len(kinds),
        "seeds": len(kinds[0].kind.runs),
        "heldout_loss_change_percent": {
            f"{c.kind} - {c.against}": round(c.change[0], 3) for c in found if c.measure == LOSS
        },
    }


def write(
    out: Path,
    kinds: Sequence[Measured],
    found: Sequence[Comparison],
    sigmas: np.ndarray,
    about: Mapping[str, Any],
) -> None:
    """Writes FILES: the numbers as JSON, tables and arrays, and the picture."""
    record = {
        **about,
        "confidence": CONFIDENCE,
        "interval": "studentized bootstrap over seeds",
        "p": "sign flips; corrected by Holm's method for each measure and kind of `against`",
        "code_version": code_version(),
        "kinds": [_kind_record(measured) for measured in kinds],
        "comparisons": [comparison.record for comparison in found],
        "noise_levels": sigmas.tolist(),
    }
    names = list(kinds[0].measures)
    arrays = {
        "kinds": np.array([measured.label for measured in kinds]),
        "seeds": np.array(list(kinds[0].kind.runs)),
        "sigmas": sigmas,
        "heldout_levels": np.stack([measured.levels for measured in kinds]),
        **{name: np.stack([m.measures[name] for m in kinds]) for name in names},
    }
    with files.disk_errors(out):
        text = json.dumps(record, indent=1, allow_nan=False)
        files.write_text(out / "compare.json", text + "\n")
        files.write_text(out / "compare.md", tables(kinds, found, about))
        plots.write(picture(kinds, found, sigmas), out / "compare.png")
    write_npz(out / "compare.npz", arrays)


def _kind_record(measured: Measured) -> dict[str, Any]:
    return {
        "kind": measured.label,
        "seeds": list(measured.kind.runs),
        "parameters": measured.parameters,
        "training_gflop_per_image": measured.gflop,
        "means": {name: float(v.mean()) for name, v in measured.measures.items()},
        "deviations": {name: float(v.std(ddof=1)) for name, v in measured.measures.items()},
    }


def tables(kinds: Sequence[Measured], found: Sequence[Comparison], about: Mapping[str, Any]) -> str:
    """Markdown: all kinds by mean and sample deviation, then a table of differences for each `against`."""
    names = list(kinds[0].measures)
    lines = [
        f"EMA weights, {len(kinds[0].kind.runs)} seeds, {about['heldout_images']} held-out images of "
        f"{about['heldout_data']}; mean ± sample deviation over seeds.",
        *(f"{text[:1].upper()}{text[1:]}." for text in about["notes"]),
        "",
        _row("kind", "parameters", "training GFLOP per image", *map(_directed, names)),
        _row(*["---"] * (3 + len(names))),
    ]
    for measured in kinds:
        values = (f"{v.mean():.4g} ± {v.std(ddof=1):.2g}" for v in measured.measures.values())
        cost = (_number(measured.parameters, ",.0f"), _number(measured.gflop, ".3g"))
        lines.append(_row(measured.label, *cost, *values))
    for against in dict.fromkeys(c.against for c in found):
        family = [c for c in found if c.against == against]
        lines += [
            "",
            f"Difference from {against}, its {100 * CONFIDENCE:.0f} % interval, and corrected p (bold below "
            f"{SHOWN}):",
            "",
            _row("kind", *names),
            _row(*["---"] * (1 + len(names))),
        ]
        for label in dict.fromkeys(c.kind for c in family):
            lines.append(_row(label, *(_cell(c) for c in family if c.kind == label)))
    return "\n".join(lines) + "\n"


def _directed(name: str) -> str:
    """A measure with an arrow to where it is better."""
    return f"{name} {'↑' if is_score(name) else '↓'}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(comparison: Comparison) -> str:
    """'-2.10 % (-3.00 to -1.20), p 0.047'."""
    mean, low, high = comparison.change
    if comparison.measure == LOSS:
        text = f"{mean:+.2f} % ({low:+.2f} to {high:+.2f})"
    else:
        text = f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"
    text += f", p {comparison.corrected_p:.2g}"
    return f"**{text}**" if comparison.corrected_p < SHOWN else text


def picture(
    kinds: Sequence[Measured], found: Sequence[Comparison], sigmas: np.ndarray
) -> plots.Figure:
    """Changes of the held-out loss: of each kind, and at each noise level, against the first of --against."""
    logs = {measured.label: np.log(measured.levels) for measured in kinds}
    against = found[0].against
    shown = [c for c in found if c.against == against and c.measure == LOSS]
    levels = [
        [
            [percent(v) for v in paired_difference(logs[c.kind][:, k], logs[against][:, k])[:3]]
            for k in range(len(sigmas))
        ]
        for c in shown
    ]
    return plots.comparison(
        [c.kind for c in shown],
        np.array([c.change for c in shown]),
        np.array(levels),
        sigmas,
        f"Held-out loss, change against {against} ({len(logs[against])} seeds, {100 * CONFIDENCE:.0f} % "
        "intervals, each by itself)",
    )
