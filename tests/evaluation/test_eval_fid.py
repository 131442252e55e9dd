"""The verbs as a user calls them, in this process, on networks of a few thousand parameters."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import eval_fid
from lora_diffusion_jax import factory, judging
from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.evaluation import classifier, collect
from lora_diffusion_jax.evaluation.references import make_reference
from lora_diffusion_jax.evaluation.statistics import load_reference, save_reference
from lora_diffusion_jax.training import checkpoint, workdir

SETTINGS = classifier.Settings(widths=(8, 16), feature_dim=16, total_images=500)


@pytest.fixture(scope="module")
def reference(digits, detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    train = digits[0]
    found = collect.collect(detector, [train.images], keep_rows=True)
    made = make_reference(detector, found, {"data": "digits"})
    path = folder / "digits.npz"
    save_reference(path, made)
    return path


def write_run(folder, steps=(10,), total_images=640):
    """A run of an untrained network with checkpoints of other weights at every step."""
    config = base()
    config.model.update(channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    config.model.update(channel_mult_emb=1, augment_dim=0)
    config.lora.mode = "baseline"
    config.augment.p = 0.0
    config.data.update(image_size=8, image_width=8, channels=1)
    config.train.update(batch_size=64, total_images=total_images)
    config.sampler.update(num_steps=3, batch_size=32)
    folder.mkdir(parents=True)
    workdir.reconcile_config(folder, config.to_dict(), (), lambda text: None)
    denoiser = factory.build_denoiser(config)
    for step in steps:
        params = jax.device_get(
            factory.init_variables(config, denoiser, jax.random.key(step))["params"]
        )
        saved = checkpoint.SavedWeights(params=params, frozen={}, buffers={}, ema=params)
        with checkpoint.Checkpoints(folder, keep=9) as checkpoints:
            checkpoints.save(step, {"weights": vars(saved)})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def call(capsys, *argv):
    """Runs a verb; returns (status, results, what was said)."""
    capsys.readouterr()
    status = eval_fid.main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, [json.loads(line) for line in out.out.splitlines()], out.err


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, format="PNG")
    return buffer.getvalue()


def write_zip(path, images, broken=None):
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            data = png(image)
            archive.writestr(f"{i:05d}.png", data[: len(data) // 2] if i == broken else data)
    return path


def test_folder_zip_and_npz_give_one_number(capsys, digits, reference, tmp_path):
    images = digits[1].images
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i:05d}.png").write_bytes(png(image))
    np.savez(tmp_path / "samples.npz", images=images, seeds=np.arange(len(images)))
    values = []
    for path in (folder, write_zip(tmp_path / "z.zip", images), tmp_path / "samples.npz"):
        status, (record,), _ = call(capsys, "calc", f"--images={path}", f"--ref={reference}")
        assert status == 0
        assert record["metric"] == "fd_classifier_297"
        assert (record["n"], record["n_reference"]) == (297, 1500)
        assert record["features"] == "classifier"
        assert {"detector_hash", "reference_hash", "code_version"} <= record.keys()
        values.append(record["value"])
    assert values[0] == values[1] == values[2] > 0


def test_ref_writes_what_calc_reads(capsys, digits, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "default_settings", lambda shape: SETTINGS)
    np.savez(tmp_path / "train.npz", images=digits[0].images[:300])
    dest = tmp_path / "ref.npz"
    status, (made,), _ = call(capsys, "ref", f"--data={tmp_path}/train.npz", f"--dest={dest}")
    assert (status, made["features"], made["n"]) == (0, "rotation", 300)
    metrics = "--metrics=fid,pr,memorisation"
    status, rows, _ = call(
        capsys, "calc", f"--images={tmp_path}/train.npz", f"--ref={dest}", metrics
    )
    found = {row["metric"].removesuffix("_rotation_300"): row["value"] for row in rows}
    assert abs(found["fd"]) < 1e-9
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["memorised"] == 1
    assert rows[0]["reference_hash"] == made["reference_hash"]


def test_gen_is_labelled_and_independent_of_the_batch_size(capsys, reference, run):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", "--num=70")
    status, (first,), _ = call(capsys, *common)
    assert status == 0
    assert first["metric"] == "fd_classifier_70"
    assert (first["weights"], first["step"], first["images_seen"]) == ("ema", 10, 640)
    assert first["seeds"] == "0-69"
    assert first["sampler"]["num_steps"] == 3
    _, (second,), _ = call(capsys, *common, "--batch_size=7")
    # other programs for other batch sizes round differently before the images become bytes
    assert second["value"] == pytest.approx(first["value"], rel=1e-9)
    _, (steps,), _ = call(capsys, *common, "--config.sampler.num_steps=2")
    assert steps["sampler"]["num_steps"] == 2
    assert steps["value"] != first["value"]


def test_repeats_shift_the_seeds_and_report_the_minimum(capsys, reference, run):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", "--num=20")
    _, rows, _ = call(capsys, *common, "--repeats=3")
    assert [row["seeds"] for row in rows[:3]] == ["0-19", "20-39", "40-59"]
    values = [row["value"] for row in rows[:3]]
    summary = rows[3]
    assert summary["value"] == summary["min"] == min(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["std"] == pytest.approx(np.std(values, ddof=1))
    _, (alone,), _ = call(capsys, *common, "--seeds=20-39")
    assert alone["value"] == values[1]


@pytest.mark.parametrize("metrics", ["fid", "fid,pr"])
def test_stopped_gen_goes_on_to_the_same_number(capsys, reference, run, metrics, monkeypatch):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", f"--metrics={metrics}")
    _, expected, _ = call(capsys, *common, "--seeds=1000-1229")
    original = collect.Moments.add
    monkeypatch.setattr(collect, "SAVE_SECONDS", 0.0)
    for stop_after in (1, 2):  # the batches of 16 that are done before the process dies
        left = [stop_after]

        def add(self, rows, left=left):
            if not left[0]:
                raise RuntimeError("killed")
            left[0] -= 1
            original(self, rows)

        monkeypatch.setattr(collect.Moments, "add", add)
        with pytest.raises(RuntimeError, match="killed"):
            eval_fid.main([*map(str, common), "--seeds=1000-1229"])
    monkeypatch.setattr(collect.Moments, "add", original)
    added = []
    monkeypatch.setattr(
        collect.Moments, "add", lambda self, rows: (added.append(len(rows)), original(self, rows))
    )
    _, rows, _ = call(capsys, *common, "--seeds=1000-1229")
    assert sum(added) == 230 - 48  # three batches were not made again
    assert [r["value"] for r in rows] == [r["value"] for r in expected]
    assert not list((run / "evaluation" / "partial").iterdir())


def test_two_processes_do_not_mix_their_sums(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lora_diffusion_jax.evaluation import collect\n"
        "with collect._locked(Path(sys.argv[1])): pass"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}

    def other():
        command = [sys.executable, "-c", code, str(tmp_path / "sums")]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    with collect._locked(tmp_path / "sums"):
        assert "Another process is computing" in other().stderr
    assert other().returncode == 0


def test_all_judges_each_checkpoint_once(capsys, reference, tmp_path, monkeypatch):
    root = tmp_path / "sweep"
    write_run(root / "a", steps=(5, 10))
    write_run(root / "b", steps=(10,))
    common = ("all", f"--workdir={root}", f"--ref={reference}", "--num=20")
    status, rows, said = call(capsys, *common)
    assert status == 0
    assert [(row["workdir"][-1], row["step"]) for row in rows] == [("a", 5), ("a", 10), ("b", 10)]
    assert "<- best" in said
    assert (root / "evaluation" / "fd_classifier_20.png").stat().st_size > 5000

    def never(*args):
        raise AssertionError("a finished checkpoint was judged again")

    monkeypatch.setattr(judging, "judge", never)
    assert call(capsys, *common)[1] == rows
    assert call(capsys, *common, "--follow")[1] == rows  # all runs are finished: it ends


def test_follow_waits_for_new_checkpoints(capsys, reference, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=(5,))

    def train_on(seconds):
        other = write_run(tmp_path / "later", steps=(10,))
        (other / "checkpoints" / "10").rename(run / "checkpoints" / "10")

    monkeypatch.setattr(judging.time, "sleep", train_on)
    common = ("all", f"--workdir={run}", f"--ref={reference}", "--num=20", "--follow")
    _, rows, _ = call(capsys, *common)
    assert [row["step"] for row in rows] == [5, 10]


BAD = {
    "fewer images than asked": ("calc --images={npz} --ref={ref} --num=300", "fewer than the 300"),
    "more images than asked": ("calc --images={npz} --ref={ref} --num=100", "but --num=100"),
    "corrupt PNG in a ZIP": ("calc --images={broken} --ref={ref}", "00003.png"),
    "empty folder": ("calc --images={empty} --ref={ref}", "no PNG or JPEG"),
    "no such folder": ("calc --images={empty}/x --ref={ref}", "empty/x"),
    "NaN images": ("calc --images={nan} --ref={ref}", "1 of them with NaN"),
    "another size": ("calc --images={large} --ref={ref}", "made for 8x8x1"),
    "images as reference": ("calc --images={npz} --ref={npz}", "no reference statistics"),
    "reference as images": ("calc --images={ref} --ref={ref}", "Pass it with --ref"),
    "reference of another size": ("calc --images={npz} --ref={other}", "100 features"),
    "missing reference": ("calc --images={npz} --ref={empty}/no.npz", "no reference file"),
    "unknown metric": ("calc --images={npz} --ref={ref} --metrics=fid,foo", "choose some of"),
    "no rows for kid": ("calc --images={npz} --ref={bare} --metrics=kid", "--keep_features"),
    "other features": ("calc --images={npz} --ref={ref} --features=rotation", "made with classif"),
    "no weights": ("calc --images={npz} --ref={ref} --features=edm --inception=/no", "6726825d"),
    "not Inception": ("calc --images={npz} --ref={ref} --features=edm --inception={npz}", "npz"),
    "no dinov2": ("calc --images={npz} --ref={ref} --features=dinov2", "--dinov2=PATH"),
    "turns are no classes": ("calc --images={npz} --ref={turns} --metrics=is", "needs classes"),
    "seeds and num": ("gen --workdir={run} --ref={ref} --num=9 --seeds=0-7", "8 seeds"),
    "a seed twice": ("gen --workdir={run} --ref={ref} --seeds=1,1", "twice"),
    "one image": ("gen --workdir={run} --ref={ref} --num=1", "at least 2"),
    "no run": ("gen --workdir={empty} --ref={ref} --num=9", "is not a run"),
    "no step": ("gen --workdir={run} --ref={ref} --num=9 --step=3", "no checkpoint 3"),
    "no field": ("gen --workdir={run} --ref={ref} --num=9 --config.sampler.x=3", "no field samp"),
    "no number": ("gen --workdir={run} --ref={ref} --num=9 --config.sampler.rho=x", "type float"),
    "no option": ("calc --images={npz} --ref={ref} --foo=3", "--foo=3 is not an option"),
    "no runs": ("all --workdir={empty} --ref={ref} --num=9", "holds none"),
    "no classes": ("ref --data={npz} --dest={empty}/r.npz --features=classifier", "no classes"),
    "no data": ("ref --data={empty}/x.zip --dest={empty}/r.npz", "x.zip"),
    "unwritable": ("ref --data={npz} --dest=/proc/r.npz --features=rotation", "/proc"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_plain_error(capsys, case, digits, reference, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "default_settings", lambda shape: SETTINGS)
    images = digits[1].images
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / f"{name}.npz" for name in ("npz", "nan", "large", "other", "bare")}
    np.savez(names["npz"], images=images)
    floats = images.astype(np.float32)
    floats[3, 0, 0] = np.nan
    np.savez(names["nan"], images=floats)
    np.savez(names["large"], images=images.repeat(2, axis=1))
    np.savez(names["other"], mu=np.zeros(100), sigma=np.eye(100))
    with np.load(reference) as file:
        np.savez(names["bare"], **{k: file[k] for k in file if k != "features"})
    turns = load_reference(reference)
    turns.meta["recipe"] |= {"name": "rotation"}
    turns.meta["features"] = "rotation"
    save_reference(tmp_path / "turns.npz", turns)
    names |= {"empty": tmp_path / "empty", "ref": reference, "run": run}
    names["turns"] = tmp_path / "turns.npz"
    names["broken"] = write_zip(tmp_path / "broken.zip", images[:9], broken=3)
    command, expected = BAD[case]
    status, rows, said = call(capsys, *command.format(**names).split())
    assert (status, rows) == (2, [])
    assert said.splitlines()[-1].startswith("error: ")
    assert expected in said
    assert "Traceback" not in said
