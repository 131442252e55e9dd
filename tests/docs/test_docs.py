"""Every command and every block of Python in the documentation is checked, and run (slow)."""

import ast
import importlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import costs
from lora_diffusion_jax import cli, default_config
from lora_diffusion_jax.diffusion.samplers import SAMPLERS
from lora_diffusion_jax.modes import evaluate, main
from tests.docs import shortened
from tests.docs.blocks import blocks_of, copy_of_the_repository, inline_code, pages, prose_of
from tests.small import ROOT, fast_compile_env

LANGUAGES = {"bash", "python", "text", "yaml"}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OTHER_FLAGS = {"--check", "--user", "--no-deps", "--help", "--signal", "--requeue", "--logdir"}
OTHER_FLAGS |= {"--xla_backend_extra_options", "--xla_force_host_platform_device_count"}
OTHER_FLAGS |= {"--xla_gpu_enable_triton_gemm"}


# What is checked without running anything.


@pytest.mark.parametrize("page", pages())
def test_code_is_fenced_and_says_what_it_is(page):
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    lines = ["", *prose_of(page).splitlines()]
    indented = [b for a, b in zip(lines, lines[1:], strict=False) if not a and b[:4] == "    "]
    assert not indented, "an indented block, which no test would find"


@pytest.mark.parametrize("page", pages())
def test_tables_have_as_many_cells_in_every_row(page):
    """Nothing else stands in them, such as a mark of where a number is to come."""
    width = 0
    for line in prose_of(page).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        is_row = line.startswith("|")
        assert not (width and line) or (is_row and cells == width), line
        width = cells if is_row else 0


def test_what_is_not_run_is_known():
    found = {}
    for page in pages():
        if reasons := [block.not_run for block in blocks_of(page) if block.not_run]:
            found[page] = reasons
    assert found == shortened.NOT_RUN


@pytest.mark.parametrize("page", pages())
def test_commands_have_the_flags_and_fields_they_name(page):
    runs = {}  # workdir -> config, of the commands so far
    for block in blocks_of(page):
        if block.language == "bash":
            for words in block.commands():
                check_command(words, runs, known=not block.not_run)
        elif block.language == "yaml" and " main.py " in block.text:  # of Kubernetes
            rest = re.sub(r"\$\w+", "0", block.text.partition(" main.py ")[2]).split()
            check_main(list(itertools.takewhile(lambda w: w.startswith("--"), rest)), runs)


def test_the_commands_of_help_are_right():
    for text, program in ((main.HELP, "main.py"), (evaluate.HELP, "eval_fid.py")):
        commands = [shlex.split(x) for x in text.splitlines() if x.startswith("  %(prog)s")]
        assert len(commands) >= 5
        for words in commands:
            check_command(["python", program, *words[1:]], {}, known=True)
    for mode in main.MODES:
        assert re.search(rf"^  {mode} +\w", main.HELP, re.M), mode
    for verb in evaluate.VERBS:
        assert re.search(rf"^  {verb} +\w", evaluate.HELP, re.M), verb


