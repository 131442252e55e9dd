"""`--mode=compare`: the kinds of runs of a small sweep."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.factory.data import open_heldout
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.keys import ANALYSIS, purpose_key
from lora_diffusion_jax.sweeps import state
from lora_diffusion_jax.sweeps.kinds import choose_families, decided_by_seed, find_kinds
from lora_diffusion_jax.training.checkpoint import saved_steps
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
    assert one["mean"] == pytest.approx(100 * np.expm1(change.mean()), rel=1e-6)
    assert one["p"] in (0.5, 1.0)  # of two pairs
    percent = printed["heldout_loss_change_percent"]["mode=with_lora - mode=baseline"]
    assert percent == pytest.approx(one["mean"], abs=1e-3)
    assert (record["heldout_images"], record["images_seen"]) == (7, 32)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    refused = compare(sweep, tmp_path / "out", status=2)
    there = "compare.json, compare.md, compare.npz, compare.png"
    assert f"files that this command would replace ({there})" in refused
    assert "is a run" in compare(sweep, next(sweep.glob("*/config.json")).parent, status=2)


def test_a_comparison_in_the_sweeps_folder_is_on_its_page(sweep):
    compare(sweep, sweep / "compare", "--num=2")
    assert 'src="./compare/compare.png"' in (sweep / "index.html").read_text()


RESULT = {"metric": "fd_classifier_10", "weights": "ema", "dtype": "float32"}


def add(path, **fields):
    """Appends a result of a run's newest checkpoint."""
    newest = {"step": saved_steps(path.parent.parent)[-1]}
    results.append(path, RESULT | newest | fields)


@pytest.fixture
def evaluated(sweep):
    """The sweep with a result for two ranges of sampling seeds: number of the run, and one more."""
    paths = [results.results_file(sweep / name) for name in sorted(state.read(sweep))]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        for more, seeds in enumerate(("0-9", "10-19")):
            add(path, seeds=seeds, value=number + more)
    yield sweep
    for path in paths:
        path.unlink()


def test_results_are_compared_if_every_run_has_them(evaluated, tmp_path):
    first = results.results_file(evaluated / "mode=baseline,seed=3")
    add(first, metric="kd_classifier_10", seeds="0-9", value=1)
    results.append(first, {**RESULT, "step": 1, "seeds": "0-9", "value": 77})  # of another step
    add(first, weights="raw", seeds="0-9", value=77)
    add(first, repeats=2, seeds=["0-9", "10-19"], value=77)  # a summary
    text = compare(evaluated, tmp_path / "all", "--num=2")
    assert "kd_classifier_10 is left out: 3 of 4 runs lack it" in text
    found = np.load(tmp_path / "all" / "compare.npz")
    np.testing.assert_array_equal(found["fd_classifier_10"], [[0.5, 1.5], [2.5, 3.5]])
    record = json.loads((tmp_path / "all" / "compare.json").read_text())
    (one,) = [c for c in record["comparisons"] if c["measure"] == "fd_classifier_10"]
    assert (one["mean"], one["low"], one["high"], one["p"]) == (2, 2, 2, 0.5)
    assert record["results"]["fd_classifier_10"]["seeds"] == ["0-9", "10-19"]
    table = (tmp_path / "all" / "compare.md").read_text()
    assert "| mode=with_lora | " in table
    assert "fd_classifier_10 ↓" in table


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "bfloat16"}, "different settings: dtype is float32 in .*seed=3, bfloat16 in"),
        ({"reference_hash": "other"}, "different settings: reference_hash is None"),
        ({"seeds": "20-29"}, "of the sampling seeds 0-9, 10-19, 20-29, that of .* of 0-9, 10-19"),
        ({"value": float("inf")}, "fd_classifier_10 of .*seed=5 is inf"),
    ],
)
def test_results_that_were_measured_otherwise_are_refused(evaluated, tmp_path, fields, words):
    path = results.results_file(evaluated / "mode=with_lora,seed=5")
    if fields.keys() & {"dtype", "reference_hash"}:
        path.write_bytes(b"")
    add(path, **{"seeds": "0-9", "value": 3} | fields)
    text = compare(evaluated, tmp_path / "out", "--num=2", status=2)
    assert re.search(words, text), text
    assert not (tmp_path / "out" / "compare.json").exists()


