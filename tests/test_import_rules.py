"""Who may import whom (docs/design.md): the arrows of the package, read from its source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_diffusion_jax"
SHARED = {"array_types", "errors", "processes"}
ALLOWED = {  # part -> parts of the package it may import at module level, besides itself and SHARED
    "models": set(),
    "lora": set(),
    "diffusion": set(),
    "data": set(),
    "interop": set(),
    "training": set(),
    "analysis": {"lora"},
    "evaluation": {"interop"},
    "generate": {"diffusion"},
    "outputs": {"generate"},
    "default_config": {"diffusion"},
    "factory": {
        "models",
        "lora",
        "diffusion",
        "data",
        "interop",
        "training",
        "generate",
        "default_config",
    },
}
# Libraries that only these parts may import.
CONFINED = {
    "ml_collections": {"default_config", "factory", "experiment", "modes"},
    "tensorflow_datasets": {"data"},
    "orbax": {"training"},
    "safetensors": {"interop", "evaluation"},
}


def imports_of(path: Path, *, top_only: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else None


def files() -> list[tuple[str, Path]]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [(path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py"), path) for path in paths]


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_only_what_lies_below_them(part):
    for owner, path in files():
        if owner == part:
            used = {part_of(name) for name in imports_of(path)} - {None, part} - SHARED
            known = used & (set(ALLOWED) | {"experiment"})
            assert known <= ALLOWED[part], (
                f"{path.relative_to(ROOT)} imports {known - ALLOWED[part]}"
            )


@pytest.mark.parametrize("library", CONFINED)
def test_heavy_libraries_stay_where_they_belong(library):
    for owner, path in files():
        if any(name.split(".")[0] == library for name in imports_of(path, top_only=False)):
            assert owner in CONFINED[library], f"{path.relative_to(ROOT)} imports {library}"


def test_nothing_imports_tensorflow_or_torch():
    for _, path in files():
        roots = {name.split(".")[0] for name in imports_of(path, top_only=False)}
        assert not roots & {"tensorflow", "torch", "torchvision"}, path


def test_configs_import_only_the_base_config():
    allowed = {"ml_collections", "configs", f"{PACKAGE}"}
    for path in (ROOT / "configs").glob("*.py"):
        names = imports_of(path, top_only=False)
        assert {name.split(".")[0] for name in names} <= allowed
        assert {part_of(n) for n in names if n.startswith(PACKAGE)} <= {"default_config"}
