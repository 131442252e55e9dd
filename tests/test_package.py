"""The wheel: what an installation outside of the checkout finds."""

import subprocess
import sys
import zipfile

import lora_diffusion_jax
from tests.small import ROOT


def test_the_wheel_brings_the_package_the_configs_and_the_programs(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
    ]
    subprocess.run([*build, tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"lora_diffusion_jax-{lora_diffusion_jax.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        programs = next(name for name in names if name.endswith("entry_points.txt"))
        programs = archive.read(programs).decode()
    package = ROOT / "lora_diffusion_jax"
    files = [
        path for ending in ("py", "html", "css", "js") for path in package.rglob(f"*.{ending}")
    ]
    sources = [path.relative_to(ROOT).as_posix() for path in files]
    assert {*sources, "lora_diffusion_jax/py.typed"} <= names
    configs = {
        f"lora_diffusion_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")
    }
    assert configs
    assert configs <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    for program in ("lora-diffusion", "lora-diffusion-fid"):
        module, name = programs.split(f"{program} = ")[1].splitlines()[0].split(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
