"""Runs as folders to publish, uploaded to a server that speaks the Hub's protocol, and used from there."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.interop import hub, load_pretrained
from lora_diffusion_jax.modes import push
from tests.interop import hub_server
from tests.modes.running import TINY, run
from tests.small import ROOT, config_flags, small_config

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    """A run written as a folder."""
    path = tmp_path_factory.mktemp("push") / "out"
    text = run("--mode=push", f"--workdir={workdir}", f"--out={path}", "--license=apache-2.0")
    assert f"published the ema weights of step 6: {path}" in text
    return path


def test_a_folder_has_weights_config_card_and_grid(folder, workdir):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "samples.png"]
    saved, loaded = load_workdir(workdir), load_pretrained(folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved.variables, loaded.variables)
    facts = json.loads((folder / "config.json").read_text())
    assert (facts["weights"], facts["step"]) == ("ema", 6)
    assert facts["config"]["train"]["batch_size"] == 16
    with Image.open(folder / "samples.png") as grid:
        assert grid.width > 100


def test_the_card_says_what_it_is_and_nothing_of_the_machine(folder, workdir, data_dir):
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in metadata.splitlines())
    assert json.loads(fields["license"]) == "apache-2.0"
    assert json.loads(fields["tags"]) == ["diffusion", "jax", "flax", "lora", "lora-uc"]
    params = load_workdir(workdir).variables["params"]
    count, adapters = lora.count(params), lora.count(lora.split(params)[1])
    assert f"| parameters | {count:,}, of which {adapters:,} in adapters |" in body
    assert "| weights | ema of step 6, after 96 images |" in body
    assert "Data set: `digits`, split `train`." in body
    assert "| `train/loss` |" in body
    assert "![samples](samples.png)" in body
    assert "lora-diffusion --mode=train --config=digits" in body
    for published in (text, (folder / "config.json").read_text()):
        assert str(workdir.parent) not in published
        assert str(data_dir) not in published
    assert not re.search(r"/(tmp|home|root)/", text)


def test_fields_of_one_machine_or_account_are_not_published():
    config = small_config(
        data__data_dir="/home/me/tfds",
        data__path="/home/me/faces.zip",
        eval__reference="/home/me/ref.npz",
        guidance__workdir="../weak",
        init_from="hf://owner/base@v1",
        log__wandb_project="secret",
    )
    found = push.published(config)
    assert found["data"]["data_dir"] == "tfds"
    assert found["data"]["path"] == "faces.zip"
    assert found["eval"]["reference"] == "ref.npz"
    assert found["guidance"]["workdir"] == "weak"
    assert found["init_from"] == "hf://owner/base@v1"
    assert found["log"]["wandb_project"] == ""
    assert config.data.path == "/home/me/faces.zip"


def test_the_command_of_a_training_names_no_folders(tmp_path):
    assert push.training_command(tmp_path) == ""
    words = "/venv/bin/python /x/main.py --workdir=/home/me/run --mode=train --config /home/me/c.py"
    more = " --config.data.path=~/a.zip --config.lora.sites='.*/qkv' --config.init_from=hf://a/b"
    (tmp_path / "command.txt").write_text(words + more + "\n")
    assert push.training_command(tmp_path) == (
        "lora-diffusion --workdir=run --mode=train --config configs/c.py --config.data.path=a.zip "
        "'--config.lora.sites=.*/qkv' --config.init_from=hf://a/b"
    )


def test_names_from_data_are_no_markup(workdir):
    loaded = load_workdir(workdir)
    config = loaded.config.copy_and_resolve_references()
    config.data.class_names = ("a|b", "<script>", "[x](y)", *"defghij")
    text = push.card(
        dataclasses.replace(loaded, config=config),
        weights="ema",
        where="hf://a/b",
        title="<img src=x>",
        metrics={"eval/fid|x": 1.0, "train/loss": None},
        images=1,
        command="lora-diffusion ```\n<b>",
    )
    assert "<img" not in text
    assert "<script>" not in text
    assert "a/b, ‹script>, (x)(y)" in text
    assert text.count("```") == 6
    assert "The owner has not stated a licence." in text


SCRIPT = """
import sys
from lora_diffusion_jax.modes.main import main
for command in {commands}:
    status = main(command)
    print("status", status)
