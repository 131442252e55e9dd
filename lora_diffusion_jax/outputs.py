"""Where sampled images go: a folder, an .npz, or one picture. An interrupted command can be rerun."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_diffusion_jax import files
from lora_diffusion_jax.data.decode import HEAD, SUFFIXES, format_of
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.generate import NO_LABEL

FILES = (".npz", ".png")  # any other --out is a folder
LABELS = "dataset.json"
_ABOUT_BYTES = 10_000  # its end, in which `about` stands
_MAX_TITLE = 24  # characters of a class's name beside a grid


class Output:
    """The images of some seeds, written batch by batch.

    A folder holds one PNG per image, `000007.png` for seed 7, and the labels in `dataset.json`: the
    layout of a StyleGAN or EDM data set, so it can be trained on and evaluated. A .npz holds images
    [N, H, W, C], seeds [N], labels [N] and a JSON text `about`; a .png shows all images as a grid.
    Arrays that are no pictures go to a .npz, or to a folder of .npy files. Until a .npz or .png is complete,
    its images lie in the folder `FILE.unfinished`.

    Links in the folder are not followed.

    Args:
        path: the folder or file.
        seeds: of all images, int64 [N]; in a folder each one once.
        labels: of all images, int32 [N].
        identity: what else decides the images; images left by a run of another identity are dropped.
        columns: of a grid; 0: as many as rows.
        class_names: drawn beside the rows of a grid; () if they are numbers.
        pictures: the images are uint8 with 1 or 3 channels.
        overwrite: remove images of other seeds that an earlier command wrote into the folder, and
            replace files that no earlier command wrote.

    Attributes:
        done: bool [N], which images an interrupted run has left. The others are to be written in order.

    Raises:
        UserError: another process is writing there, or the folder holds images of other origin.
    """

    def __init__(
        self,
        path: Path,
        seeds: np.ndarray,
        labels: np.ndarray,
        identity: str,
        columns: int = 0,
        class_names: Sequence[str] = (),
        *,
        pictures: bool = True,
        overwrite: bool = False,
    ):
        self._write = write_png if pictures else write_npy
        self._read: Callable[[Path], np.ndarray] = read_png if pictures else np.load
        ending = "png" if pictures else "npy"
        self.path, self.seeds, self.labels, self.class_names = path, seeds, labels, class_names
        self.columns = columns or int(np.ceil(len(seeds) ** 0.5))
        packed = path.suffix in FILES
        self.folder = path.with_name(path.name + ".unfinished") if packed else path
        # A file may hold a seed twice, with two labels: there images are numbered by position.
        self.names = [f"{n:06d}.{ending}" for n in (range(len(seeds)) if packed else seeds)]
        files.make_folder(self.folder, self.folder.parent if packed else self.folder)
        self.lock = files.Lock(
            self.folder / ".lock",
            f"Another process is writing {path}; wait for it, or choose another --out.",
        )
        self.state = self.folder / ".unfinished"
        if not packed:
            self._refuse_others(overwrite)
            if not overwrite:
                self._refuse_to_replace()
        if not (self.state.is_file() and self.state.read_text() == identity):
            for name in [LABELS, *self.names]:  # must not pass for this run's
                (self.folder / name).unlink(missing_ok=True)
            files.write_text(self.state, identity)
        # An empty file is what a crash of the machine may leave.
        there = {e.name for e in os.scandir(self.folder) if e.is_file() and e.stat().st_size}
        self.done = np.array([name in there for name in self.names])
        self._missing = iter([name for name in self.names if name not in there])

    def _refuse_others(self, overwrite: bool) -> None:
        """Raises UserError for images in the folder that an evaluation would count with this run's."""
        asked = {self.folder / name for name in self.names}
        others = sorted(path for path in _images_below(self.folder) if path not in asked)
        ours = [
            p
            for p in others
            if p.parent == self.folder and re.fullmatch(r"\d{6,10}\.(png|npy)", p.name)
        ]
        if overwrite and ours == others:
            for path in ours:
                path.unlink()
        elif others:
            advice = "choose another --out"
            advice += ", or add --overwrite to remove them" if ours == others else ""
            raise UserError(
                f"{self.folder} holds {len(others)} images that this command does not write, such as "
                f"{others[0].name}; they would count as samples of this run: {advice}."
            )

    def _refuse_to_replace(self) -> None:
        """Raises UserError for files of this run's names that no earlier command wrote."""
        if self.state.is_file() or _is_ours(self.folder / LABELS):
            return
        there = {entry.name for entry in os.scandir(self.folder)}
        if found := [name for name in (*self.names, LABELS) if name in there]:
            raise UserError(
                f"{self.folder} holds {len(found)} files that this command would replace and that no earlier "
                f"one wrote, such as {found[0]}: choose another --out, or add --overwrite to replace them."
            )

    def write(self, images: np.ndarray) -> None:
        """Writes the next of the missing images, [n, H, W, C]."""
        for image in images:
            self._write(self.folder / next(self._missing), image)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Completes the result when all images are written; `about` is recorded in it."""
        if self.path != self.folder:
            images = np.stack([self._read(self.folder / name) for name in self.names])
            if self.path.suffix == ".png":
                titles = row_titles(self.labels, self.columns, self.class_names)
                write_png(self.path, grid(images, self.columns, titles))
            else:
                with files.atomic(self.path) as temporary, temporary.open("wb") as file:
                    record = np.array(json.dumps(dict(about)))
                    np.savez_compressed(
                        file, images=images, seeds=self.seeds, labels=self.labels, about=record
                    )
        else:
            pairs = zip(self.names, self.labels.tolist(), strict=True)
            labels = [[name, label] for name, label in pairs if label != NO_LABEL]
            text = json.dumps({"labels": labels or None, "about": dict(about)})
            files.write_text(self.folder / LABELS, text)
        self.state.unlink()
        self.lock.release(remove=True)
        if self.path != self.folder:
            shutil.rmtree(self.folder)


def _images_below(folder: Path) -> Iterator[Path]:
    """What a data set of this folder would count or refuse: images by ending or content, not hidden."""
    seen = set()
    for parent, children, names in files.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link back
            children.clear()
            continue
        seen.add(real)
        children[:] = [child for child in children if not child.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES or (path.is_file() and format_of(_head(path))):
                yield path


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _is_ours(labels: Path) -> bool:
    """Whether a dataset.json is one that `Output.finish` wrote."""
    if not labels.is_file():
        return False
    with labels.open("rb") as file:  # millions of labels may stand before it
        file.seek(max(0, labels.stat().st_size - _ABOUT_BYTES))
        return bool(re.search(rb'[l\]], "about": \{.*\}\}\Z', file.read(_ABOUT_BYTES)))


def class_title(number: int, names: Sequence[str], limit: int = 80) -> str:
    """'3 cat', the name cut to `limit` characters; '3' without names."""
    return f"{number} {printable(names[number], limit)}" if names else str(number)


def row_titles(labels: np.ndarray, columns: int, names: Sequence[str]) -> list[str]:
    """The class of each row of a grid; '' for a row of several classes, or of none."""
    rows = [set(labels[i : i + columns].tolist()) for i in range(0, len(labels), columns)]
    return [
        class_title(min(row), names, _MAX_TITLE) if len(row) == 1 and NO_LABEL not in row else ""
        for row in rows
    ]


def grid(
    images: np.ndarray,
    columns: int,
    titles: Sequence[str] = (),
    *,
    min_side: int = 48,
    gap: int = 4,
) -> np.ndarray:
    """Tiles images [N, H, W, C] row by row on gray; small ones are enlarged by a whole factor.

    The titles stand to the left of their rows. Arrays are shown as by `as_pictures`.
    """
    images = as_pictures(images)
    factor = max(1, -(-min_side // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full(
        (gap + rows * (height + gap), gap + columns * (width + gap), channels), 96, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    if not any(titles):
        return canvas
    centres = gap + height // 2 + (height + gap) * np.arange(len(titles))
    return np.concatenate([_margin(titles, centres, height, canvas.shape), canvas], axis=1)


def as_pictures(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] as uint8 with 1 or 3 channels, to look at.

    Of an array the channels stand side by side in gray, [N, H, C * W, 1], each from the lowest hundredth of
    its values, over all N, to the highest.
    """
    if images.dtype == np.uint8 and images.shape[-1] in (1, 3):
        return images
    values = np.nan_to_num(images.astype(np.float32))
    low, high = np.percentile(values, (1, 99), axis=(0, 1, 2))
    gray = np.clip((values - low) / np.maximum(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
    count, height, width, channels = gray.shape
    return gray.transpose(0, 1, 3, 2).reshape(count, height, channels * width, 1)


def _margin(
    titles: Sequence[str], centres: np.ndarray, height: int, shape: tuple[int, ...]
) -> np.ndarray:
    """White text on gray as wide as it needs, at these heights, to stand beside a picture of that shape."""
    font, gap = _font(max(12, height // 5)), 4  # pixels; 12 is the least that reads well
    width = gap + int(np.ceil(max(font.getlength(title) for title in titles)))
    picture = Image.new("L", (width, shape[0]), 96)
    draw = ImageDraw.Draw(picture)
    for title, centre in zip(titles, centres.tolist(), strict=True):
        draw.text((width, centre), title, 255, font, anchor="rm")
    return np.asarray(picture)[..., None].repeat(shape[2], axis=2)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which has most alphabets, from matplotlib; without that Pillow's, which has ASCII."""
    try:
        import matplotlib  # of the extra `eval`

        return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, C] whole or not at all, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    # Not synced: that would take longer than sampling a small image.
    with files.atomic(path, sync=False) as temporary:
        picture.save(temporary, format="PNG")


def write_npy(path: Path, image: np.ndarray) -> None:
    """Writes an array [H, W, C] whole or not at all, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path, sync=False) as temporary, temporary.open("wb") as file:
        np.save(file, image)


def read_png(path: Path) -> np.ndarray:
    """The uint8 image [H, W, C] of a file that `write_png` wrote."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
