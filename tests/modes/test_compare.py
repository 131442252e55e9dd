"""`--mode=compare`: the kinds of runs of a small sweep."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.factory.data import open_heldout
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.keys import ANALYSIS, purpose_key
from lora_diffusion_jax.modes.compare import decided_by_seed
from lora_diffusion_jax.sweeps import state
from tests.modes.running import run, train
from tests.small import config_flags

KINDS = {"mode=baseline": "baseline", "mode=with_lora": "with_lora"}
SEEDS = (3, 5)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, data_dir):
    """A sweep of two kinds and two seeds, a few steps each."""
    folder, entries = tmp_path_factory.mktemp("sweep"), {}
    for label, mode in KINDS.items():
        for seed in SEEDS:
            name = f"{label},seed={seed}"
            train(folder / name, data_dir, 32, *config_flags(lora__mode=mode, train__seed=seed))
            changes = {"lora.mode": mode, "train.seed": seed}
            entries[name] = state.Entry(changes, ["python"], "done")
    state.write(folder, entries)
    return folder


def compare(folder, out, *more, against="mode=baseline", status=0):
    command = ("--mode=compare", f"--workdir={folder}", f"--out={out}", f"--against={against}")
    return run(*command, *more, status=status)


def test_losses_are_of_the_same_images_levels_and_noise(sweep, tmp_path):
    printed = json.loads(compare(sweep, tmp_path / "out", "--num=7").splitlines()[-1])
    found = np.load(tmp_path / "out" / "compare.npz")
    assert found["heldout_levels"].shape == (2, 2, 16)
    assert list(found["kinds"]) == list(KINDS)
    sigmas = found["sigmas"]
    # ln sigma is normal in training: mean -1.2, deviation 1.2
    np.testing.assert_allclose(np.log(sigmas).mean(), -1.2, atol=0.02)
    np.testing.assert_allclose(np.log(sigmas).std(), 1.2, rtol=0.1)

    # A second way, for one run: the weighted error of the denoised images
    loaded = load_workdir(sweep / "mode=with_lora,seed=5")
    source = open_heldout(loaded.config, labels=True)
    chosen = np.arange(7) * len(source) // 7
    batch = source.read(chosen.tolist())
    x = batch["image"] / 127.5 - 1.0
    key = purpose_key(0, ANALYSIS)
    noise = np.stack(
        [jax.random.normal(jax.random.fold_in(key, int(k)), x.shape[1:]) for k in chosen]
    )
    for level in (2, 11):
        sigma = sigmas[level]
        denoised = loaded.denoiser.apply(
            loaded.variables,
            (x + sigma * noise).astype(np.float32),
            np.full(7, sigma, np.float32),
            np.eye(10, dtype=np.float32)[batch["label"]],
        )
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        expected = weight * np.mean(np.square(denoised - x))
        np.testing.assert_allclose(found["heldout_levels"][1, 1, level], expected, rtol=1e-4)

    means = found["heldout_levels"].mean(axis=2)
    change = np.log(means[1]) - np.log(means[0])
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    (one,) = record["comparisons"]
    np.testing.assert_allclose(one["mean"], change.mean(), rtol=1e-6)
    assert one["p"] in (0.5, 1.0)  # of two pairs
    percent = printed["heldout_loss_change_percent"]["mode=with_lora - mode=baseline"]
    assert percent == pytest.approx(100 * np.expm1(change.mean()), abs=1e-3)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert "holds compare.json already" in compare(sweep, tmp_path / "out", status=2)


def test_a_comparison_in_the_sweeps_folder_is_on_its_page(sweep):
    compare(sweep, sweep / "compare", "--num=2")
    assert 'src="./compare/compare.png"' in (sweep / "index.html").read_text()


@pytest.fixture
def evaluated(sweep):
    """The sweep with a result for two ranges of sampling seeds: number of the run, and one more."""
    paths = [results.results_file(sweep / name) for name in sorted(state.read(sweep))]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        for more, seeds in enumerate(("0-9", "10-19")):
            results.append(path, {**RESULT, "seeds": seeds, "value": number + more})
    yield sweep
    for path in paths:
        path.unlink()


RESULT = {"metric": "fd_classifier_10", "step": 2, "weights": "ema"}


def test_results_are_compared_if_every_run_has_them(evaluated, tmp_path):
    sweep = evaluated
    compare(sweep, tmp_path / "all", "--num=2")
    found = np.load(tmp_path / "all" / "compare.npz")
    np.testing.assert_array_equal(found["fd_classifier_10"], [[0.5, 1.5], [2.5, 3.5]])
    (one,) = [
        c
        for c in json.loads((tmp_path / "all" / "compare.json").read_text())["comparisons"]
        if c["measure"] == "fd_classifier_10"
    ]
    assert (one["mean"], one["low"], one["high"], one["p"]) == (2, 2, 2, 0.5)
    assert "| mode=with_lora | " in (tmp_path / "all" / "compare.md").read_text()

    path = results.results_file(sweep / "mode=baseline,seed=3")
    results.append(path, {**RESULT, "metric": "kd_classifier_10", "seeds": "0-9", "value": 1})
    text = compare(sweep, tmp_path / "some", "--num=2", status=2)
    assert "has no result kd_classifier_10 for the sampling seeds 0-9" in text


def test_what_cannot_be_compared_is_a_sentence(sweep, tmp_path):
    out = tmp_path / "out"
    assert "there is no other kind 'mode=x'" in compare(sweep, out, against="mode=x", status=2)
    twice = compare(sweep, out, against="mode=baseline;mode=baseline", status=2)
    assert "no other kind 'mode=baseline'" in twice
    assert "holds no sweep" in compare(tmp_path, out, status=2)
    assert "there are 297 held-out images" in compare(sweep, out, "--num=298", status=2)
    text = compare(sweep, out, "--config.lora.rank=1", status=2)
    assert "the runs of a sweep have their configs" in text

    def changed(**fields):
        entries = state.read(sweep)
        name = "mode=with_lora,seed=5"
        entries[name] = dataclasses.replace(entries[name], **fields)
        (tmp_path / "changed").mkdir(exist_ok=True)
        state.write(tmp_path / "changed", entries)
        return compare(tmp_path / "changed", out, status=2)

    assert "1 of the 4 runs" in (text := changed(state="failed"))
    assert "mode=with_lora,seed=5 (failed)" in text
    text = changed(changes={"lora.mode": "with_lora", "train.seed": 6})
    assert "mode=with_lora has the seeds 3,6, mode=baseline has 3,5" in text
    assert "has no train.seed of its own" in changed(changes={"lora.mode": "with_lora"})


def test_fields_that_the_seed_decides_tell_no_kinds_apart():
    runs = [
        {"train.seed": seed, "init_from": f"run{seed}", "lora.rank": rank, "dtype": "float32"}
        for seed in (1, 2)
        for rank in (1, 2)
    ]
    assert decided_by_seed(runs) == ["init_from"]
