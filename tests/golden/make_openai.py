"""Makes openai_unet.npz; needs PyTorch and a checkout of openai/improved-diffusion, tests do not.

    python tests/golden/make_openai.py PATH_TO_IMPROVED_DIFFUSION tests/golden

The weights are `make_checkpoints.values` by their number in the state_dict, so that the file holds no more
than names, shapes, inputs and outputs.
"""

import json
import sys

import numpy as np
import torch
from make_checkpoints import values

sys.path.insert(0, sys.argv[1])
from improved_diffusion.unet import UNetModel  # noqa: E402

COMMON = {"model_channels": 32, "num_res_blocks": 1, "dropout": 0.0}
CASES = {
    "scale_shift": {
        "in_channels": 3,
        "out_channels": 6,
        "channel_mult": [1, 2],
        "attention_resolutions": [2],
        "num_classes": 3,
        "num_heads": 4,
        "num_heads_upsample": 2,
        "use_scale_shift_norm": True,
    },
    "shift": {
        "in_channels": 1,
        "out_channels": 1,
        "channel_mult": [1],
        "attention_resolutions": [1],
        "num_classes": None,
        "num_heads": 1,
        "num_heads_upsample": -1,
        "use_scale_shift_norm": False,
    },
}


def main(out: str) -> None:
    """Runs each network on two images of 8x4 pixels."""
    arrays = {}
    for name, settings in CASES.items():
        settings = COMMON | settings
        net = UNetModel(**settings).eval()
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, settings["in_channels"], 8, 4)).astype(np.float32)
        t = np.float32([0.25, 999.75])
        classes = settings["num_classes"] and torch.tensor([2, 0])
        with torch.no_grad():
            for index, tensor in enumerate(net.state_dict().values()):
                tensor.copy_(torch.from_numpy(values(index, tuple(tensor.shape))))
            output = net(torch.from_numpy(x), torch.from_numpy(t), classes).numpy()
        shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
        arrays[f"{name}:meta"] = json.dumps({"settings": settings, "shapes": shapes})
        arrays |= {f"{name}:x": x, f"{name}:t": t, f"{name}:out": output}
    np.savez_compressed(f"{out}/openai_unet.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[2])