def check_command(words: list[str], runs: dict[str, ConfigDict], *, known: bool) -> None:
    """Fails if a command is not one, as far as can be told without running it.

    Args:
        words: of the command.
        runs: workdir -> config; a training adds its own.
        known: whether it must be a program of ours.
    """
    for word in words[1:]:  # of gcloud: a command in quotes
        for inner in re.split(r"&&|\n|[>&]", word) if " main.py " in word else []:
            check_command(shlex.split(inner) or ["true"], runs, known=False)
    if "main.py" in words[2:]:  # behind srun, nohup or env
        words = words[words.index("main.py") - 1 :]
    words = list(itertools.takewhile(lambda word: word not in (">", "|", "&"), words))
    program, *rest = (re.sub(r"\$\{?\w+\}?", "0", word) for word in words)  # shell variables
    if program.endswith("python") and rest[0] == "-m":
        module = rest[1]
        assert module in ("venv", "pytest") or (ROOT / f"{module.replace('.', '/')}.py").exists()
    elif program.endswith("python") and rest[0] == "main.py":
        check_main(rest[1:], runs)
    elif program.endswith("python") and rest[0] == "eval_fid.py":
        others, name, overrides = cli.take_config(rest[1:])
        args = evaluate.build_parser().parse_args(others)
        assert name is None
        if overrides:
            cli.override(runs.get(args.workdir, default_config.base()), overrides)
    elif program.endswith("python"):
        assert (ROOT / rest[0]).exists()
    elif program == "make":
        assert re.search(rf"^{rest[-1]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert not known, f"{program} is no program of ours"
    extras = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"])


def check_main(argv: list[str], runs: dict[str, ConfigDict]) -> None:
    others, name, overrides = cli.take_config(argv)
    args = main.build_parser().parse_args(others)
    assert all(getattr(args, flag) for flag in main.MODES[args.mode].needs)
    if name is not None:
        config = cli.load_config(name)[0]
    else:
        config = runs.get(args.workdir, default_config.base())
    config = cli.override(config, overrides)
    if args.mode == "train":
        runs[args.workdir] = config
    if args.mode == "sweep" and args.sweep:
        fields = [part.partition("=")[0] for part in args.sweep.split(";")]
        assert set(fields) <= set(flatten_dict(config.to_dict(), sep="."))


@pytest.mark.parametrize("page", pages())
def test_flags_and_fields_in_the_text_exist(page):
    parsers = [main.build_parser(), evaluate.build_parser()]
    verbs = parsers[1]._subparsers._group_actions[0].choices.values()
    flags = {o for parser in (*parsers, *verbs) for o in parser._option_string_actions}
    sources = [p.read_text() for p in (ROOT / "benchmarks").glob("*.py")]
    flags |= {f for text in sources for f in re.findall(r'"(--\w+)"', text)} | OTHER_FLAGS
    base = default_config.base().to_dict()
    fields = set(flatten_dict(base, sep="."))
    fields |= {f"sampler.{field}" for name in SAMPLERS for field in default_config.sampler(name)}
    for code in inline_code(page):
        for flag in re.findall(r"(?<![\w-])--[a-z]\w*", code):
            assert flag in flags or flag == "--config", f"`{code}`"
        groups = "|".join(group for group in base if isinstance(base[group], dict))
        for field in re.findall(rf"^(?:--config\.)?((?:{groups})\.[a-z_]\w*)(?:=.*)?$", code):
            files = re.fullmatch(r"\w+\.(py|html|json|npz|png|zip|jsonl|safetensors|txt)", field)
            assert field in fields or files or is_exported(field), f"`{code}`"


def is_exported(name: str) -> bool:
    """Whether a part of the package exports a name: lora.attach."""
    part, _, exported = name.partition(".")
    package = Path(cli.__file__).parent
    return (package / part).is_dir() and hasattr(
        importlib.import_module(f"{package.name}.{part}"), exported
    )


@pytest.mark.parametrize("page", pages())
def test_python_is_python_and_its_imports_exist(page):
    for block in blocks_of(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                for name in missing:  # a submodule
                    importlib.import_module(f"{node.module}.{name}")


def test_the_sentences_of_errors_are_real():
    """The first columns of the tables on troubleshooting quote what the program says; … leaves a part out."""
    said = set()
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    page = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| (.+?) \|", page, re.M)
    quoted = [code for cell in cells for code in re.findall(r"`([^`]*(?: |…)[^`]*)`", cell)]
    assert len(quoted) > 25
    for text in quoted:
        for part in filter(None, (part.strip(" .,()") for part in text.split("…"))):
            if not part.startswith("--mode"):
                assert any(part in sentence for sentence in said), f"{text}: {part!r}"


def test_links_lead_somewhere():
    for page in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
            path, _, anchor = target.partition("#")
            if "://" in target or not path:
                continue
            found = (ROOT / page).parent / path
            assert found.exists(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{page}: {target}"


@pytest.mark.slow
def test_the_costs_of_the_paper_are_those_that_are_computed():
    assert costs.tables().strip() in (ROOT / "docs/reproducing.md").read_text()


# What is run, page by page, in a copy of the repository.


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in pages() if p not in ("CONTRIBUTING.md",)])
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    """As a stranger would type it, but for the replacements of `shortened`."""
    todo = [block for block in blocks_of(page) if is_run(block)]
    if not todo:
        pytest.skip("nothing to run")
    copy = prepare(tmp_path / "copy")
    if any(".pkl" in block.text for block in todo):
        write_checkpoints(copy)
    env = fast_compile_env(PYTHONPATH=str(copy), HOME=str(tmp_path), TFDS_DATA_DIR=str(tmp_path))
    for block in todo:
        text = block.text
        for old, new in shortened.TEXT.items():
            text = text.replace(old, new)
        python = [sys.executable, "-c", text]
        command = python if block.language == "python" else ["bash", "-euc", text]
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}, line {block.line}:\n{done.stdout}{done.stderr}"


