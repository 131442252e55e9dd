"""Samples of a trained network, written to a folder, an .npz or a picture."""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import files, generate, outputs, processes
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import tree_hash
from lora_diffusion_jax.factory.networks import is_pictures
from lora_diffusion_jax.factory.objectives import sampler_settings
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.factory.sampling import open_generator
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.training import checkpoint, workdir
from lora_diffusion_jax.training.writers import log

FINISH_LIMIT = 3600.0  # seconds that other processes wait while process 0 compresses an .npz
# Endings that would pass for a folder's name, and are not one.
NOT_WRITTEN = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".zip", ".npy", ".pt", ".h5")


def sample(
    run: Pretrained,
    seeds: Sequence[int],
    class_id: str | None,
    out: str | os.PathLike,
    about: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes the images of some seeds. After an interruption, the same call continues.

    Args:
        run: the network, its weights and its config, from `factory.sampling.prepare`.
        seeds: one per image.
        class_id: a class's number or name for all images, `all` for an even split in class order, or
            None to draw each image's class from its seed.
        out: a folder, .npz or .png.
        about: recorded beside the images.
        overwrite: remove images of other seeds from the folder `out`.

    Raises:
        UserError: the seeds, the class or `out` are invalid, `out` cannot be written, or an image is
            not finite.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    generator = open_generator(run)
    names = tuple(run.config.data.class_names)
    classes = choose_classes(class_id, len(seeds), generator.num_classes, names)
    checked = generate.check_seeds(seeds)
    labels = generator.choose_labels(checked, classes)
    if class_id is not None and names:
        log(f"class {', '.join(name_classes(np.unique(labels).tolist(), names))}")
    out, rows = Path(out), generator.num_classes if class_id == "all" else 0
    pictures = is_pictures(run.config)
    check_out(out, checked, rows, pictures)
    identity = json.dumps({**about, "of": tree_hash((run.sampled_variables, checked, labels))})
    columns = len(seeds) // rows if rows else 0
    output, left = _open_output(
        lambda: outputs.Output(
            *(out, checked, labels, identity, columns, names),
            pictures=pictures,
            overwrite=overwrite,
        ),
        out,
        len(seeds),
    )
    if not left.all():
        log(f"{len(seeds) - left.sum():,} of {len(seeds):,} images are there already")
    if left.any():
        # Whole batches of an undisturbed run: an image's place in its batch can change how XLA
        # rounds it, and flip a byte.
        batch_of = np.arange(len(seeds)) // generator.call_size
        sampled = np.flatnonzero(np.isin(batch_of, batch_of[left]))
        for batch in generator.batches(
            run.sampled_variables,
            checked[sampled],
            labels[sampled],
            progress=processes.is_leader(),
            between=pause_point,
            shared=generate.share_condition(labels),
        ):
            batch.check_finite()
            now, sampled = np.split(sampled, [len(batch.images)])
            if output is not None:
                with files.disk_errors(out):
                    output.write(batch.images[left[now]])

    def finish() -> None:
        with files.disk_errors(out):
            output.finish(about)  # type: ignore[union-attr]  # it is open in process 0

    processes.from_leader("finishing --out", finish, FINISH_LIMIT)
    if rows and out.suffix == ".png":
        log(f"rows of {out}, from the top: class {', '.join(name_classes(range(rows), names))}")


def _open_output(
    make: Callable[[], outputs.Output], out: Path, count: int
) -> tuple[outputs.Output | None, np.ndarray]:
    """The output, in process 0 alone, which writes; and which of `count` images it lacks, in all."""
    opened: list[outputs.Output] = []

    def open_output() -> str:
        with files.disk_errors(out):
            opened.append(make())
        return np.packbits(opened[0].done).tobytes().hex()  # short, for millions of seeds

    done = bytes.fromhex(processes.from_leader("opening --out", open_output))
    left = np.unpackbits(np.frombuffer(done, np.uint8), count=count) == 0
    return next(iter(opened), None), left


def choose_classes(
    class_id: str | None, count: int, num_classes: int, names: Sequence[str] = ()
) -> Sequence[int] | int | None:
    """--class_id as classes: None, one number, or for `all` an even split in class order.

    Args:
        class_id: a class's number or name; with 'number:' or 'name:' before it, that alone.
        count: of the images.
        num_classes: 0 for an unconditional network.
        names: of the classes; () if they are their numbers.

    Raises:
        UserError: neither a number, a name nor `all`, one class's number and another's name, or `all` for
            an unconditional network.
    """
    if class_id is None:
        return None
    if class_id == "all":
        if not num_classes:
            raise UserError("--class_id=all, but this network is unconditional; leave it out.")
        return (np.arange(count) * num_classes // count).tolist()
    spelled = unicodedata.normalize("NFC", class_id)
    kind, _, rest = spelled.partition(":")
    if spelled in names or kind not in ("number", "name"):
        kind, rest = "", spelled
    named = names.index(rest) if kind != "number" and rest in names else None
    number = int(rest) if kind != "name" and re.fullmatch(r"[0-9]{1,9}", rest) else None
    if named is not None and number is not None and named != number < num_classes:
        raise UserError(
            f"--class_id={class_id} is the number of class {name_classes([number], names)[0]} and the name "
            f"of class {named}; give --class_id=number:{class_id} or --class_id=name:{class_id}."
        )
    if named is not None or number is not None:
        return number if named is None else named
    known = (
        f", nor one of the names {', '.join(name_classes(range(len(names)), names))}"
        if names
        else ""
    )
    raise UserError(f"--class_id={class_id} is neither a class number nor `all`{known}.")


def name_classes(numbers: Sequence[int], names: Sequence[str], limit: int = 20) -> list[str]:
    """'3 cat' for each class, the first `limit` of them."""
    shown = [outputs.class_title(k, names) for k in numbers[:limit]]
    return [*shown, f"... ({len(numbers):,} in all)"] if len(numbers) > limit else shown


def check_out(out: Path, seeds: np.ndarray, rows: int, pictures: bool = True) -> None:
    """Raises UserError for an --out that cannot be written, or seeds that do not suit it.

    Args:
        out: the folder or file.
        seeds: of all images.
        rows: of a grid with one row per class; 0 for any other.
        pictures: the samples are images that a PNG can hold.
    """
    check_outside_runs(out)
    if out.suffix == ".png" and not pictures:
        raise UserError(
            f"--out={out}: this run samples arrays, of floats or of other channels than 1 or 3, which no "
            f"PNG can hold. Give {out.with_suffix('.npz')}, or a folder, which gets one .npy file per seed."
        )
    if out.suffix in outputs.FILES and out.is_dir():
        raise UserError(
            f"--out={out} is a folder, but {out.suffix} names a file; remove it or choose another --out."
        )
    if out.suffix not in outputs.FILES:
        if out.suffix.lower() in (*NOT_WRITTEN, *outputs.FILES):
            raise UserError(
                f"--out={out}: samples are written as .npz, as .png (a grid), or into a folder."
            )
        if len(np.unique(seeds)) < len(seeds):
            raise UserError("A folder holds one file per seed, but a seed is given twice.")
    if out.suffix == ".png" and rows and len(seeds) % rows:
        raise UserError(
            f"{len(seeds)} seeds do not fill {rows} rows, one per class; give a multiple of {rows}, "
            f"such as --seeds=0-{10 * rows - 1}."
        )


def check_outside_runs(out: Path) -> None:
    """Raises UserError for an --out that is a run's own folder, or lies among its checkpoints."""
    whole = Path(os.path.realpath(out))
    for folder in (whole, *whole.parents):
        in_checkpoints = folder.name == checkpoint.FOLDER and folder.parent / workdir.CONFIG
        if (folder == whole and (folder / workdir.CONFIG).exists()) or (
            in_checkpoints and in_checkpoints.exists()
        ):
            raise UserError(
                f"--out={out} is a run or lies among its checkpoints, which are its own; choose another "
                f"folder, such as {folder.parent / 'out'}."
            )


def make_folder(out: Path, names: Sequence[str], what: str, overwrite: bool) -> None:
    """Makes the folder --out of a command that writes several files.

    Args:
        out: the folder.
        names: of the files.
        what: `an analysis`, for the message.
        overwrite: the files may exist, and will be replaced.

    Raises:
        UserError: it is no folder, belongs to a run, holds some of the files, or cannot be written.
    """
    check_outside_runs(out)
    if out.suffix in {Path(name).suffix for name in names} or (out.exists() and not out.is_dir()):
        raise UserError(f"--out={out}: {what} is several files; name a folder.")
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{out} holds files that this command would replace ({', '.join(there)}): choose another --out, "
            "or add --overwrite to replace them."
        )
    with files.disk_errors(out):  # now, rather than after the work
        out.mkdir(parents=True, exist_ok=True)


def choose_images(
    source: ImageSource, num: int | None, usual: int, least: int, kind: str, otherwise: str = ""
) -> np.ndarray:
    """The numbers [N] of evenly spread images of a data set, for --num.

    Args:
        source: the data set.
        num: how many; None: `usual`, or all if they are fewer.
        usual: see `num`.
        least: the smallest number that makes sense.
        kind: `training` or `held-out`, for the message.
        otherwise: what else --num can be, likewise.

    Raises:
        UserError: there are not so many, or `num` is too small.
    """
    num = min(usual, len(source)) if num is None else num
    if not least <= num <= len(source):
        raise UserError(
            f"--num={num}; there are {len(source)} {kind} images, choose a number from {least} to "
            f"that{otherwise}."
        )
    return np.arange(num) * len(source) // num


def describe(config: ConfigDict, weights: str, step: int | None) -> dict[str, Any]:
    """What some samples were made with: weights, step and the sampler's settings, as JSON types."""
    fields = sampler_settings(config)
    sampler = {k: str(v) if v == float("inf") else v for k, v in fields.items()}  # JSON has no inf
    return {"weights": weights, "step": step, "sampler": sampler}
