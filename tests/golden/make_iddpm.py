"""Makes iddpm.npz: what OpenAI's improved-diffusion computes with a formula in the network's place.

    python make_iddpm.py --reference=DIR --out=DIR

The first DIR holds a checkout of openai/improved-diffusion at the commit below; PyTorch and NumPy must be
installed. Its code runs unmodified, on the CPU; only the noise that it draws is given to it.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

COMMIT = "1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5"
A, B = 0.9, 3.0  # of the formula
TIMESTEPS = (0, 1, 2, 500, 3000, 3999)
ROWS = {
    "cosine": (4000, (0, 1, 2, 500, 1999, 3998, 3999)),
    "linear": (1000, (0, 1, 2, 500, 998, 999)),
}
SPACINGS = (
    (4000, "250"),
    (4000, "ddim50"),
    (300, "10,15,20"),
    (4000, "10,1,5"),
    (1000, "7"),
    (50, "1"),
)
TABLES = ("betas", "alphas_cumprod", "posterior_log_variance_clipped")
TABLES += ("posterior_mean_coef1", "posterior_mean_coef2")


def formula(x, t, a, b, learn_sigma):
    """Noise and variances that depend on the image, the time and two parameters."""
    time = t.float().reshape(-1, 1, 1, 1)
    noise = a * x + 0.1 * torch.cos(time / 100)
    return torch.cat([noise, torch.sin(b * x + time / 300)], 1) if learn_sigma else noise


def nhwc(tensor):
    return np.ascontiguousarray(np.moveaxis(tensor.detach().numpy(), 1, -1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    sys.path.insert(0, args.reference)
    from improved_diffusion import respace, script_util

    def diffusion(steps=4000, schedule="cosine", learn_sigma=True, use_kl=False, respacing=""):
        return script_util.create_gaussian_diffusion(
            steps=steps,
            learn_sigma=learn_sigma,
            noise_schedule=schedule,
            use_kl=use_kl,
            rescale_timesteps=True,
            rescale_learned_sigmas=True,
            timestep_respacing=respacing,
        )

    rng = np.random.default_rng(0)

    def normal(*shape):  # float16 holds the values
        return rng.normal(size=shape).astype(np.float16).astype(np.float32)

    def noise_of(array):  # what randn_like returns, one after the other
        return mock.patch("torch.randn_like", side_effect=map(torch.from_numpy, array))

    out = {"meta": json.dumps({"commit": COMMIT, "a": A, "b": B, "torch": torch.__version__})}
    for schedule, (steps, rows) in ROWS.items():
        process = diffusion(steps, schedule)
        for name in TABLES:
            out[f"{schedule}{steps}/{name}"] = getattr(process, name)[list(rows)]
    for steps, text in SPACINGS:
        out[f"space/{steps}_{text}"] = np.array(sorted(respace.space_timesteps(steps, text)))

    t = torch.tensor(TIMESTEPS)
    images = rng.integers(0, 256, (len(TIMESTEPS), 3, 4, 4), np.uint8)
    images[:, 0, 0, :2] = (0, 255)  # whose gray levels reach to infinity
    noise = normal(*images.shape)
    out |= {"images": np.moveaxis(images, 1, -1), "noise": np.moveaxis(noise, 1, -1)}
    start = torch.from_numpy(images).float() / 127.5 - 1
    for name, settings in {
        "hybrid": {},
        "vlb": {"use_kl": True},
        "fixed_simple": {"learn_sigma": False},
        "fixed_vlb": {"learn_sigma": False, "use_kl": True},
        "spaced_hybrid": {"respacing": "250"},
    }.items():
        process, learn = diffusion(**settings), settings.get("learn_sigma", True)
        a, b = (torch.tensor(value, requires_grad=True) for value in (A, B))

        def model(x, t, a=a, b=b, learn=learn):
            return formula(x, t, a, b, learn)

        which = t * process.num_timesteps // 4000
        terms = process.training_losses(model, start, which, noise=torch.from_numpy(noise))
        out |= {f"loss/{name}/{k}": v.detach().numpy() for k, v in terms.items()}
        terms["loss"][:-1].mean().backward()  # the last timestep would outweigh the others
        out[f"loss/{name}/gradients"] = np.float64(
            [0 if v.grad is None else v.grad for v in (a, b)]
        )
        for clip in (True, False):
            noisy = process.q_sample(start, which, noise=torch.from_numpy(noise))
            found = process.p_mean_variance(model, noisy, which, clip_denoised=clip)
            for k in ("mean", "log_variance", "pred_xstart"):
                out[f"p/{name}/clip{int(clip)}/{k}"] = nhwc(found[k])

    latents = normal(2, 3, 4, 4)
    steps_noise = normal(10, 2, 3, 4, 4)
    out |= {"latents": np.moveaxis(latents, 1, -1), "steps_noise": np.moveaxis(steps_noise, 2, -1)}

    def run(name, respacing, learn_sigma=True, **settings):
        process = diffusion(learn_sigma=learn_sigma, respacing=respacing)
        loop = process.ddim_sample_loop if name.startswith("ddim") else process.p_sample_loop
        with noise_of(steps_noise), torch.no_grad():
            sample = loop(
                lambda x, t: formula(x, t, A, B, learn_sigma),
                latents.shape,
                noise=torch.from_numpy(latents),
                device="cpu",
                **settings,
            )
        out[f"sample/{name}"] = nhwc(sample)

    run("ddpm", "10")
    run("ddpm_free", "10", clip_denoised=False)
    run("ddpm_fixed", "3,7", learn_sigma=False)
    run("ddim", "ddim10")
    run("ddim_half", "10", eta=0.5)
    run("ddim_one", "ddim10", eta=1.0)

    bound_noise = normal(20, 2, 3, 4, 4)
    out["bound_noise"] = np.moveaxis(bound_noise, 2, -1)
    for name, settings in {"bound": {}, "bound_fixed": {"learn_sigma": False}}.items():
        process, learn = diffusion(20, **settings), settings.get("learn_sigma", True)
        with noise_of(bound_noise):
            found = process.calc_bpd_loop(
                lambda x, t, learn=learn: formula(x, t, A, B, learn), start[:2]
            )
        out |= {f"{name}/{k}": found[k].numpy() for k in ("vb", "prior_bpd", "total_bpd")}
    for key, value in out.items():
        if key in ("noise", "latents", "steps_noise", "bound_noise"):
            out[key] = value.astype(np.float16)
    np.savez_compressed(Path(args.out) / "iddpm.npz", **out)


if __name__ == "__main__":
    main()