def is_run(block) -> bool:
    if block.language == "python":
        argument, test = shortened.WITH_ARGUMENTS.get(block.page, ("", ""))
        if argument and argument in block.text:
            assert (ROOT / test).exists()
            return False
        return block.page not in shortened.ELSEWHERE
    return block.language == "bash" and not block.not_run


def test_the_blocks_that_other_tests_run_are_named_there():
    for page, test in shortened.ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / test).read_text()
    for page, (argument, test) in shortened.WITH_ARGUMENTS.items():
        assert [b for b in blocks_of(page) if argument in b.text]
        assert page.rpartition("/")[2] in (ROOT / test).read_text()


def prepare(copy: Path) -> Path:
    """A copy of the repository with short configs, stand-ins for downloads, and a finished .venv."""
    copy_of_the_repository(copy)
    for name, fields in shortened.CONFIGS.items():
        if fields:
            shorten(copy / "configs" / f"{name}.py", fields)
    write_pictures(copy / "cifar10.zip", CIFAR10, (32, 32, 3))
    write_pictures(copy / "images.zip", ("cat", "dog"), (16, 16, 3))
    write_pictures(copy / "eleven.zip", map(str, range(11)), (8, 8))
    rng = np.random.default_rng(0)
    np.savez(copy / "latents.npz", images=rng.normal(0, 4.5, (12, 16, 16, 4)).astype(np.float32))
    write_parquet(copy / "parquet" / "train.parquet")
    (copy / ".venv/bin").mkdir(parents=True)
    script = copy / ".venv/bin/python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    for name in ("installed", "installed-test", "installed-docs"):
        (copy / ".venv" / name).touch()  # make finds nothing to install
    return copy


def write_parquet(path: Path) -> None:
    """Twelve PNG images of 16x16 in three classes, as Hugging Face data sets hold them."""
    images = [{"bytes": png(k), "path": f"{k}.png"} for k in range(12)]
    path.parent.mkdir()
    table = pyarrow.table({"image": images, "label": [k % 3 for k in range(12)]})
    pyarrow.parquet.write_table(table, path)


def png(seed: int) -> bytes:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def shorten(path: Path, fields: dict) -> None:
    """Has a config file's get_config() set fields."""
    values = "".join(f"    config.{field} = {value!r}\n" for field, value in fields.items())
    text = f"\n\n_full = get_config\n\n\ndef get_config():\n    config = _full()\n{values}    return config\n"
    path.write_text(path.read_text() + text)


def write_pictures(path: Path, classes, shape: tuple[int, ...]) -> None:
    """A ZIP of noise, two images a class, each class in its folder."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name in classes:
            for k in range(2):
                with archive.open(f"{name}/{k}.png", "w") as file:
                    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, "PNG")


def write_checkpoints(copy: Path) -> None:
    """Small networks under the names of official files, which are recognised by their content."""
    script = """
from pathlib import Path
import jax
from lora_diffusion_jax import cli, interop
from lora_diffusion_jax.factory.networks import build_denoiser, variable_shapes
from tests.interop import openai

def network(name):
    config = cli.override(cli.load_config(f"configs/{name}.py")[0], ["--config.lora.mode=baseline"])
    shapes = variable_shapes(config, build_denoiser(config))
    return config, jax.tree.map(lambda s: 0.02 * jax.random.normal(jax.random.key(0), s.shape), shapes)

config, variables = network("cifar10_edm")
interop.export_network("official.safetensors", variables, config, weights="ema")
config, variables = network("cifar10_iddpm")
openai.write(Path("cifar10_uncond_50M_500K.pt"), interop.to_state_dict(variables, config))
"""
    env = fast_compile_env(PYTHONPATH=f"{copy}:{ROOT}")
    subprocess.run([sys.executable, "-c", script], cwd=copy, env=env, check=True)
    shutil.move(copy / "official.safetensors", copy / "edm-cifar10-32x32-cond-vp.pkl")
