"""Makes net_*.npz: tiny networks of the authors' PyTorch code, their weights and what they compute.

    python make_nets.py --reference=DIR --out=DIR

DIR holds a checkout of lthilnklover/diffusion_lora at the commit below; PyTorch and NumPy must be
installed. Nothing of the networks is written here: their code runs unmodified, on the CPU.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

COMMIT = "5f38606c4174f3f5a4c82e917f304df6e12bd215"
DDPMPP = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
ADM = {"model_type": "DhariwalUNet"}
LORA = {"lora_rank": 2, "num_basis": 3, "mlp_width": [16, 8]}
SMALL = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
SMALL = {**SMALL, "num_blocks": 1, "dropout": 0.1}

CASES = {
    "edm_ddpmpp_cond_lora": {
        "precond": "EDMPrecond",
        "kwargs": {**DDPMPP, **SMALL, "attn_resolutions": [4], "label_dim": 4, "augment_dim": 9},
        "lora": LORA,
    },
    "ve_ncsnpp_cond_lora": {
        "precond": "VEPrecond",
        "kwargs": {**NCSNPP, **SMALL, "attn_resolutions": [8], "label_dim": 4, "augment_dim": 9},
        "lora": LORA,
    },
    "vp_ddpmpp_uncond": {  # three levels, images that are not square
        "precond": "VPPrecond",
        "kwargs": {
            **DDPMPP,
            **SMALL,
            "img_resolution": 16,
            "channel_mult": [1, 2, 1],
            "attn_resolutions": [8],
        },
        "width": 8,
    },
    "iddpm_ddpmpp_cond": {
        "precond": "iDDPMPrecond",
        "kwargs": {**DDPMPP, **SMALL, "attn_resolutions": [8, 4], "label_dim": 4, "augment_dim": 9},
    },
    "edm_adm_cond_lora": {  # 64 channels and one head at 8x8, 8 channels and no attention at 4x4
        "precond": "EDMPrecond",
        "kwargs": {
            **ADM,
            **SMALL,
            "channel_mult": [8, 1],
            "attn_resolutions": [8, 4],
            "label_dim": 4,
            "augment_dim": 9,
        },
        "lora": LORA,
    },
    "edm_adm_two_heads": {  # not committed: too large
        "precond": "EDMPrecond",
        "kwargs": {
            **ADM,
            **SMALL,
            "model_channels": 64,
            "channel_mult": [1, 2],
            "attn_resolutions": [8, 4],
            "label_dim": 4,
            "augment_dim": 9,
        },
    },
}


def make_net(case: dict, seed: int) -> torch.nn.Module:
    from training import lora, networks

    torch.manual_seed(seed)
    net = getattr(networks, case["precond"])(**case["kwargs"])
    if "lora" in case:
        lora.inject_trainable_lora(net, **case["lora"])
    net.eval().requires_grad_(False)
    redraw(net, seed)
    return net


def redraw(net: torch.nn.Module, seed: int) -> None:
    """Makes every parameter matter; then few values that float16 can hold, so that files are small."""
    generator = torch.Generator().manual_seed(1000 + seed)
    norms = {name for name, m in net.named_modules() if type(m).__name__ == "GroupNorm"}
    for name, p in net.named_parameters():
        parent, leaf = name.rsplit(".", 1)
        noise = torch.randn(p.shape, generator=generator)
        if parent in norms and leaf == "weight":
            p.copy_(1 + 0.1 * noise)
        elif leaf == "bias" or p.abs().max() < 1e-3:
            p.copy_(0.05 * noise)
        if p.ndim > 1:
            step = 2.0 ** torch.ceil(torch.log2(p.std() / 1.4))
            p.copy_(torch.clamp(torch.round(p / step), -4, 4) * step)
        p.copy_(p.half().float())


def make_inputs(case: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2000 + seed)
    kwargs = case["kwargs"]
    size = (3, kwargs["img_channels"], kwargs["img_resolution"])
    size = (*size, case.get("width", kwargs["img_resolution"]))
    sigma = np.float32([0.05, 0.9, 8.0])
    x = 0.5 * rng.standard_normal(size) + sigma[:, None, None, None] * rng.standard_normal(size)
    inputs = {"x": x.astype(np.float16), "sigma": sigma}
    if "label_dim" in kwargs:
        inputs["class_labels"] = np.float32([[0, 0, 1, 0], [0.25, 0.5, 0, 0.25], [0, 0, 0, 0]])
        augment = rng.standard_normal((3, kwargs["augment_dim"]))
        inputs["augment_labels"] = augment.astype(np.float16)
    return inputs


def run(
    net: torch.nn.Module, inputs: dict[str, np.ndarray], has_lora: bool
) -> dict[str, np.ndarray]:
    from training.lora import LoraInjectedConv, set_bypass_for_lora

    t = {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in inputs.items()}
    x, sigma = t["x"], t["sigma"]
    labels, augment = t.get("class_labels"), t.get("augment_labels")
    out, seen = {}, {}
    hooks = [net.model.register_forward_hook(lambda m, args, y: seen.update({"F": y}))]
    block = next(m for m in net.modules() if type(m).__name__ == "UNetBlock")
    hooks.append(block.register_forward_pre_hook(lambda m, args: seen.update({"emb": args[1]})))
    for name, module in net.named_modules():
        if isinstance(module, LoraInjectedConv):
            hook = lambda m, args, y, name=name: seen.update({f"omega:{name}": y})  # noqa: E731
            hooks.append(module.comp_weights[-1].register_forward_hook(hook))
    out["D"] = net(x, sigma, labels)
    mid = {k: v.clone() for k, v in seen.items()}
    for hook in hooks:
        hook.remove()
    out["D_scalar_sigma"] = net(x, torch.tensor(0.7), labels)
    if labels is not None:
        out["D_aug"] = net(x, sigma, labels, augment_labels=augment)
        out["D_nolabel"] = net(x, sigma, None)
    if has_lora:
        set_bypass_for_lora(net, True, verbose=False)
        out["D_bypass"] = net(x, sigma, labels)
        set_bypass_for_lora(net, False, verbose=False)
    arrays = {f"out:{k}": v.numpy() for k, v in out.items()}
    return {**arrays, **{f"mid:D:{k}": v.numpy() for k, v in mid.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(args.reference))
    torch.set_num_threads(1)
    for seed, (name, case) in enumerate(CASES.items()):
        net = make_net(case, seed)
        inputs = make_inputs(case, seed)
        parameters = dict(net.named_parameters())
        weights = {
            f"p:{k}": v.numpy().astype(np.float16) if k in parameters else v.numpy()
            for k, v in net.state_dict().items()
        }
        meta = {
            "official": f"lthilnklover/diffusion_lora@{COMMIT}",
            "precond_class": case["precond"],
            "init_kwargs": {"label_dim": 0, "augment_dim": 0, **case["kwargs"]},
            "lora": case.get("lora"),
            "seed": seed,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        arrays = {**weights, **{f"in:{k}": v for k, v in inputs.items()}}
        arrays |= run(net, inputs, "lora" in case)
        path = args.out / f"net_{name}.npz"
        np.savez_compressed(path, meta=json.dumps(meta), **arrays)
        count = sum(p.numel() for p in net.parameters())
        largest = float(np.abs(arrays["out:D"]).max())
        print(
            f"{path.name}: {count} parameters, {path.stat().st_size} bytes, max |D| {largest:.3g}"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
