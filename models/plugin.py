"""`FILE.py:FACTORY`: objects that a file of the user's makes, for what no library knows: a VAE, a network to judge by."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import RevqError, one_line
from ..files import local_path, sha256_file


def make_from_file(
    spec: str, *, what: str, option: str, error: Callable[[str], RevqError], missing: Callable[[str], RevqError]
) -> tuple[Any, Path, str]:
    """Run the file of `FILE.py:FACTORY`, call the factory; returns what it made, the file and its SHA-256.

    Args:
        spec: as the user gave it.
        what: what it is to be, for messages.
        option: the option that took it, for messages.
        error: makes the error of a factory that fails.
        missing: makes the error of a file that is not there.
    """
    file_name, _, factory_name = spec.rpartition(":")
    path = local_path(file_name)
    if not (file_name and os.path.isfile(path)):  # Path.is_file raises OSError where the name is too long
        raise missing(f"{what} {path if file_name else spec} does not exist; {option} takes FILE.py:FACTORY")
    digest = sha256_file(path)
    try:
        made = getattr(_module(path, digest), factory_name)()
    except (Exception, SystemExit) as failure:  # the file is the user's code: whatever it raises is told, not shown as ours
        raise error(f"{what} {spec} failed with {type(failure).__name__}: {one_line(failure)}") from failure
    return made, path, digest


def _module(path: Path, digest: str) -> ModuleType:
    """The file as a module, run once for each content: two loads give instances of one class, which can be pickled."""
    name = f"revq_plugin_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
