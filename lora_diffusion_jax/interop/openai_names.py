"""The layers' places in improved-diffusion's state dicts, for our network `improved`.

    model/enc/16x16_block0/qkv  ->  input_blocks.5.1.qkv

Stages are numbered as they run. Each is a sequence: a residual block, attention where there is some, and
in the decoder the convolution that leads up to the next level.
"""

import re
from collections.abc import Iterable

VariablePath = tuple[str, ...]  # of a layer or variable

_RESIDUAL = {  # layers of a block inside its residual part
    "norm0": "in_layers/0",
    "conv0": "in_layers/2",
    "affine": "emb_layers/1",
    "norm1": "out_layers/0",
    "conv1": "out_layers/3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
_OUTSIDE = {
    "model/map/layer0": "time_embed/0",
    "model/map/layer1": "time_embed/2",
    "model/map/label": "label_emb",
    "model/out_norm": "out/0",
    "model/out_conv": "out/2",
}


def official_layers(paths: Iterable[VariablePath]) -> dict[VariablePath, VariablePath]:
    """The official places of a network's layers.

    Args:
        paths: of its variables, below their collection.
    """
    inside = {path[1:4] for path in paths if path[1] in ("enc", "dec")}
    stages = sorted({layer[:2] for layer in inside}, key=_order)
    attends = {layer[:2] for layer in inside if layer[2] == "qkv"}
    places = dict(_OUTSIDE)
    count, last = {"enc": 0, "dec": 0}, ("", "")  # stages so far, and the block before
    for side, stage in stages:
        _, kind, number = _parsed(stage)
        here = f"model/{side}/{stage}"
        outer = f"{'input' if side == 'enc' else 'output'}_blocks/{count[side]}"
        if kind == "conv":
            places[here] = f"{outer}/0"
        elif kind == "down":
            places[f"{here}/conv"] = f"{outer}/0/op"
        elif kind == "up":  # at the end of the last stage of the level below
            after = 2 if last in attends else 1
            places[f"{here}/conv"] = f"output_blocks/{count[side] - 1}/{after}/conv"
            continue
        else:
            middle = kind == "in"
            outer, first = ("middle_block", 2 * number) if middle else (outer, 0)
            places |= {f"{here}/{ours}": f"{outer}/{first}/{v}" for ours, v in _RESIDUAL.items()}
            places |= {f"{here}/{ours}": f"{outer}/1/{v}" for ours, v in _ATTENTION.items()}
            last = (side, stage)
            if middle:
                continue
        count[side] += 1
    return {tuple(ours.split("/")): tuple(v.split("/")) for ours, v in places.items()}


def _parsed(stage: str) -> tuple[int, str, int]:
    """'16x16_block3' -> (16, 'block', 3); 0 where there is no number."""
    match = re.fullmatch(r"(\d+)x\d+_([a-z]+)(\d*)", stage)
    assert match is not None, stage  # the names that models.unet gives
    return int(match[1]), match[2], int(match[3] or 0)


def _order(stage: VariablePath) -> tuple[int, int, int, int]:
    """Sorts stages as they run: the encoder down to the coarsest level, and the decoder up again."""
    side, name = stage
    size, kind, number = _parsed(name)
    rank = {"conv": 0, "down": 0, "in": 0, "up": 0, "block": 1}[kind]
    return (0, -size, rank, number) if side == "enc" else (1, size, rank, number)