def test_what_cannot_be_compared_is_a_sentence(sweep, tmp_path):
    out = tmp_path / "out"
    for against, words in (
        ("mode=x", "there is no kind 'mode=x'; the sweep has mode=baseline and mode=with_lora"),
        ("", "--mode=compare needs --against"),
        ("mode=baseline;", "there is no kind ''"),
        ("mode=baseline;mode=baseline", "--against names mode=baseline twice"),
        ("mode=baseline;mode=with_lora", "nothing is left to compare with mode=with_lora"),
    ):
        assert words in compare(sweep, out, against=against, status=2)
    assert "holds no sweep" in compare(tmp_path, out, status=2)
    for num in (0, 298):
        assert "there are 297 held-out images" in compare(sweep, out, f"--num={num}", status=2)
    text = compare(sweep, out, "--config.lora.rank=1", status=2)
    assert "the runs of a sweep have their configs" in text


LAST = "mode=with_lora,seed=5"


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (LAST, {"state": "failed"}, "1 of the 4 runs of .* mode=with_lora,seed=5 \\(failed\\)"),
        (LAST, {"seed": 6}, "mode=with_lora has the seeds 3,6, mode=baseline has 3,5"),
        (LAST, {"seed": 3}, "two runs of one kind and seed, mode=with_lora,seed=3 and mode=with"),
        (LAST, {"seed": {"a": 1}}, "has no train.seed of its own"),
        ("mode=.*seed=5", {"listed": False}, "have the train.seed 3; a comparison needs two seeds"),
        ("mode=with_lora.*", {"listed": False}, "of one kind, base; there is nothing to compare"),
    ],
)
def test_sweeps_that_cannot_be_compared(sweep, tmp_path, name, fields, words):
    entries = state.read(sweep)
    for run_name, entry in entries.items():
        if re.fullmatch(name, run_name):
            changes = {
                **entry.changes,
                "train.seed": fields.get("seed", entry.changes["train.seed"]),
            }
            kept = {k: v for k, v in fields.items() if k != "seed"}
            entries[run_name] = dataclasses.replace(entry, changes=changes, **kept)
    if words.startswith("of one kind"):
        for entry in entries.values():
            entry.changes.pop("lora.mode")
    state.write(tmp_path, entries)
    text = compare(tmp_path, tmp_path / "out", status=2)
    assert re.search(words, text), text


def test_runs_that_differ_in_more_than_the_sweep_varies_are_refused(sweep, tmp_path):
    changed = tmp_path / "sweep"
    shutil.copytree(sweep, changed)
    path = changed / LAST / "config.json"
    config = json.loads(path.read_text())
    config["augment"]["p"] = 0.125
    path.write_text(json.dumps(config))
    (changed / LAST / "config.json.sha256").unlink()
    text = compare(changed, tmp_path / "out", "--num=2", status=2)
    assert f"{changed / LAST} has augment.p=0.125, other runs have 0.0" in text


def test_runs_that_the_sweep_no_longer_asks_for_are_named(sweep, tmp_path):
    entries = state.read(sweep)
    entries["mode=only_lora,seed=3"] = dataclasses.replace(entries[LAST], listed=False)
    state.write(tmp_path, entries)
    for name in state.read(sweep):
        (tmp_path / name).symlink_to(sweep / name)
    text = compare(tmp_path, tmp_path / "out", "--num=2")
    assert "left out, as the sweep no longer asks for them: mode=only_lora,seed=3" in text


@pytest.mark.slow
def test_the_last_partial_batch_counts_once(sweep, tmp_path):
    """More images than a batch holds, and no multiple."""
    size = load_workdir(sweep / LAST).config.sampler.batch_size
    levels = {}
    for num in (size + 3, 297):
        compare(sweep, tmp_path / str(num), f"--num={num}")
        levels[num] = np.load(tmp_path / str(num) / "compare.npz")["heldout_levels"]
    assert 297 % size
    np.testing.assert_allclose(levels[size + 3], levels[297], rtol=0.3)  # of other images


def test_fields_that_the_seed_decides_distinguish_no_kinds():
    runs = [
        {"train.seed": seed, "init_from": f"run{seed}", "lora.rank": rank, "dtype": "float32"}
        for seed in (1, 2)
        for rank in (1, 2)
    ]
    assert decided_by_seed(runs) == ["init_from"]


def test_labels_are_those_of_runs_and_families_name_no_pair_twice(tmp_path):
    ways = (("a-b", "c"), ("a", "b-c"))  # one text in a label
    entries = {
        f"{k},{seed}": state.Entry({"data.class_names": names, "train.seed": seed}, ["x"], "done")
        for k, names in enumerate((*ways, ("d",)))
        for seed in (1, 2)
    }
    state.write(tmp_path, entries)
    kinds = find_kinds(tmp_path, {"data.class_names": ()}).by_label
    assert len(kinds) == 3
    first, second, third = kinds
    assert first.startswith("class_names=a-b-c")
    families = choose_families(kinds, f"{third} ; {first}")
    assert [(one.label, [k.label for k in others]) for one, others in families] == [
        (third, [first, second]),
        (first, [second]),
    ]
