"""The verbs as a user calls them, in this process, on networks of a few thousand parameters."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import eval_fid
from lora_diffusion_jax.evaluation import classifier, collect, runs
from lora_diffusion_jax.evaluation.detectors import detector_for_reference
from lora_diffusion_jax.evaluation.features import extract
from lora_diffusion_jax.evaluation.references import (
    load_reference,
    make_reference,
    save_reference,
)
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.modes import main
from lora_diffusion_jax.training import checkpoint, workdir
from tests.small import random_variables, small_config

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


def write_run(folder, steps=(10,), total_images=640, classes=0):
    """A run of an untrained network with checkpoints of other weights at every step."""
    config = small_config(
        **{"lora__mode": "baseline", "model__channel_mult": (1,), "model__attn_resolutions": ()},
        **{"model__channel_mult_emb": 1, "model__augment_dim": 0, "augment__p": 0.0},
        **{"data__image_width": 8, "sampler__num_steps": 3, "sampler__batch_size": 32},
        **{"train__batch_size": 64, "train__total_images": total_images},
        **({"class_conditional": True, "data__num_classes": classes} if classes else {}),
    )
    folder.mkdir(parents=True)
    workdir.reconcile_config(folder, config.to_dict())
    denoiser = build_denoiser(config)
    example = [np.zeros((1, 8, 8, 1), np.float32), np.ones(1, np.float32)]
    example += [np.zeros((1, classes), np.float32)] if classes else []
    for step in steps:
        params = random_variables(denoiser, *example, seed=step)["params"]
        saved = checkpoint.SavedWeights(params=params, frozen={}, buffers={}, ema=params)
        with checkpoint.Checkpoints(folder, keep=9) as checkpoints:
            checkpoints.save(step, {"weights": vars(saved)})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def call(capsys, *argv):
    """Runs a verb; returns (status, results, text on stderr)."""
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


def test_ref_writes_what_calc_reads(capsys, digits, reference, tmp_path, monkeypatch, cache):
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


def test_folders_are_classes_if_asked(capsys, digits, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_settings", lambda shape: SETTINGS)
    for i in range(60):
        folder = tmp_path / "data" / str(digits[0].labels[i] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(digits[0].images[i]))
    command = ("ref", f"--data={tmp_path / 'data'}", f"--dest={tmp_path / 'ref.npz'}")
    _, (made,), _ = call(capsys, *command)
    assert made["features"] == "rotation"
    _, (made,), _ = call(capsys, *command, "--class_folders")
    assert made["features"] == "classifier"
    assert made["detector_details"]["classes"] == 2


def test_gen_is_labelled_and_independent_of_the_batch_size(capsys, reference, run):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", "--num=70")
    status, (first,), _ = call(capsys, *common)
    assert status == 0
    assert first["metric"] == "fd_classifier_70"
    assert (first["weights"], first["step"], first["images_seen"]) == ("ema", 10, 640)
    assert first["seeds"] == "0-69"
    assert first["sampler"]["num_steps"] == 3
    _, (second,), _ = call(capsys, *common, "--batch_size=7")
    # programs for other batch sizes round differently, and a byte of an image may flip
    assert second["value"] == pytest.approx(first["value"], rel=1e-4)
    _, (steps,), _ = call(capsys, *common, "--config.sampler.num_steps=2")
    assert steps["sampler"]["num_steps"] == 2
    assert steps["value"] != first["value"]


def test_gen_compares_with_the_classes_it_asked_for(capsys, reference, run, tmp_path):
    conditional = write_run(tmp_path / "run", classes=10)
    common = (f"--ref={reference}", "--num=40", "--metrics=fid,accuracy")
    status, rows, error = call(capsys, "gen", f"--workdir={conditional}", *common)
    assert status == 0, error
    assert [row["metric"] for row in rows] == ["fd_classifier_40", "accuracy_classifier_40"]

    # The same images and their classes, by way of the sampler's files
    command = ("--mode=sample", f"--workdir={conditional}", "--seeds=0-39")
    assert main.main([*command, f"--out={tmp_path / 'samples.npz'}"]) == 0
    with np.load(tmp_path / "samples.npz") as samples:
        images, labels = samples["images"], samples["labels"]
    detector = detector_for_reference(load_reference(reference))
    logits = np.concatenate([logits for _, logits in extract(detector, [images])])
    assert rows[1]["value"] == np.mean(logits.argmax(axis=-1) == labels)

    status, _, error = call(capsys, "gen", f"--workdir={run}", *common)
    assert status == 2
    assert f"{run} has none" in error


def test_repeats_shift_the_seeds_and_report_the_best(capsys, reference, run):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", "--num=20")
    _, rows, _ = call(capsys, *common, "--repeats=3", "--metrics=fid,pr")
    scores = [row["value"] for row in rows if row["metric"].startswith("recall")]
    assert scores[3] == max(scores[:3]) > min(scores)
    rows = [row for row in rows if row["metric"].startswith("fd")]
    assert [row["seeds"] for row in rows[:3]] == ["0-19", "20-39", "40-59"]
    values = [row["value"] for row in rows[:3]]
    summary = rows[3]
    assert summary["value"] == summary["min"] == min(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["std"] == pytest.approx(np.std(values, ddof=1))
    _, (alone,), _ = call(capsys, *common, "--seeds=20-39")
    assert alone["value"] == values[1]


def test_stopped_gen_goes_on_to_the_same_number(capsys, reference, run, monkeypatch):
    common = ("gen", f"--workdir={run}", f"--ref={reference}", "--metrics=fid,pr")
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
        status, _, said = call(capsys, *common, "--seeds=1000-1229")
        assert (status, "RuntimeError: killed" in said) == (2, True)
    monkeypatch.setattr(collect.Moments, "add", original)
    added = []
    monkeypatch.setattr(
        collect.Moments, "add", lambda self, rows: (added.append(len(rows)), original(self, rows))
    )
    _, rows, _ = call(capsys, *common, "--seeds=1000-1229")
    assert sum(added) == 230 - 48  # three batches were not repeated
    assert [r["value"] for r in rows] == [r["value"] for r in expected]
    assert not list((run / "evaluation" / "partial").iterdir())


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("gen", signal.SIGTERM),
        pytest.param("gen", signal.SIGINT, marks=pytest.mark.slow),
        ("calc", signal.SIGTERM),
        pytest.param("all", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    capsys, reference, run, digits, tmp_path, monkeypatch, verb, number
):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "images.npz", images=digits[1].images[:70])
    first = 1000 * number + 100 * (verb == "all")  # seeds that no other test has judged
    what = [f"--workdir={run}", f"--seeds={first}-{first + 69}"]
    what = [f"--images={tmp_path}/images.npz"] if verb == "calc" else what
    command = [verb, *what, f"--ref={reference}", "--num=70", "--metrics=fid,pr"]
    original, added = collect.Moments.add, []

    def add(self, rows):
        original(self, rows)
        added.append(len(rows))
        if len(added) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(collect.Moments, "add", add)
    status, rows, said = call(capsys, *command)
    assert (status, rows, sum(added)) == (128 + number, [], 32)
    name = signal.Signals(number).name
    assert said.splitlines()[-1] == f"stopped by {name}; rerun the same command to resume"
    status, rows, _ = call(capsys, *command)
    assert (status, sum(added)) == (0, 70)  # the first 32 images were not repeated
    monkeypatch.setattr(collect.Moments, "add", original)
    again = call(capsys, *command)[1]
    assert [r["value"] for r in rows] == [r["value"] for r in again]
    partial = (tmp_path / "cache" if verb == "calc" else run / "evaluation") / "partial"
    assert not list(partial.iterdir())


def test_two_processes_do_not_mix_their_sums(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lora_diffusion_jax.evaluation import collect\n"
        "with collect.Partial(Path(sys.argv[1]), {}).lock(): pass"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}

    def other():
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    with collect.Partial(tmp_path, {}).lock():
        assert "Another process is computing" in other().stderr
    assert other().returncode == 0


def test_all_evaluates_each_checkpoint_once(capsys, reference, tmp_path, monkeypatch):
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
        raise AssertionError("a finished checkpoint was evaluated again")

    monkeypatch.setattr(runs, "evaluate", never)
    assert call(capsys, *common)[1] == rows
    assert call(capsys, *common, "--follow")[1] == rows  # all runs are finished: it ends
    status, _, said = call(capsys, *common, "--config.dtype=bfloat16")  # other images, same weights
    assert (status, "evaluated again" in said) == (2, True)


def test_follow_waits_for_new_checkpoints(capsys, reference, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=(5,))

    def train_on(seconds):
        if (run / "checkpoints" / "10").exists():
            return
        other = write_run(tmp_path / "later", steps=(10,))
        (other / "checkpoints" / "10").rename(run / "checkpoints" / "10")

    monkeypatch.setattr(runs, "sleep", train_on)
    common = ("all", f"--workdir={run}", f"--ref={reference}", "--num=20", "--follow")
    _, rows, _ = call(capsys, *common)
    assert [row["step"] for row in rows] == [5, 10]


CALC, GEN = "calc --ref={ref} --images=", "gen --workdir={run} --ref={ref} "
JUDGE, WITH = "calc --images={npz} --ref=", CALC + "{npz} --features=edm --inception="
BAD = {
    "fewer images than asked": (CALC + "{npz} --num=300", "297 images, but --num=300"),
    "more images than asked": (CALC + "{npz} --num=100", "but --num=100"),
    "a negative number": (CALC + "{npz} --num=-3", "but --num=-3"),
    "corrupt PNG in a ZIP": (CALC + "{broken}", "00003.png"),
    "empty folder": (CALC + "{empty}", "no PNG or JPEG"),
    "no such folder": (CALC + "{empty}/x", "empty/x"),
    "no images named": (CALC, "--images is empty"),
    "neither file nor data set": (CALC + "sampels", "no file or folder sampels"),
    "NaN images": (CALC + "{nan}", "clip(x * 127.5 + 128, 0, 255)"),
    "channels first": (CALC + "{first}", "transpose(0, 2, 3, 1)"),
    "integers": (CALC + "{ints}", "integers 0-255 with astype(uint8)"),
    "an array alone": (CALC + "{npy}", "NUMPY"),
    "another size": (CALC + "{large}", "has (8, 8, 1)"),
    "one image to evaluate": (CALC + "{one}", "at least 2"),
    "images as reference": (JUDGE + "{npz}", "no reference statistics"),
    "reference as images": (CALC + "{ref}", "Pass it with --ref"),
    "reference of another size": (JUDGE + "{other}", "100 features"),
    "missing reference": (JUDGE + "{empty}/no.npz", "no reference file"),
    "reference cut short": (JUDGE + "{cut}", "not a whole npz"),
    "negative covariance": (JUDGE + "{negative}", "positive semi-definite"),
    "lopsided covariance": (JUDGE + "{lopsided}", "symmetric"),
    "words as mean": (JUDGE + "{words}", "expected real numbers"),
    "damaged description": (JUDGE + "{meta}", "not a JSON object"),
    "damaged recipe": (JUDGE + "{recipe}", "is damaged (its name is None"),
    "unknown metric": (CALC + "{npz} --metrics=fid,foo", "choose from fid,kid"),
    "no rows for kid": (JUDGE + "{bare} --metrics=pr", "--keep_features"),
    "too few for kid": (CALC + "{npz} --metrics=fid,kid", "at least 1000 images; {npz} has 297"),
    "no classes asked for": (CALC + "{npz} --metrics=accuracy", "{npz} has none"),
    "other features": (CALC + "{npz} --features=rotation", "named classifier, which"),
    "no weights": (CALC + "{npz} --features=edm --inception=/no", "6726825d"),
    "weights of another network": (WITH + "{foreign}", "(472 more differences)"),
    "weights in an npz": (WITH + "{npz}", "not one that torch.save wrote"),
    "weights that are a web page": (WITH + "{page}", "a web page"),
    "no dinov2": (CALC + "{npz} --features=dinov2", "--dinov2=PATH"),
    "turns are no classes": (JUDGE + "{turns} --metrics=is", "needs classes"),
    "seeds and num": (GEN + "--num=9 --seeds=0-7", "8 seeds, but --num=9"),
    "a seed twice": (GEN + "--seeds=1,1", "repeats a seed"),
    "one sample": (GEN + "--num=1", "at least 2"),
    "no repeats": (GEN + "--num=9 --repeats=0", "choose 1 to 100"),
    "repeats beyond the last seed": (
        GEN + "--seeds=4294967290-4294967294 --repeats=2",
        "largest seed",
    ),
    "too few samples": (GEN + "--num=9 --metrics=fid,kid", "at least 1000 images; {run} has 9"),
    "no run": ("gen --workdir={empty} --ref={ref} --num=9", "is not a run"),
    "a sweep": ("gen --workdir={run}/.. --ref={ref} --num=9", "is not a run but contains some"),
    "no network": ("gen --workdir={page} --ref={ref} --num=9", "a web page"),
    "a step of a file": ("gen --workdir={page} --step=3 --ref={ref} --num=9", "no steps"),
    "no step": (GEN + "--num=9 --step=3", "no checkpoint 3"),
    "no field": (GEN + "--num=9 --config.sampler.x=3", "no field samp"),
    "no float": (GEN + "--num=9 --config.sampler.rho=x", "type float"),
    "no option": (CALC + "{npz} --foo=3", "unrecognized arguments: --foo=3"),
    "no runs": ("all --workdir={empty} --ref={ref} --num=9", "contains none"),
    "a split of a file": (CALC + "{npz} --split=test", "--split, --data_dir and --image_key apply"),
    "class folders of TFDS": (CALC + "digits --class_folders", "--class_folders needs --images"),
    "class folders without any": (
        "ref --data={flat} --dest={empty}/r.npz --class_folders",
        "has no label (1 of 1 images",
    ),
    "no classes": ("ref --data={npz} --dest={empty}/r.npz --features=classifier", "no classes"),
    "no data": ("ref --data={empty}/x.zip --dest={empty}/r.npz", "x.zip"),
    "no npz": ("ref --data={npz} --dest={empty}/r.txt", "ends in .npz"),
    "unwritable": ("ref --data={npz} --dest=/proc/r.npz --features=rotation", "/proc"),
}


@pytest.fixture(scope="module")
def inputs(digits, reference, run, tmp_path_factory):
    """Good and bad files by name."""
    root = tmp_path_factory.mktemp("inputs")
    images, floats = digits[1].images, digits[1].images.astype(np.float32)
    floats[3, 0, 0] = np.nan
    arrays = {"npz": images, "nan": floats, "first": images.transpose(0, 3, 1, 2)}
    arrays |= {"ints": images.astype(int), "large": images.repeat(2, axis=1), "one": images[:1]}
    for name, value in arrays.items():
        np.savez(root / f"{name}.npz", images=value)
    mu, one = np.zeros(100), np.eye(100)
    statistics = {"other": (mu, one), "negative": (mu, -one), "lopsided": (mu, np.triu(one + 1))}
    statistics |= {"words": (np.array(["a"]), np.eye(1))}
    for name, (mu, sigma) in statistics.items():
        np.savez(root / f"{name}.npz", mu=mu, sigma=sigma)
    with np.load(reference) as file:
        whole = {key: file[key] for key in file}
    recipe = np.array('{"features": "classifier", "recipe": {}}')
    np.savez(root / "bare.npz", **{k: v for k, v in whole.items() if k != "features"})
    np.savez(root / "meta.npz", **(whole | {"meta": np.array("[1]")}))
    np.savez(root / "recipe.npz", **(whole | {"meta": recipe}))
    (root / "cut.npz").write_bytes(reference.read_bytes()[:5000])
    np.save(root / "npy", images)
    (root / "npy.npy").rename(root / "npy.npz")
    turns = load_reference(reference)
    turns.meta["recipe"] |= {"name": "rotation"}
    turns.meta["features"] = "rotation"
    del turns.meta["detector_hash"]
    save_reference(root / "turns.npz", turns)
    save_file({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, root / "foreign.safetensors")
    (root / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    write_zip(root / "broken.zip", images[:9], broken=3)
    (root / "empty").mkdir()
    (root / "flat").mkdir()
    (root / "flat" / "0.png").write_bytes(png(images[0]))
    return {path.stem: path for path in root.iterdir()} | {"ref": reference, "run": run}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_plain_error(capsys, case, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    before = sorted(path for path in inputs["npz"].parent.rglob("*"))
    command, expected = BAD[case]
    status, rows, said = call(capsys, *command.format(**inputs).split(" "))
    assert (status, rows) == (2, [])
    assert said.startswith("error: ")
    assert expected.format(**inputs) in said
    assert "Traceback" not in said
    assert sorted(path for path in inputs["npz"].parent.rglob("*")) == before
