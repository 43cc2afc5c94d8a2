"""The rules of the house that a machine can check: imports run one way and never in a circle, and only the command line and what draws print."""

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
    """Every module of a package and of the rooms in it."""
    return sorted((ROOT / package).rglob("*.py"))


def all_modules() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *(path for package in ALLOWED for path in modules(package))]


def imports(path: Path) -> set[Path]:
    """The modules of revq that a file imports, anywhere in it: at the top, in functions, under TYPE_CHECKING.

    What a package's `__init__` reaches when one of its modules is imported does not count.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            home = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            assert home.is_relative_to(ROOT), f"{path.relative_to(ROOT)}: {'.' * node.level}{node.module or ''} reaches out of revq"
            found |= {module_file(home / alias.name) or module_file(home) for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            inner = [name for name in names if name.split(".")[0] == "revq"]
            assert not inner, f"{path.relative_to(ROOT)} imports {', '.join(inner)}: imports inside the package are relative"
    assert None not in found, f"{path.relative_to(ROOT)} imports a module that is not there"
    return {each for each in found if each is not None}


def module_file(place: Path) -> Path | None:
    """The file of a module or package at `place`; None where there is none, for it is a name inside a module."""
    files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def circles() -> list[list[str]]:
    """Groups of modules that import each other, straight or by way of others, largest first."""
    edges = {path: imports(path) for path in all_modules()}
    reached = {path: reach(path, edges) for path in edges}
    groups = {frozenset(other for other in reached[path] if path in reached[other]) for path in edges if path in reached[path]}
    return sorted((sorted(path.relative_to(ROOT).as_posix() for path in group) for group in groups), key=len, reverse=True)


def reach(start: Path, edges: dict[Path, set[Path]]) -> set[Path]:
    """Everything that `start` imports, directly or not; itself only where it lies in a circle."""
    found: set[Path] = set()
    waiting = [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        parts = {other.relative_to(ROOT).with_suffix("").parts[0] for other in imports(path)}
        beyond = parts - ALLOWED[package]
        assert not beyond, f"{path.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


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
    folders = {path.parent.relative_to(ROOT) for path in all_modules()}
    assert set(listed) == {".".join(("revq", *folder.parts)) for folder in folders}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_no_generic_name_is_importable_from_outside() -> None:
    code = "import importlib.util as u; print([n for n in ('cache', 'models', 'stages', 'pipeline') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"
