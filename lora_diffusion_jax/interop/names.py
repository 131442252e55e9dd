"""The name table: every tensor of an official network, and its place in our variables."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_diffusion_jax.interop.architecture import Architecture

Shape = tuple[int, ...]
StateDict = Mapping[str, np.ndarray]  # arrays by official names


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of an official state_dict and its place here.

    Attributes:
        name: the official name.
        shape: the official shape.
        path: where it lies in the collection, 'model/enc/32x32_conv/kernel'; empty for constants.
        layout: how the axes change.
        collection: params or buffers; None for constants, which are made anew on the way back.
        constant: the constant's value.
    """

    name: str
    shape: Shape
    path: str
    layout: str = "same"
    collection: str | None = "params"
    constant: np.ndarray | None = None


def name_table(architecture: Architecture) -> list[Entry]:
    """Every tensor of the official network of that architecture, in PyTorch's order.

    The networks are SongUNet and DhariwalUNet of Karras et al. 2022 (table 7) under their
    preconditioners, with the LoRA layers of Choi et al. 2024 in place of qkv and proj.
    """
    table = _Table(architecture)
    if architecture["precond"] == "iddpm":
        steps = architecture["precond_args"].get("num_steps", 1000)
        table.entries.append(Entry("u", (steps + 1,), "u", collection="buffers"))
    table.mapping()
    table.encoder()
    table.decoder()
    return table.entries


def count_parameters(architecture: Architecture) -> int:
    """Number of trained values, buffers and constants left out."""
    return sum(int(np.prod(e.shape)) for e in name_table(architecture) if e.collection == "params")


def iddpm_levels(c_1: float = 0.001, c_2: float = 0.008, num_steps: int = 1000) -> np.ndarray:
    """The reference's buffer u [num_steps + 1], in float32 step by step as it computes it.

    u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1), u_M = 0 (Karras et al. 2022,
    appendix C.3.4).
    """
    f32 = np.float32
    j = np.arange(num_steps + 1, dtype=f32)
    abar = np.sin(f32(0.5 * np.pi) * j / f32(num_steps) / f32(c_2 + 1)) ** 2
    levels = np.zeros(num_steps + 1, f32)
    for i in range(num_steps, 0, -1):
        ratio = max(abar[i - 1] / abar[i], f32(c_1))
        levels[i - 1] = np.sqrt((levels[i] ** 2 + f32(1)) / ratio - f32(1))
    return levels


