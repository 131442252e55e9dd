"""From a sweep's text or function to runs with names, before anything starts."""

import math
import re
import types
from pathlib import Path

import pytest

from lora_diffusion_jax import cli
from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.grids import over, product
from lora_diffusion_jax.sweeps import plan


def planned(sweep, overrides=(), named=None, config=None):
    config = config or base()
    grid = plan.parse_grid(sweep, config) if isinstance(sweep, str) else sweep
    return plan.make_plan(config, overrides, grid, named or {}, lambda config: config)


def names(*arguments, **settings):
    return [run.name for run in planned(*arguments, **settings)]


def test_the_text_of_a_sweep_is_a_product_of_typed_values():
    runs = planned("lora.rank=1,2;lora.mode=baseline,only_lora; train.seed=0-2,7")
    assert len(runs) == 2 * 2 * 4
    assert [run.config.train.seed for run in runs[:4]] == [0, 1, 2, 7]
    assert runs[-1].changes == {"lora.rank": 2, "lora.mode": "only_lora", "train.seed": 7}
    assert runs[-1].name == "rank=2,mode=only_lora,seed=7"
    assert len({run.name for run in runs}) == len(runs)


def test_brackets_and_quotes_keep_commas_and_semicolons():
    runs = planned("model.channel_mult=(1,2),(1,2,2);data.path='a;b',c,''")
    assert [run.config.model.channel_mult for run in runs[::3]] == [(1, 2), (1, 2, 2)]
    assert [run.config.data.path for run in runs[:3]] == ["a;b", "c", ""]


def test_the_command_of_a_run_gives_its_config_again():
    """What the run is started with, read as a command line is read."""
    base_overrides = ["--config.train.batch_size=8"]
    grid = product(
        over("sampler.name", ["ablation"]),
        over("sampler.solver", ["euler", "heun"]),
        over("model.channel_mult", [[1, 2], (3,)]),
        over("sampler.sigma_min", [1, 0.5]),
        over("class_conditional", [True]),
        over("data.class_names", [("a b", "c,d")]),
    )
    for run in planned(grid, base_overrides):
        command = plan.command("digits", Path("/sweeps/a b"), run)
        others, name, overrides = cli.take_config(command)
        assert (name, others[-2:]) == (
            "digits",
            ["--mode=train", f"--workdir=/sweeps/a b/{run.name}"],
        )
        assert cli.override(base(), overrides).to_dict() == run.config.to_dict()
        assert run.config.train.batch_size == 8


def test_names_are_short_unique_and_safe():
    assert names([{}]) == ["base"]
    assert names("model.name=adm;precond.name=vp") == ["model.name=adm,precond.name=vp"]
    assert names("train.learning_rate=1e-3,0.01") == ["learning_rate=0.001", "learning_rate=0.01"]
    hostile = ["../../x", "a/b", "a;b", "x" * 300, "a b", "a\nb", "ä"]
    found = names(over("data.path", hostile))
    assert len(set(found)) == len(hostile)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9._+=,-]{1,130}", name)
        assert name.startswith("path=")
    upper = names(over("data.split", ["Train", "train"]))  # one name where case is ignored
    assert len({name.casefold() for name in upper}) == 2


def test_a_run_keeps_its_name_when_the_sweep_grows():
    first = planned("lora.rank=1,2")
    named = {f"old-{run.name}": run.changes for run in first}
    assert names("lora.rank=2,4,1", named=named) == ["old-rank=2", "rank=4", "old-rank=1"]
    named = {"x": {"train.seed": 1, "lora.rank": 2}}
    assert names("lora.rank=2;train.seed=1", named=named) == ["x"]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("lora.rang=1", "no field lora.rang. Did you mean lora.rank"),
        ("lora=1", "lora is a group of fields"),
        ("lora.rank=1,many", "lora.rank=many: expected a value of type int"),
        ("lora.rank=1.5", "expected a value of type int"),
        ("lora.rank=1,1", "same config twice"),
        ("lora.rank=4", None),
        ("lora.rank=1;lora.rank=2", "gives lora.rank twice"),
        ("lora.rank", "no list of values"),
        ("lora.rank=", "no list of values"),
        (" ; ", "--sweep is empty"),
        ("model.channel_mult=(1,2", "never closed"),
        ("train.seed=5-1", "no range"),
        ("train.seed=0-99999999", "no range"),
        ("train.seed=0-9999;lora.rank=1,2", "20,000 runs"),
        ("train.batch_size=8,16", "train.batch_size is both swept over and overridden"),
        ([{}, {"lora.rank": 4}], "same config twice"),
        ([{"lora.rank": "4"}], "sets lora.rank to 4; expected a value of type int"),
        ([{"lora.rank": True}], "lora.rank"),
        ([{"train.learning_rate": 1}], None),
        ([{"lora.rank": None}], "leave lora.rank out"),
        ([{"data.path": 3}], "sets data.path to 3; expected a value of type str"),
        ([{"sampler.s_max": math.inf}, {"sampler.s_max": 2.0}], None),
        ([], "The sweep has 0 runs"),
    ],
)
def test_mistakes_are_found_before_anything_starts(sweep, words):
    if words is None:
        planned(sweep, ["--config.train.batch_size=8"])
        return
    with pytest.raises(UserError, match=re.escape(words)) as error:
        planned(sweep, ["--config.train.batch_size=8"])
    assert "\n" not in str(error.value)


def module(function):
    found = types.ModuleType("mine")
    found.__file__ = __file__
    if function:
        found.sweep = function
    return found


def test_a_config_file_adds_runs_one_by_one_or_as_grids():
    def sweep(add):
        add({"lora.mode": "baseline"})
        add(over("lora.rank", [1, 2]))

    assert names(plan.grid_of(module(sweep))) == ["mode=baseline", "rank=1", "rank=2"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (None, "has no function sweep"),
        (lambda add: add([1]), "TypeError: add got 1"),
        (lambda add: add({1: 2}), "TypeError: add got"),
        (lambda add: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_sweep_function_that_fails_is_named(function, words):
    with pytest.raises(UserError, match=words) as error:
        plan.grid_of(module(function))
    assert __file__ in str(error.value)
