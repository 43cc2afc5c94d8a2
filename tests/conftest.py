"""What the tests share: the real images and the real small VAE of REVQ_SHARED, and the command line seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REVQ_SHARED", REPOSITORY.parent / "shared")).resolve()
os.environ["REVQ_SHARED"] = str(SHARED)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real test data; the test is skipped where it is absent (in CI that is a failure)."""
    if not (SHARED / "data" / "imagenet-sample").is_dir():
        message = f"the real images and VAE are not at {SHARED}; set REVQ_SHARED"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture(scope="session")
def imagenet_sample(shared: Path) -> Path:
    """train/ (700) and val/ (100) class folders of ImageNet photographs."""
    return shared / "data" / "imagenet-sample"


@pytest.fixture(scope="session")
def taef2(shared: Path) -> str:
    """`FILE.py:FACTORY` of a real pre-trained VAE: 64 px images give (32,8,8) latents."""
    return f"{REPOSITORY / 'tests' / 'taef2_plugin.py'}:load"


@pytest.fixture(scope="session")
def revq_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m revq ARGUMENTS` as a user would, and check its exit code."""

    def run(
        *arguments: object, check: int | None = 0, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "revq", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout, check=False)
        if check is not None:
            assert done.returncode == check, f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
