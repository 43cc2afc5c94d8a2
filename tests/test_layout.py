"""The rules of the house that a machine can check: imports run one way, and only the command line and what draws print."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import revq

ROOT = Path(revq.__file__).parent
ALLOWED = {
    "cache": {"cache", "errors", "files", "lock"},
    "models": {"models", "errors", "files", "lock"},
    "stages": {"stages", "models", "cache", "errors", "files", "lock"},
    "pipeline": {"pipeline", "stages", "models", "cache", "errors", "files", "lock"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    """Names of revq's packages and root modules that a file imports, by `from ..x.y import z` or `from . import z`."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            parts |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "revq" for name in names), f"{path.name}: imports inside the package are relative"
    return parts


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        beyond = imported_parts(path) - ALLOWED[package] - {"__version__"}
        assert not beyond, f"{package}/{path.name} imports {', '.join(sorted(beyond))}"


PRINTERS = {"pipeline/progress.py", "pipeline/summaries.py", "pipeline/exit_codes.py"}


def test_only_the_command_line_and_what_draws_print() -> None:
    for package in ALLOWED:
        for path in modules(package):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
            assert not prints or path.relative_to(ROOT).as_posix() in PRINTERS, f"{package}/{path.name} prints"


def test_a_folder_is_claimed_only_where_it_is_held() -> None:
    """`stages/output_folder.py` is the one place that may, so that no command forgets the lock."""
    callers = {path.name for package in ALLOWED for path in modules(package) if "claim_output" in path.read_text()}
    assert callers == {"output_folder.py"}


def test_every_package_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {f"revq.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(listed) == there | {"revq"}


def test_no_generic_name_is_importable_from_outside() -> None:
    code = "import importlib.util as u; print([n for n in ('cache', 'models', 'stages', 'pipeline') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"
