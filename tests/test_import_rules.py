"""Who may import whom (docs/design.md), read from the source: every import counts, lazy ones too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_diffusion_jax"
SHARED = {
    "errors",
    "array_types",
    "keys",
    "paths",
    "files",
    "untrusted",
    "npz",
    "remote",
}  # for everyone
BELOW_FACTORY = {
    *("processes", "lora", "models", "diffusion", "data", "readers"),
    *("default_config", "generate", "outputs", "training", "evaluation"),
}
# Part -> parts of the package that it may import, besides itself and SHARED; from the bottom up.
ALLOWED = {
    "errors": set(),
    "array_types": set(),
    "keys": set(),
    "paths": set(),
    "files": set(),
    "untrusted": {"files"},
    "npz": {"files", "untrusted"},
    "remote": {"files"},
    "grids": set(),
    "processes": set(),
    "lora": set(),
    "host": set(),
    "models": {"host"},
    "diffusion": set(),
    "readers": set(),
    "memory": {"host"},
    "data": {"processes", "host"},
    "default_config": {"diffusion"},
    "generate": {"diffusion", "processes"},
    "outputs": {"generate", "data"},
    "training": {"processes"},
    "evaluation": {"readers", "processes"},
    "factory": BELOW_FACTORY - {"outputs", "evaluation", "readers"},
    "interop": {"factory", "readers", "default_config", "lora", "models", "diffusion"},
    "analysis": {"lora", "diffusion", "factory"},
    "compile_cache": {"host"},
    "xla_options": {"host"},
    "cli": {"compile_cache", "processes", "default_config"},
    "pages": {"training", "evaluation"},
    "sweeps": {"grids", "cli", "processes", "training", "evaluation"},
    "modes": {
        *BELOW_FACTORY,
        "factory",
        "interop",
        "analysis",
        "compile_cache",
        "host",
        "memory",
        "xla_options",
        "cli",
        "grids",
        "pages",
        "sweeps",
    },
}
# Part -> the third-party libraries that it may import: these two serve models and files of anybody.
LIBRARIES = {
    "lora": {"jax", "flax", "numpy", "jaxtyping"},
    "readers": {"numpy", "ml_dtypes", "safetensors"},
}
# Library -> the only parts that may import it.
CONFINED = {
    "ml_collections": {"default_config", "factory", "interop", "cli", "sweeps", "modes"},
    "tensorflow_datasets": {"data"},
    "datasets": {"data"},
    "wandb": {"training"},
    "huggingface_hub": {"interop"},
    "orbax": {"training"},
    "fsspec": {"remote"},
    "safetensors": {"readers", "interop", "evaluation"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_of(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = [name.split(".") for name in imports_of(path)]
    return {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}


def files_of(part: str) -> list[Path]:
    folder = ROOT / PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_the_table_covers_every_part_from_the_bottom_up():
    paths = {p for p in (ROOT / PACKAGE).iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert {p.stem for p in paths} - {"__init__"} == set(ALLOWED)
    for index, allowed in enumerate(ALLOWED.values()):
        assert allowed <= set(list(ALLOWED)[:index])  # so no two parts can need one another


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_lies_below_them(part):
    shared = {"errors"} if part in SHARED else SHARED
    for path in files_of(part):
        above = parts_of(path) - ALLOWED[part] - shared - {part}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_only_the_readers_know_how_files_are_read():
    """The pickle machine and its words stay inside: others use the readers' two entrances."""
    entrances = {f"{PACKAGE}.readers.{name}" for name in ("pickles", "safetensors")}
    for part in set(ALLOWED) - {"readers"}:
        for path in files_of(part):
            used = {n.rpartition(".")[0] for n in imports_of(path) if f"{PACKAGE}.readers" in n}
            assert used <= entrances, path.relative_to(ROOT)


@pytest.mark.parametrize("part", LIBRARIES)
def test_parts_for_use_elsewhere_need_few_libraries(part):
    for path in files_of(part):
        roots = {name.split(".")[0] for name in imports_of(path)}
        unwanted = roots - LIBRARIES[part] - {PACKAGE} - sys.stdlib_module_names
        assert not unwanted, f"{path.relative_to(ROOT)} imports {unwanted}"


def test_heavy_libraries_stay_where_they_belong():
    for part in ALLOWED:
        for path in files_of(part):
            roots = {name.split(".")[0] for name in imports_of(path)}
            misplaced = {lib for lib in roots & set(CONFINED) if part not in CONFINED[lib]}
            misplaced |= roots & {"tensorflow", "torch", "torchvision"}
            assert not misplaced, f"{path.relative_to(ROOT)} imports {misplaced}"


def test_tfds_is_imported_only_to_open_its_data_sets():
    code = "import sys, lora_diffusion_jax.modes.sample, lora_diffusion_jax.data.sources as _; "
    code += "sys.exit('tensorflow_datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_programs_call_modes_and_configs_know_the_base_alone():
    for name in ("main.py", "eval_fid.py"):
        assert parts_of(ROOT / name) == {"modes"}
    for path in (ROOT / "configs").rglob("*.py"):
        assert parts_of(path) <= {"default_config", "grids"}, path.name
        assert {name.split(".")[0] for name in imports_of(path)} <= {
            *("ml_collections", "configs", PACKAGE)
        }
