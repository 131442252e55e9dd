"""`--mode=analyze` on small runs: files, numbers, refusals."""

import dataclasses
import html
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.analysis import routes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.pretrained import Pretrained, load_workdir
from lora_diffusion_jax.modes import analyze
from tests.modes.running import run
from tests.small import random_variables, small_config

PICTURES = ("omega", "omega_classes", "similarity", "pca", "norms", "ablation")


def arrays_of(folder):
    with np.load(folder / "analysis.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def analyzed(workdir, tmp_path_factory):
    """The folder of an analysis, and its line of JSON."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    text = run("--mode=analyze", f"--workdir={workdir}", f"--out={out}", "--num=3")
    return out, json.loads(text.splitlines()[-1])


def test_pictures_and_arrays_are_there(analyzed):
    out, record = analyzed
    assert sorted(record["files"]) == sorted([*(f"{p}.png" for p in PICTURES), "analysis.npz"])
    assert {path.name for path in out.iterdir()} == set(record["files"])
    for name in PICTURES:
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors(1 << 20)) > 20
    shapes = {name: array.shape for name, array in arrays_of(out).items()}
    sites, levels, losses = record["sites"], analyze.LEVELS, analyze.LOSS_LEVELS
    assert shapes == {
        "sha256": (),
        "sites": (sites,),
        "sigmas": (levels,),
        "classes": (10,),
        "omega": (sites, levels, 10, 3),
        "similarity": (sites, levels, levels),
        "similarity_classes": (sites, 10, 10),
        "pca": (sites, levels, 2),
        "pca_share": (sites, 2),
        "update_norm": (sites, levels, 10),
        "base_norm": (sites,),
        "loss_sigmas": (losses,),
        "loss": (losses, 3),
        "loss_without_site": (sites, losses, 3),
        "loss_without_all": (losses, 3),
    }


def test_key_figures_follow_from_the_arrays(analyzed):
    out, record = analyzed
    arrays = arrays_of(out)
    omega = arrays["omega"].mean(axis=2).astype(np.float64)
    unit = omega / np.linalg.norm(omega, axis=-1, keepdims=True)
    neighbours = (unit[:, 1:] * unit[:, :-1]).sum(axis=-1).mean()
    assert record["similarity_neighbours"] == pytest.approx(neighbours)
    assert record["similarity_farthest"] == pytest.approx((unit[:, 0] * unit[:, -1]).sum(1).mean())
    ratio = (arrays["update_norm"] / arrays["base_norm"][:, None, None]).max(axis=(1, 2))
    assert record["largest_norm_ratio"] == pytest.approx(ratio.max())
    assert record["largest_norm_ratio_site"] == arrays["sites"][ratio.argmax()]
    loss, off = arrays["loss"].mean(axis=1), arrays["loss_without_site"].mean(axis=2)
    assert record["largest_loss_increase"] == pytest.approx((off / loss - 1).max(), abs=1e-6)
    assert np.isfinite(loss).all()
    assert not np.array_equal(arrays["loss"], arrays["loss_without_all"])


def test_pictures_in_the_runs_folder_are_on_its_page(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    before = (tmp_path / "run" / "index.html").read_text()
    run("--mode=analyze", f"--workdir={tmp_path}/run", f"--out={tmp_path}/run/analysis", "--num=0")
    page = (tmp_path / "run" / "index.html").read_text()
    for name in ("omega", "norms"):
        assert f'src="./analysis/{name}.png"' in page
        assert f"{name}.png" not in before
    command = (tmp_path / "run" / "command.txt").read_text().strip()
    assert html.escape(command, quote=False) in html.unescape(page)


@pytest.fixture(scope="module")
def loaded(workdir):
    return load_workdir(workdir)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"out": "x.png"}, "name a folder"),
        ({"num": -1}, "choose a number from 1"),
        ({"num": 9999}, "choose a number from 1"),
        ({"classes": "3"}, "give two"),
        ({"classes": "3,3"}, "must differ"),
        ({"classes": "3,12"}, "classes run from 0 to 9"),
        ({"classes": "3,all"}, "classes run from 0 to 9"),
        ({"classes": "3,cat"}, "neither a class number"),
        ({"noise_factor": 0.0}, "positive number"),
        ({"noise_factor": float("nan")}, "positive number"),
        ({"noise_factor": 2.0, "seeds": [-1]}, "must lie in"),
        ({"guidance": 1.0}, "greater than 1"),
        ({"guidance": float("inf")}, "greater than 1"),
        ({"guidance": float("nan")}, "greater than 1"),
    ],
)
def test_mistakes_are_found_before_the_work(loaded, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(analyze, "compose", None)
    arguments = {"out": tmp_path / "out", **arguments}
    with pytest.raises(UserError, match=words):
        analyze.analyze(loaded, Path(arguments.pop("out")), **arguments)


def test_an_analysis_is_replaced_only_if_asked(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "compose", lambda *_: None)
    for name in ("analysis.npz", "ablation.png", "mine.png"):
        (tmp_path / name).write_text("before")
    there = r"replace \(analysis.npz, ablation.png\).*--overwrite"
    with pytest.raises(UserError, match=f"files that this command would {there}"):
        analyze.analyze(loaded, tmp_path, num=0)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"before"}
    analyze.analyze(loaded, tmp_path, num=0, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.npz", "mine.png"}
    assert set(arrays_of(tmp_path)) == {"sha256"}


def test_a_run_without_data_is_analyzed_without_losses(loaded, tmp_path, monkeypatch):
    config = loaded.config.copy_and_resolve_references()
    config.data.name = ""
    monkeypatch.setattr(analyze, "compose", lambda *_: None)
    run_without = dataclasses.replace(loaded, config=config)
    with pytest.raises(UserError, match="analyze with --num=0"):
        analyze.analyze(run_without, tmp_path / "out")
    found = analyze.analyze(run_without, tmp_path / "out", num=0)
    assert found["files"] == ["analysis.npz"]


def test_a_network_without_adapters_has_nothing_to_analyze(workdir, tmp_path):
    text = run(
        *("--mode=analyze", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"),
        "--config.lora.mode=baseline",
        status=2,
    )
    assert text.startswith("error: This run has no adapters to analyze")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "adapter", "by_class", "by_noise"),
    [
        ("with_lora", "uc", "all", "all"),
        ("with_lora", "time_class", "all", "all"),
        ("with_lora", "time", "scale_and_shift", "all"),
        ("with_lora", "class", "all", "scale_and_shift"),
        ("only_lora", "uc", "adapters", "adapters"),
        ("only_lora", "time", None, "adapters"),
        ("only_lora", "class", "adapters", None),
    ],
)
def test_a_condition_takes_the_routes_that_the_network_has(mode, adapter, by_class, by_noise):
    config = small_config(lora__mode=mode, lora__adapter=adapter)
    network = Pretrained(None, {}, config)
    for expected, of_class in ((by_class, True), (by_noise, False)):
        if expected is None:
            with pytest.raises(UserError, match="Nothing in this network depends on the"):
                analyze.routes_of(network, of_class)
        else:
            every = ("adapters", "scale_and_shift", "both")
            found = analyze.routes_of(network, of_class)
            assert found == (every if expected == "all" else (expected,))


def test_a_run_keeps_its_own_folder(loaded, workdir):
    with pytest.raises(UserError, match="which are its own"):
        analyze.analyze(loaded, workdir)


def test_samples_at_the_ends_are_those_of_the_classes(workdir, tmp_path, monkeypatch):
    def halves(_, images):  # features: the mean of each half of an image
        x = jnp.asarray(images, jnp.float32).reshape(len(images), 2, -1).mean(axis=-1)
        return x, jnp.tile(x, (1, 5))

    detector = Detector("halves", 2, halves, {})
    monkeypatch.setattr(analyze, "detector_for_source", lambda *_: detector)
    monkeypatch.setattr(analyze, "WEIGHTS", np.array([0.0, 0.5, 1.0]))
    monkeypatch.setattr(analyze, "compose", lambda *_: None)
    out, command = tmp_path / "out", [f"--workdir={workdir}", "--seeds=0-2"]
    text = run("--mode=analyze", *command, f"--out={out}", "--num=0", "--classes=3,8")
    arrays, record = arrays_of(out), json.loads(text.splitlines()[-1])
    for k, class_id in ((0, 3), (2, 8)):
        plain = tmp_path / f"{class_id}.npz"
        run("--mode=sample", *command, f"--class_id={class_id}", f"--out={plain}")
        with np.load(plain) as file:
            expected = file["images"].astype(int)
        # Folding adds in another order, which can round a pixel the other way.
        assert np.abs(arrays["classes_images_both"][k] - expected).max() <= 1
    start = arrays["classes_images_both"][0].astype(int)
    for route in ("adapters", "scale_and_shift"):
        np.testing.assert_allclose(arrays[f"classes_images_{route}"][0], start, atol=1)
    measured = record["classes"]["both"]["features"]
    points = arrays["classes_features_both"].astype(np.float64)
    ends = np.linalg.norm(points[2] - points[0], axis=-1).mean()
    assert measured["ends"] == pytest.approx(ends)
    assert (out / "classes.png").stat().st_size > 1000


@pytest.mark.slow
def test_guidance_extrapolates_the_condition_away_from_no_class(workdir, tmp_path, monkeypatch):
    """From the class itself; what the rows do is tested with `routes.guided_rows`."""

    def first(_, images):
        x = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
        return x[:, :3], jnp.tile(x[:, :1], (1, 10))

    monkeypatch.setattr(analyze, "detector_for_source", lambda *_: Detector("first", 3, first, {}))
    monkeypatch.setattr(analyze, "compose", lambda *_: None)
    monkeypatch.setattr(analyze, "GUIDED", 3)
    out, command = tmp_path / "out", [f"--workdir={workdir}", "--seeds=0-2"]
    text = run("--mode=analyze", *command, f"--out={out}", "--num=0", "--guidance=3")
    arrays, record = arrays_of(out), json.loads(text.splitlines()[-1])
    np.testing.assert_array_equal(arrays["guidance_weights"], [1, 2, 3])
    assert {arrays[f"guidance_images_{r}"].shape for r in routes.ROUTES} == {(3, 3, 8, 8, 1)}
    plain = tmp_path / "plain.npz"
    run("--mode=sample", *command, "--class_id=0", f"--out={plain}")
    with np.load(plain) as file:
        for route in routes.ROUTES:
            found = arrays[f"guidance_images_{route}"][0].astype(int)
            assert np.abs(found - file["images"]).max() <= 1
    assert set(record["guidance"]) == {"features", "adapters", "scale_and_shift", "both"}
    assert set(record["guidance"]["both"]["assigned"]) == {"1", "2", "3"}
    assert (out / "guidance.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("adapter", "pictures"),
    [
        ("class", {"omega_classes", "norms"}),
        pytest.param("time", {"omega", "similarity", "pca", "norms"}, marks=pytest.mark.slow),
        pytest.param(
            "time_class",
            {"omega", "omega_classes", "similarity", "pca", "norms"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_pictures_show_what_the_weights_depend_on(adapter, pictures):
    process = {"precond__name": "ddpm", "precond__num_steps": 20, "lora__adapter": adapter}
    config = small_config(class_conditional=True, data__num_classes=3, **process)
    denoiser = build_denoiser(config)
    example = (jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.eye(3)[:1])
    found = analyze.Found({}, {}, {})
    analyze.compose(Pretrained(denoiser, random_variables(denoiser, *example), config), found)
    assert set(found.pictures) == pictures
    assert found.arrays["update_norm"].shape == (found.record["sites"], 20, 3)
    assert (found.arrays["update_norm"] > 0).all()
    if adapter == "class":
        np.testing.assert_array_equal(found.arrays["similarity_classes"][0], np.eye(3))
        assert np.ptp(found.arrays["update_norm"], axis=1).max() < 1e-5
