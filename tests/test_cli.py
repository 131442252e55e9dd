"""The command line that both programs share: config arguments, config files, exit status."""

import signal
import subprocess
import sys

import pytest

from lora_diffusion_jax import cli, default_config
from lora_diffusion_jax.errors import UserError
from tests.modes.running import start
from tests.small import ROOT


def test_config_arguments_are_taken_out_and_the_last_of_a_field_counts():
    argv = [
        "--mode=info",
        "--config",
        "digits",
        "--config.a.b=1",
        "--out",
        "x",
        "--config.a.b=(2, 3)",
    ]
    argv += ["--config.mesh.data", "-1", "--noconfig.c", "--config.d", "--step=3"]
    others, name, overrides = cli.take_config(argv)
    assert others == ["--mode=info", "--out", "x", "--step=3"]
    assert name == "digits"
    assert overrides == [
        "--config.a.b=(2, 3)",
        "--config.mesh.data=-1",
        "--config.c=false",
        "--config.d=true",
    ]


def test_overrides_are_typed_and_leave_the_original_alone():
    config = default_config.base()
    texts = {
        "class_conditional": "true",
        "dtype": "bfloat16",
        "model.channel_mult": "1,2",
        "sampler.sigma_min": "1",
        "sampler.s_max": "inf",
        "train.batch_size": "1_024",
        "data.path": "a=b",
    }
    found = cli.override(config, [f"--config.{k}={v}" for k, v in texts.items()])
    assert found.class_conditional is True
    assert found.dtype == "bfloat16"
    assert found.model.channel_mult == (1, 2)
    assert (found.sampler.sigma_min, type(found.sampler.sigma_min)) == (1.0, float)
    assert found.sampler.s_max == float("inf")
    assert found.train.batch_size == 1024
    assert found.data.path == "a=b"
    assert found.is_locked
    assert config.to_dict() == default_config.base().to_dict()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "--config.train.batchsize=3",
            ["no field train.batchsize", "Did you mean train.batch_size?"],
        ),
        (
            "--config.trian.batch_size=3",
            ["no field trian.batch_size", "mean train?", "of the config"],
        ),
        ("--config.batch_size=3", ["Did you mean", "train.batch_size"]),
        ("--config.train=3", ["train is a group of fields", "batch_size, "]),
        ("--config.train.seed.x=3", ["no field train.seed.x"]),
        ("--config.train.batch_size=many", ["of type int, such as 512"]),
        ("--config.train.batch_size=1.5", ["of type int"]),
        ("--config.train.batch_size=", ["of type int"]),
        ("--config.sampler.sigma_min=x", ["of type float, such as 0.002"]),
        ("--config.class_conditional=3", ["of type bool, such as False"]),
        ("--config.model.channel_mult=wide", ["of type tuple of int, such as (2, 2, 2)"]),
        ("--config.model.channel_mult=(1,2.5)", ["of type tuple of int, such as (2, 2, 2)"]),
        ("--config.model.channel_mult=(1,", ["of type tuple of int"]),
        ("--config.sampler.solver=euler", ["no field sampler.solver"]),
        ("--config.sampler.name=rk4", ["sampler.name is 'rk4'"]),
    ],
)
def test_an_invalid_override_is_one_sentence(argument, words):
    with pytest.raises(UserError) as error:
        cli.override(default_config.base(), [argument])
    for word in words:
        assert word in str(error.value)


def test_the_sampler_is_chosen_first_and_brings_its_own_fields():
    config = default_config.base()
    config.sampler.num_steps = 40
    texts = ["--config.sampler.solver=euler", "--config.sampler.name=ablation"]
    found = cli.override(config, texts)
    assert (found.sampler.name, found.sampler.solver) == ("ablation", "euler")
    assert found.sampler.num_steps == 40  # which both have
    with pytest.raises(UserError, match="no field sampler.s_churn"):
        cli.override(config, ["--config.sampler.name=dpmpp_2m", "--config.sampler.s_churn=7"])


def test_a_config_has_a_path_or_a_name():
    by_name, module = cli.load_config("cifar10_ncsnpp")  # it imports another config
    assert by_name.model.name == "ncsnpp"
    assert module.__doc__.startswith("CIFAR-10")
    by_path, _ = cli.load_config(str(cli.CONFIG_FOLDERS[1] / "cifar10_ncsnpp.py"))
    assert by_path.to_dict() == by_name.to_dict()
    below, module = cli.load_config("digits_rank")  # in a folder of its own, and importing another
    assert below.to_dict() == cli.load_config("digits")[0].to_dict()
    assert callable(module.sweep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("x = 1", "has no function get_config()"),
        ("def get_config():\n    return {}", "has no function get_config()"),
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError"),
        ("import nowhere", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        (
            "from lora_diffusion_jax.default_config import base\n\ndef get_config():\n"
            "    config = base().lock()\n    config.model.chanels = 3\n    return config\n",
            "line 5: AttributeError",
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        cli.load_config(str(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_the_packaged_configs():
    with pytest.raises(UserError, match="one of cifar10_edm, .*digits"):
        cli.load_config("digit")


def test_flags_are_not_abbreviated_and_switches_can_be_turned_off():
    parser = cli.Parser(prog="x")
    parser.add_switch("adapters_only", False, "")
    parser.add_process_flags()
    assert parser.parse_args(["--adapters_only"]).adapters_only is True
    assert parser.parse_args(["--adapters_only", "--noadapters_only"]).adapters_only is False
    assert parser.parse_args([]).distributed is None
    assert parser.parse_args(["--no-distributed"]).distributed is False
    with pytest.raises(UserError, match="unrecognized arguments: --adapters.*x --help"):
        parser.parse_args(["--adapters"])


def test_mistakes_and_interruptions_have_an_exit_status(capsys):
    def raising(error):
        def work(argv):
            raise error

        return work

    assert cli.run(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert cli.run(raising(UserError("What was found.")), []) == 2
    assert capsys.readouterr().err == "error: What was found.\n"
    assert cli.run(raising(KeyboardInterrupt()), []) == 130
    assert cli.run(raising(ModuleNotFoundError("No x", name="grain")), []) == 2
    assert "the package grain is not installed" in capsys.readouterr().err
    assert cli.run(raising(ZeroDivisionError("by 0\nat once")), []) == 2
    assert capsys.readouterr().err.startswith(
        "error: ZeroDivisionError: by 0. This error is unexpected"
    )
    for error in (ZeroDivisionError(), UserError("What was found.")):
        assert cli.run(raising(error), ["--debug"]) == 2
        text = capsys.readouterr().err
        assert text.startswith("Traceback")
        assert "\nerror: " in text


def test_a_signal_cuts_work_short(capsys):
    assert cli.cut_short(lambda: None) == 0

    def work():
        signal.raise_signal(signal.SIGTERM)

    assert cli.cut_short(work) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; rerun the same command" in capsys.readouterr().err


def test_the_program_says_what_it_can_do_and_exits_with_its_status():
    process = start("--mode=sample")
    assert process.communicate()[0] == "error: --mode=sample needs --workdir and --out.\n"
    assert process.returncode == 2
    process = start("--helpfull")
    text = process.communicate()[0]
    assert process.returncode == 0
    for words in ("--mode {train,sample", "--config.GROUP.FIELD", "--config.train.batch_size=512"):
        assert words in text


@pytest.mark.parametrize("program", ["main.py", "eval_fid.py"])
def test_a_core_installation_says_what_the_programs_need(program):
    script = (
        "import runpy, sys; sys.modules['ml_collections'] = None; "
        f"runpy.run_path({program!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "ml_collections is not installed; pip install" in done.stderr
