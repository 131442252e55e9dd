"""Networks out and in again, and adapters trained on a frozen base."""

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from lora_diffusion_jax import cli, lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.pretrained import load_workdir
from lora_diffusion_jax.modes.checkpoints import import_checkpoint
from lora_diffusion_jax.modes.train import initial_state
from lora_diffusion_jax.training import checkpoint
from lora_diffusion_jax.training import workdir as workdir_files
from tests.factory.test_pretrained import filled
from tests.interop import openai
from tests.modes.running import TINY, run, train
from tests.small import config_flags


def test_export_and_import_keep_every_bit(workdir, tmp_path):
    """workdir -> safetensors -> workdir: the same samples; adapters alone go with their base."""
    out = tmp_path / "net.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={out}")
    run("--mode=import", f"--source={out}", f"--workdir={tmp_path / 'again'}")
    small = tmp_path / "adapters.safetensors"
    run("--mode=export", f"--workdir={workdir}", f"--out={small}", "--adapters_only")
    assert small.stat().st_size < out.stat().st_size
    joined = f"--workdir={tmp_path / 'joined'}"
    run("--mode=import", f"--source={small}", f"--base={out}", joined)
    images = []
    for name in (workdir, tmp_path / "again", tmp_path / "joined"):
        file = tmp_path / "x.npz"
        steps = "--config.sampler.num_steps=3"
        run("--mode=sample", f"--workdir={name}", "--seeds=0-7", f"--out={file}", steps)
        images.append(np.load(file)["images"])
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[0])


@pytest.mark.slow
def test_adapters_train_alone_on_an_exported_base(workdir, data_dir, tmp_path):
    """A baseline run, then its base frozen under adapters: the base does not move."""
    base = tmp_path / "base"
    train(base, data_dir, 32, "--config.lora.mode=baseline")
    tuned = tmp_path / "tuned"
    freeze = "--config.train.freeze_base=True"
    text = train(tuned, data_dir, 32, freeze, f"--config.init_from={base}")
    counts = [int(n.replace(",", "")) for n in re.findall(r" parameters: ([\d,]+)", text)]
    assert counts[0] < counts[1]  # trained, frozen
    before = load_workdir(base).variables["params"]
    after = lora.split(load_workdir(tuned).variables["params"])[0]
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("name", ["source", "base"])
def test_a_path_that_is_no_network_is_named(tmp_path, name):
    (tmp_path / "plain").mkdir()
    (tmp_path / "good").touch()
    for path, words in (("nope", "does not exist; give a .pkl"), ("plain", "no run; give a .pkl")):
        given = {"source": tmp_path / "good", name: tmp_path / path}
        with pytest.raises(UserError, match=f"^--{name}=.*/{path} .*{words}"):
            import_checkpoint(directory=tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


# The network of the state dict in `openai.case("shift")`.
IMPROVED = config_flags(
    class_conditional=False,
    model__name="improved",
    model__channels=32,
    model__num_heads=1,
    model__use_scale_shift_norm=False,
    model__learn_sigma=False,
    precond__name="iddpm",
    lora__adapter="time",
)


def test_a_state_dict_of_openai_is_imported_and_adapted(data_dir, tmp_path):
    source = openai.write(tmp_path / "net.pt", openai.case("shift").state_dict)
    official = tmp_path / "official"
    text = run("--mode=import", *TINY, *IMPROVED, f"--source={source}", f"--workdir={official}")
    imported = load_workdir(official)
    assert f"{lora.count(imported.variables['params']):,} parameters" in text
    assert imported.config.lora.mode == "baseline"
    out = tmp_path / "net.safetensors"
    run("--mode=export", f"--workdir={official}", f"--out={out}")
    found = load_file(out)
    for name, value in openai.case("shift").state_dict.items():
        np.testing.assert_array_equal(found[name], value)
    start = [f"--config.init_from={source}", "--config.train.freeze_base=True"]
    config = cli.override(cli.load_config("digits")[0], [*TINY[1:], *IMPROVED, *start])
    state = initial_state(config, build_denoiser(config), tmp_path / "tuned")
    jax.tree.map(np.testing.assert_array_equal, state.frozen, imported.variables["params"])
    assert not lora.count(lora.split(state.params)[0])
    assert lora.count(state.params)


def test_a_new_class_is_one_new_pair(data_dir, tmp_path):
    """A network of nine digits learns the tenth: its pairs move, and nothing else does."""
    config = cli.override(
        cli.load_config("digits")[0],
        [*TINY[1:], *config_flags(data__num_classes=9, lora__adapter="class")],
    )
    nine = tmp_path / "nine"
    params = filled(config, 0.1)["params"]
    weights = checkpoint.SavedWeights(params=params, frozen={}, buffers={}, ema=params)
    with workdir_files.open_workdir(nine, config.to_dict()) as path:
        checkpoint.save_weights(path, weights)
    ten = tmp_path / "ten"
    changes = {"lora__adapter": "class", "train__freeze_base": True, "train__new_classes": 1}
    text = train(ten, data_dir, 48, *config_flags(init_from=nine, **changes))
    assert f"init_from={nine}: added fresh pairs for class 9 at " in text
    after = load_workdir(ten, weights="raw").variables["params"]
    before, after = (flatten_dict(tree, sep="/") for tree in (params, after))
    assert before.keys() == after.keys()
    for name, value in after.items():
        old = before[name]
        if name.endswith("lora/up/kernel"):
            assert np.any(value[len(old) :])
        elif name.endswith("map/label/kernel"):
            assert not np.any(value[len(old) :])
            old = old * np.float32(0.9**0.5)  # the network multiplies labels by sqrt(classes)
        kept = value[tuple(map(slice, old.shape))]
        np.testing.assert_array_equal(kept, old)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--mode=import", "--source={run}/config.json", "--workdir={new}"],
            ".pt state dict, a .safe",
        ),
        (["--mode=import", "--source=x", "--workdir={run}"], "already holds a run"),
        (["--mode=import", "--source=x"], "--mode=import needs --workdir"),
        (["--mode=import", "--source=x", "--workdir={new}", "--config.dtype=x"], "no config"),
        (["--mode=export", "--workdir={run}"], "--mode=export needs --out"),
    ],
)
def test_mistakes_are_plain_errors(workdir, tmp_path, arguments, words):
    arguments = [a.format(run=workdir, new=tmp_path / "new") for a in arguments]
    assert words in run(*arguments, status=2)
    assert not (tmp_path / "new").exists()
