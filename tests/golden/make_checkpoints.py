"""Makes the small official-format files here; needs PyTorch and the authors' code, tests do not.

    python tests/golden/make_checkpoints.py PATH_TO_DIFFUSION_LORA tests/golden

`snapshot_*.pkl` are pickled by the official persistence code (torch 2.13, numpy 2.4); where it would
embed its own source, a line stands that raises if it is ever run. `snapshot_outputs.npz`
holds what the official code computes with them.
"""

import pickle
import sys

import numpy as np

SOURCE = "raise RuntimeError('the source inside a snapshot was run')\n"


def values(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of tensor number `index`: multiples of 1/2048 within +-1/4, exact in float16."""
    count = int(np.prod(shape, dtype=np.int64))
    return ((np.arange(count) * 7 + 13 * index) % 1021 - 510).reshape(shape) / np.float32(2048)


def fill(net) -> None:
    """Gives parameters and frequencies the values above, in the order of the state_dict."""
    import torch

    with torch.no_grad():
        for index, (name, tensor) in enumerate(net.state_dict().items()):
            if name != "u" and not name.endswith("resample_filter"):
                tensor.copy_(torch.from_numpy(values(index, tuple(tensor.shape))))


def snapshots(out: str) -> None:
    """One LoRA network (DDPM++ under EDM), one NCSN++ under VE, one ADM under iDDPM."""
    from torch_utils import persistence
    from training import augment, lora, loss, networks

    persistence._module_to_src = lambda module: SOURCE
    for cls in persistence._decorators:
        cls._orig_module_src = SOURCE
    song = {"model_type": "SongUNet", "model_channels": 8, "num_blocks": 1, "attn_resolutions": [4]}
    adapted = networks.EDMPrecond(8, 1, 3, channel_mult=[1, 1], augment_dim=9, dropout=0.25, **song)
    lora.inject_trainable_lora(adapted, lora_rank=2, num_basis=3, mlp_width=[8, 4])
    ncsnpp = networks.VEPrecond(
        8, 3, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
        channel_mult=[1, 2], resample_filter=[1, 3, 3, 1], **song,
    )  # fmt: skip
    adm = networks.iDDPMPrecond(
        8, 3, 5, use_fp16=True, model_type="DhariwalUNet", model_channels=8,
        channel_mult=[1, 2], num_blocks=1, label_dropout=0.5,
    )  # fmt: skip
    outputs = {}
    for name, net in {"edm_lora": adapted, "ve_ncsnpp": ncsnpp, "iddpm_adm": adm}.items():
        fill(net)
        data = {
            "ema": net.eval().requires_grad_(False),
            "loss_fn": loss.EDMLoss(),
            "augment_pipe": augment.AugmentPipe(p=0.12, xflip=1e8),
            "dataset_kwargs": {"path": "cifar10.zip", "use_labels": True},
        }
        with open(f"{out}/snapshot_{name}.pkl", "wb") as file:
            pickle.dump(data, file)
        outputs |= {f"{name}:{key}": value for key, value in evaluate(net).items()}
    np.savez(f"{out}/snapshot_outputs.npz", **outputs)


def evaluate(net, seed: int = 0) -> dict[str, np.ndarray]:
    """What the official code computes: D(x; sigma) for two images, NCHW."""
    import torch

    rng = np.random.default_rng(seed)
    size = (2, net.img_channels, net.img_resolution, net.img_resolution)
    x = rng.standard_normal(size).astype(np.float32)
    labels = rng.random((2, net.label_dim)).astype(np.float32)
    sigma = np.array([0.3, 5.0], np.float32)
    with torch.no_grad():
        denoised = net(*map(torch.from_numpy, (x, sigma)), torch.from_numpy(labels))
    return {"x": x, "sigma": sigma, "labels": labels, "D": denoised.numpy()}


def torch_files(out: str) -> None:
    """One state_dict of awkward tensors, in the zip format and in the legacy one."""
    import torch

    shared = torch.arange(24, dtype=torch.float32)
    tensors = {
        "float32": torch.arange(6.0).reshape(2, 3) / 4,
        "float64": torch.arange(3, dtype=torch.float64) / 3,
        "float16": torch.arange(4, dtype=torch.float16) / 8,
        "bfloat16": torch.arange(4, dtype=torch.bfloat16) / 8,
        "int64": torch.arange(3) - 2**40,
        "int8": torch.arange(3, dtype=torch.int8) - 2,
        "uint8": torch.arange(250, 256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": shared.reshape(4, 6).t(),
        "window": shared.reshape(4, 6)[1:3, 2:5],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "parameter": torch.nn.Parameter(torch.full((2,), 0.5)),
    }
    torch.save(tensors, f"{out}/tensors_zip.pt")
    torch.save(tensors, f"{out}/tensors_legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    torch_files(sys.argv[2])
    snapshots(sys.argv[2])
