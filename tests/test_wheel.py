"""The wheel, installed where there are no development packages: it holds everything, and the demo's stages run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PARTS = ("cache", "models", "pipeline", "stages", "pyproject.toml", "README.md", "LICENSE", "py.typed")
# The demo's own settings, but for fewer of everything.
SMALLER = {
    "image_size = 128": "image_size = 64\nlimit = 48",
    "views = 3": "views = 1",
    "calibration_samples = 256": "calibration_samples = 16",
    "tokens = 256": "tokens = 64",
    "codes = 256": "codes = 16",
    "steps = 500": "steps = 4",
    "evaluations = 5": "evaluations = 1",
    "tolerance_images = 16": "tolerance_images = 2\nlimit = 8",
}
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for setuptools leaves folders behind and takes up what an earlier build left."""
    copy, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for path in (*(REPOSITORY / part for part in PARTS), *REPOSITORY.glob("*.py")):
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy)
    return next(out.glob("revq-*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Program:
    """Run a program of an environment that has the wheel, what it requires, and nothing else; in a folder of its own."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    pip("--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    revq = next(Distribution.discover(name="revq", path=[str(site)]))
    for needed in required(revq, extra="cpu"):
        link(needed, site)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.getbasetemp(), env=environment, timeout=200, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def required(root: Distribution, extra: str) -> Iterable[Distribution]:
    """Everything that a distribution with an extra requires on this machine, at any depth, as it is in the environment of the tests."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(root, extra)]
    while waiting:
        parent, extra = waiting.pop()
        for requirement in map(Requirement, parent.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            found[name] = distribution(name)
            new = {(name, each) for each in ("", *requirement.extras)} - seen
            seen |= new
            waiting += [(found[name], each) for _, each in new]
    return found.values()


def link(needed: Distribution, site: Path) -> None:
    """Give a distribution's files a second place, instead of downloading gigabytes again."""
    for file in needed.files or []:
        if ".." in file.parts:  # a script outside site-packages
            continue
        place = site / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(Path(str(file.locate())))


def test_the_wheel_holds_every_module_template_preset_and_the_embedded_vae(wheel: Path) -> None:
    inside = {name.removeprefix("revq/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("revq/")}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "cache", "models", "pipeline", "stages", "py.typed"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    outside = ("tests/", "benchmarks/", "scripts/", "docs/")
    there = {name for name in tracked.stdout.splitlines() if not name.startswith(outside) and (REPOSITORY / name).is_file()}
    assert inside == there
    assert {"pipeline/assets/report.html.j2", "pipeline/presets/demo.toml", "models/revq-tiny-f8c8/diffusion_pytorch_model.safetensors"} <= inside


def test_no_development_package_is_in_the_environment(installed: Program) -> None:
    code = "import importlib.util as u; print([n for n in ('pytest', 'hypothesis', 'mypy', 'moto', 'sklearn') if u.find_spec(n)])"
    assert installed("python", "-c", code).stdout.strip() == "[]"
    assert "environment" in installed("python", "-c", "import revq; print(revq.__file__)").stdout


def test_the_help_page_comes_up(installed: Program) -> None:
    assert "encode-latents" in installed("revq", "--help").stdout


def test_the_demo_with_fewer_steps_runs_to_its_report(installed: Program, tmp_path: Path) -> None:
    preset = (REPOSITORY / "pipeline" / "presets" / "demo.toml").read_text()
    for setting, smaller in SMALLER.items():
        assert setting in preset
        preset = preset.replace(setting, smaller)
    (tmp_path / "small.toml").write_text(preset)
    installed("revq", "run", tmp_path / "small.toml", "--out", tmp_path / "out")
    made = {path.name for path in (tmp_path / "out" / "evaluation").iterdir()}
    assert {"report.html", "report.md", "metrics.json", "tolerance.png", "codebooks.png"} <= made