"""


def in_process(server, cache, commands, token="hf_good"):
    """Runs commands in one process with the server as its Hub; returns what they print."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(commands=repr([list(map(str, c)) for c in commands]))],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_is_used_from_there(workdir, data_dir, tmp_path):
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    sample = ["--mode=sample", "--seeds=0-3", "--class_id=1", "--config.sampler.num_steps=3"]
    name = "hf://me/digits"
    with hub_server.serve() as server:
        text = in_process(
            server,
            tmp_path / "cache",
            [
                ["--mode=push", f"--workdir={workdir}", "--repo=me/digits", "--private"],
                [*sample, f"--workdir={workdir}", f"--out={here}"],
                [*sample, f"--workdir={name}", f"--out={there}"],
                ["--mode=import", f"--source={name}@v1", f"--workdir={tmp_path / 'imported'}"],
                ["--mode=info", f"--workdir={name}/model.safetensors"],
                [
                    *("--mode=train", *TINY, f"--workdir={tmp_path / 'tuned'}"),
                    *config_flags(data__data_dir=data_dir, init_from=name, train__total_images=16),
                    *config_flags(train__freeze_base=True),
                ],
            ],
        )
        assert text.count("status 0") == 6, text
        assert server.private == {"me/digits": True}
        files = server.repos["me/digits"]
        assert {"README.md", "config.json", "model.safetensors", "samples.png"} <= set(files)
        assert b"--workdir=hf://me/digits" in files["README.md"]
        # Nothing but weights is fetched.
        fetched = {
            r.split("/resolve/")[1] for r in server.requests if "GET" in r and "/resolve/" in r
        }
        assert {path.partition("/")[2] for path in fetched} == {"model.safetensors"}
    with np.load(here) as one, np.load(there) as other:
        np.testing.assert_array_equal(one["images"], other["images"])
    runs = (load_workdir(path).variables for path in (workdir, tmp_path / "imported"))
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_mistakes_with_the_hub_are_one_sentence(workdir, tmp_path):
    sample = ["--mode=sample", "--seeds=0", f"--out={tmp_path / 'x.npz'}"]
    with hub_server.serve() as server:
        server.repos |= {
            "me/two": {"a.safetensors": b"", "b/c.safetensors": b"", "x.bin": b""},
            "me/none": {"pytorch_model.bin": b"", "code.py": b"raise SystemExit"},
            "me/other": {"unet.safetensors": b"\x02" + bytes(7) + b"{}"},
        }
        wrong = {
            "me/nothing": "There is no such repository",
            "me/two": "several: a.safetensors, b/c.safetensors; name one",
            "me/none": "safetensors files none",
            "me/two/d.safetensors": "no such file",
            "me/two@v9/a.safetensors": "no such revision",
            "me/two/x.bin": "only .safetensors files are fetched",
            "me": "names no file on the Hugging Face Hub",
            "me/other": "file of another program",
        }
        commands = [[*sample, f"--workdir=hf://{name}"] for name in wrong]
        commands += [
            ["--mode=push", f"--workdir={workdir}", "--repo=me/x"],
            ["--mode=push", f"--workdir={workdir}", "--repo=nobody"],
            ["--mode=push", f"--workdir={workdir}"],
            ["--mode=train", "--config=digits", "--workdir=hf://me/two"],
        ]
        words = [
            *wrong.values(),
            "hf auth login",
            "write OWNER/NAME",
            "needs --repo=OWNER/NAME, --out=FOLDER, or both",
            "needs a directory",
        ]
        text = in_process(server, tmp_path / "cache", commands, token="hf_bad")
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(commands), text
    for line, expected in zip(lines, words, strict=True):
        assert expected in line
    assert text.count("status 2") == len(commands)
    assert "Traceback" not in text


def test_no_network_and_no_package_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub cannot be reached; check the network"):
        hub.local("hf://me/x", "init_from")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"init_from=hf://me/x needs .* pip install .*hub"):
        hub.local("hf://me/x", "init_from")


def test_a_file_of_weights_is_sampled_like_its_run(folder, workdir, tmp_path):
    file = folder / "model.safetensors"
    sample = ["--mode=sample", f"--workdir={file}", "--seeds=0", f"--out={tmp_path / 'x.npz'}"]
    assert "holds ema weights; omit --weights=raw" in run(*sample, "--weights=raw", status=2)
    assert "has no steps; omit --step=6" in run(*sample, "--step=6", status=2)
    assert hub.local(folder) == str(file)
    assert load_pretrained(folder).config.data.channels == 1
    push_again = ["--mode=push", f"--workdir={workdir}", f"--out={folder}"]
    assert "is not empty" in run(*push_again, status=2)
