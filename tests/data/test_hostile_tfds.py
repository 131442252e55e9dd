"""Untrusted prepared TFDS folders: nothing that they name is imported or run."""

import json
import shutil
import subprocess
import sys

import pytest

from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from tests.modes.running import TINY
from tests.small import ROOT, fast_compile_env
from tests.test_untrusted import fuzz

CORE = "tensorflow_datasets.core.features"
EVIL = "evil.feature.Feature"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return digits.prepare(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def hostile(honest, tmp_path):
    """A copy named `tiny` below a folder from which the module `evil` can be imported."""
    home = tmp_path / "tiny" / "1.0.0"
    shutil.copytree(honest, home)
    for path in home.glob("digits-*"):
        path.rename(home / path.name.replace("digits", "tiny"))
    edit(
        home / "dataset_info.json", lambda info: info.update(name="tiny", moduleName="evil.feature")
    )
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "feature.py").write_text("open('EXECUTED', 'w')\n")
    return home


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def image(features):
    return features["featuresDict"]["features"]["image"]


LEGACY = {"type": EVIL, "content": {}}
FEATURES = {
    "class": lambda f: image(f).update(pythonClassName=EVIL),
    "top": lambda f: f.update(pythonClassName=EVIL),
    "snake case": lambda f: image(f).update(
        python_class_name=image(f).pop("pythonClassName") and EVIL
    ),
    "legacy": lambda f: f.update(LEGACY),
    "legacy inside": lambda f: f.update(
        type=f"{CORE}.features_dict.FeaturesDict", content={"x": LEGACY}
    ),
    "in its JSON": lambda f: f["featuresDict"]["features"].update(
        x={
            "pythonClassName": f"{CORE}.sequence_feature.Sequence",
            "jsonFeature": {"json": json.dumps({"feature": LEGACY, "length": None})},
        }
    ),
    "sequence": lambda f: f["featuresDict"]["features"].update(
        x={
            "pythonClassName": f"{CORE}.sequence_feature.Sequence",
            "sequence": {"feature": {"pythonClassName": EVIL, "tensor": {}}},
        }
    ),
    "one of TFDS' modules": lambda f: image(f).update(
        pythonClassName="tensorflow_datasets.scripts.cli.main.Feature"
    ),
    "a list": lambda f: image(f).update(pythonClassName=[EVIL]),
}


@pytest.mark.parametrize("case", FEATURES)
def test_classes_that_tfds_does_not_have_are_refused(hostile, monkeypatch, case):
    monkeypatch.syspath_prepend(str(hostile.parents[1]))
    monkeypatch.chdir(hostile.parents[1])
    edit(hostile / "features.json", FEATURES[case])
    with pytest.raises(UserError, match=r"names the class .*Feature.*would be imported"):
        open_source("tiny", str(hostile.parents[1]))
    assert "evil" not in sys.modules
    assert not (hostile.parents[1] / "EXECUTED").exists()


def test_classes_in_the_description_are_refused_too(hostile, monkeypatch):
    monkeypatch.syspath_prepend(str(hostile.parents[1]))
    edit(hostile / "dataset_info.json", lambda i: i.update(features={"pythonClassName": EVIL}))
    with pytest.raises(UserError, match=r"dataset_info\.json names the class evil"):
        open_source("tiny", str(hostile.parents[1]))
    assert "evil" not in sys.modules


def test_files_outside_the_folder_are_refused(hostile):
    shutil.copy(hostile / "tiny-train.array_record-00000-of-00001", hostile.parent / "x-y")
    edit(hostile / "dataset_info.json", lambda i: i["splits"][0].update(filepathTemplate="../x-y"))
    with pytest.raises(UserError, match="lies outside|not a complete prepared"):
        open_source("tiny", str(hostile.parents[1]), split="train")


@pytest.mark.parametrize("key", ["shardLengths", "shard_lengths"])
def test_shards_are_counted_before_they_are_listed(hostile, monkeypatch, key):
    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", None)  # never gets that far

    def change(info):
        del info["splits"][0]["shardLengths"]
        info["splits"][0][key] = ["1"] * 10_001

    edit(hostile / "dataset_info.json", change)
    with pytest.raises(UserError, match=r"lists 10,00\d shards; expected at most 10,000"):
        open_source("tiny", str(hostile.parents[1]))


def test_names_of_classes_must_fit_and_are_read_within_limits(hostile):
    data_dir = str(hostile.parents[1])
    (hostile / "label.labels.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="names 2 classes, but tiny/1.0.0 declares 10"):
        open_source("tiny", data_dir)
    (hostile / "label.labels.txt").write_text("x" * (5 << 20))
    with pytest.raises(UserError, match="larger than the 4,194,304 bytes"):
        open_source("tiny", data_dir)


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "label.labels.txt"])
def test_damaged_descriptions_never_raise_anything_but_a_user_error(hostile, name, count):
    def read(path):
        source = open_source("tiny", str(hostile.parents[1]))
        source.read([0, len(source) - 1])

    refused = fuzz(read, (hostile / name).read_bytes(), hostile / name, count)
    assert refused > count / 4


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_records_never_raise_anything_but_a_user_error(hostile, count):
    def read(path):
        source = open_source("tiny", str(hostile.parents[1]))
        source.read(range(0, len(source), 97))

    path = hostile / "tiny-train.array_record-00000-of-00001"
    assert fuzz(read, path.read_bytes(), path, count) > count / 4


TRAIN = """
import os, sys
allowed, hostile = sys.argv[1].split(":"), sys.argv[2]
sys.path.insert(0, hostile)  # what the folder of a script does
seen, active = [], True
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 1, "os.symlink": 1}
def watch(event, args):
    if not active:
        return
    paths = []
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if (args[2] or 0) & WRITES:
            paths = [path]
        elif path.startswith(hostile) and path.endswith((".py", ".pyc", ".so")):
            seen.append(f"read {path}")
    elif event in CHANGES:
        paths = [os.fsdecode(a) for a in args[: CHANGES[event]] if isinstance(a, (str, bytes))]
    for path in paths:
        if not os.path.isabs(path):
            continue  # below a folder that was opened
        if not os.path.realpath(path).startswith((*allowed, "/dev/", "/proc/")):
            seen.append(f"{event} {path}")
sys.addaudithook(watch)
from lora_diffusion_jax.modes.main import main
status = main(sys.argv[3:])
active = False
inside = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", None)).startswith(hostile)]
print("SEEN", seen, inside, "evil" in sys.modules, status)
"""


@pytest.mark.slow
def test_a_whole_training_run_imports_and_writes_nothing_else(hostile, tmp_path_factory):
    allowed = [tmp_path_factory.mktemp(name) for name in ("workdir", "cache", "compiled", "tmp")]
    data_dir = hostile.parents[1]
    arguments = ["--mode=train", *TINY, f"--workdir={allowed[0] / 'run'}"]
    arguments += [f"--config.data.data_dir={data_dir}", "--config.data.name=tiny"]
    arguments += ["--config.train.total_images=32", "--config.eval.num_samples=8"]
    env = fast_compile_env(
        PYTHONPATH=str(ROOT),
        PYTHONDONTWRITEBYTECODE="1",
        LORA_DIFFUSION_CACHE=str(allowed[1]),
        JAX_COMPILATION_CACHE_DIR=str(allowed[2]),
        TMPDIR=str(allowed[3]),
    )
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, ":".join(map(str, allowed)), str(data_dir), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=data_dir,
        env=env,
    )
    assert "SEEN [] [] False 0" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (data_dir / "EXECUTED").exists()