class _Table:
    """Writes down the tensors of an architecture, block after block."""

    def __init__(self, architecture: Architecture):
        a = architecture
        self.entries: list[Entry] = []
        self._a = a
        self._adm = a["model"] == "adm"
        self._emb = a["model_channels"] * a["channel_mult_emb"]
        self._noise = a["model_channels"] * (1 if self._adm else a["channel_mult_noise"])
        self._out = a["img_channels"] * (2 if a["precond"] == "iddpm" else 1)
        self._skips: list[int] = []
        self._width = 0

    def mapping(self) -> None:
        """The embedding network, `map_*` officially and the submodule `map` here."""
        label, augment = self._a["label_dim"], self._a["augment_dim"]
        if self._a["embedding_type"] == "fourier":
            self._add(
                "model.map_noise.freqs", (self._noise // 2,), "model/map/noise/freqs",
                collection="buffers",
            )  # fmt: skip
        if label and not self._adm:
            self._linear("model.map_label", label, self._noise)
        if augment:
            self._linear("model.map_augment", augment, self._noise, bias=False)
        self._linear("model.map_layer0", self._noise, self._emb)
        self._linear("model.map_layer1", self._emb, self._emb)
        if label and self._adm:
            self._linear("model.map_label", label, self._emb, bias=False)

    def encoder(self) -> None:
        """Finest level first; every stage's width is kept for the skips."""
        residual = self._a["img_channels"]
        for height, width in self._levels():
            name = f"model.enc.{height}x{height}"
            if not self._width:
                self._width = width if self._adm else self._a["model_channels"]
                self._conv(f"{name}_conv", self._a["img_channels"], self._width, 3)
            else:
                self._block(f"{name}_down", self._width, resample=True)
            self._skips.append(self._width)
            if self._a["encoder_type"] == "residual" and len(self._skips) > 1:
                self._conv(f"{name}_aux_residual", residual, self._width, 3, resample=True)
                residual = self._width
            for i in range(self._a["num_blocks"]):
                attention = height in self._a["attn_resolutions"]
                self._block(f"{name}_block{i}", width, attention=attention)
                self._skips.append(width)

    def decoder(self) -> None:
        """Coarsest level first, each block after the first two fed with one skip."""
        levels = self._levels()
        for height, width in reversed(levels):
            name = f"model.dec.{height}x{height}"
            if height == levels[-1][0]:
                self._block(f"{name}_in0", self._width, attention=True)
                self._block(f"{name}_in1", self._width)
            else:
                self._block(f"{name}_up", self._width, resample=True)
            last = self._a["num_blocks"]
            for i in range(last + 1):
                attention = height in self._a["attn_resolutions"] and (self._adm or i == last)
                inputs = self._width + self._skips.pop()
                self._block(f"{name}_block{i}", width, inputs=inputs, attention=attention)
        norm, conv = ("model.out_norm", "model.out_conv")
        if not self._adm:
            norm, conv = (f"{name}_aux_norm", f"{name}_aux_conv")
        self._norm(norm, self._width)
        self._conv(conv, self._width, self._out, 3)

    def _levels(self) -> list[tuple[int, int]]:
        a = self._a
        return [
            (a["img_resolution"] >> level, a["model_channels"] * mult)
            for level, mult in enumerate(a["channel_mult"])
        ]

    def _block(
        self, name: str, width: int, *, inputs: int = 0, resample: bool = False,
        attention: bool = False,
    ) -> None:  # fmt: skip
        inputs = inputs or self._width
        self._norm(f"{name}.norm0", inputs)
        self._conv(f"{name}.conv0", inputs, width, 3, resample=resample)
        if self._a["use_affine"]:
            self._linear(f"{name}.affine", self._emb, width * (2 if self._adm else 1))
        self._norm(f"{name}.norm1", width)
        self._conv(f"{name}.conv1", width, width, 3)
        if inputs != width or resample:
            weightless = self._adm and inputs == width
            self._conv(f"{name}.skip", inputs, width, 0 if weightless else 1, resample=resample)
        if attention and (not self._adm or width >= 64):  # ADM: 64 channels per head, or no head
            self._norm(f"{name}.norm2", width)
            self._site(f"{name}.qkv", width, 3 * width)
            self._site(f"{name}.proj", width, width)
        self._width = width

    def _site(self, name: str, inputs: int, outputs: int) -> None:
        """A 1x1 convolution of attention, with its adapter where there is LoRA.

        Officially `X.bias` is then the adapter's, and the convolution's own is `X.conv.bias`.
        """
        lora = self._a["lora"]
        if not lora:
            self._conv(name, inputs, outputs, 1)
            return
        path, inner = f"{_path(name)}/lora", lora["rank"] * lora["bases"]
        self._add(f"{name}.bias", (inner, outputs), f"{path}/bias")
        self._conv(f"{name}.conv", inputs, outputs, 1, path=_path(name))
        self._conv(f"{name}.lora_down", inputs, inner, 1, path=f"{path}/down", bias=False)
        self._conv(f"{name}.lora_up", inner, outputs, 1, path=f"{path}/up", bias=False)
        before = self._emb
        for i, width in enumerate(lora["widths"]):
            head = f"{name}.comp_weights.{i}"
            self._linear(f"{head}.0", before, width, path=f"{path}/composition/dense_{i}")
            self._norm(f"{head}.1", width, path=f"{path}/composition/norm_{i}")
            before = width
        head = f"{name}.comp_weights.{len(lora['widths'])}"
        self._linear(head, before, lora["bases"], path=f"{path}/composition/dense_out")

    def _linear(
        self, name: str, inputs: int, outputs: int, *, bias: bool = True, path: str = ""
    ) -> None:
        path = path or _path(name)
        self._add(f"{name}.weight", (outputs, inputs), f"{path}/kernel", "linear")
        if bias:
            self._add(f"{name}.bias", (outputs,), f"{path}/bias")

    def _conv(
        self, name: str, inputs: int, outputs: int, kernel: int, *, resample: bool = False,
        bias: bool = True, path: str = "",
    ) -> None:  # fmt: skip
        path = path or _path(name)
        if kernel:
            layout = "conv1x1" if kernel == 1 else "conv"
            shape = (outputs, inputs, kernel, kernel)
            self._add(f"{name}.weight", shape, f"{path}/kernel", layout)
            if bias:
                self._add(f"{name}.bias", (outputs,), f"{path}/bias")
        if resample:
            taps = np.asarray(self._a["resample_filter"], np.float32)
            window = np.outer(taps, taps)[None, None] / np.square(taps.sum())
            self.entries.append(
                Entry(f"{name}.resample_filter", window.shape, "", "same", None, window)
            )

    def _norm(self, name: str, width: int, *, path: str = "") -> None:
        path = path or _path(name)
        self._add(f"{name}.weight", (width,), f"{path}/scale")
        self._add(f"{name}.bias", (width,), f"{path}/bias")

    def _add(
        self, name: str, shape: Shape, path: str, layout: str = "same", collection: str = "params"
    ) -> None:
        self.entries.append(Entry(name, shape, path, layout, collection))


def _path(name: str) -> str:
    """model.enc.X.norm0 -> model/enc/X/norm0, and model.map_layer0 -> model/map/layer0."""
    return name.replace("model.map_", "model.map.").replace(".", "/")
