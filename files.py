"""Writing files so that no failure loses what was there: temporary file, flush to disk, rename. And claiming output folders.

Every output folder of revq has a `config.json` with its `kind` and the `identity` (the settings that shape its content).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutputError

CONFIG_NAME = "config.json"
LOCK_NAME = "writer.lock"  # see lock.py
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def local_path(path: Path | str) -> Path:
    """A local path as a user writes it, with `~` and `~user` expanded; that of an unknown user stays as it is: nothing is there."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError for an unknown user


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the checksum of all else under "sha256", so that a flipped byte in a small file is found too."""
    return {**value, "sha256": sha256_json(dict(value))}


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether `value` is what `seal` made, unchanged."""
    return value.get("sha256") == sha256_json({name: item for name, item in value.items() if name != "sha256"})


def json_bytes(value: Any) -> bytes:
    """`value` as the indented JSON that revq's files hold."""
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's write errors under `path` into one-line `OutputError`s.

    Raises:
        OutputError: the disk is full, a quota or size limit is reached, `path` may not be written, or its name is too long.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise OutputError(
                f"no room left to write {path} ({error.strerror}); nothing finished is lost: free some space, then give the same command again"
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise OutputError(f"{path} cannot be written ({error.strerror}); choose a folder you may write to") from error
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{path} cannot be written: its name is longer than the file system allows; choose a shorter one") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it is flushed and renamed to `path`, else removed.

    Raises:
        OutputError: see `disk_errors`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file or it holds no JSON object."""
    try:
        return parse_json(Path(path).read_bytes())
    except OSError:
        return None


def parse_json(data: bytes | None) -> dict[str, Any] | None:
    """The JSON object in `data`; None where that is None or holds no JSON object."""
    try:
        value = json.loads(data or b"")
    except ValueError:  # UnicodeDecodeError is one
        return None
    return value if isinstance(value, dict) else None


def sizes_under(folder: Path | str) -> dict[str, int]:
    """Size in bytes of every file at any depth of a folder, by its sorted path below it; what vanishes meanwhile, under a writer, is left out."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            with contextlib.suppress(FileNotFoundError):
                sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return dict(sorted(sizes.items()))


def output_kind(path: Path | str) -> str | None:
    """The `kind` that a revq output folder declares in its config.json; None where it declares none."""
    config = read_json(Path(path) / CONFIG_NAME)
    kind = config.get("kind") if config else None
    return kind if isinstance(kind, str) else None


def require_folder(path: Path) -> None:
    """Raises OutputError where `path` cannot become an output folder: it is a file, its name is too long, or `local_path` knew no such user."""
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"the output must be a folder, but {path} is a file; choose another path")
    if path.parts[:1] and path.parts[0].startswith("~") and not os.path.exists(path.parts[0]):
        raise OutputError(f"there is no user {path.parts[0][1:]!r}, in whose home {path} would be; choose another path, or give a full one")


def claim_output(path: Path | str, *, kind: str, identity: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Make `path` the output folder of one run: new, or the same run's (to be resumed), or (overwrite) emptied of an older run.

    For `stages.output_folder` alone, which holds the folder's lock meanwhile.

    Args:
        kind: what the folder holds, such as "revq-codebooks".
        identity: JSON values that shape the content; a folder with another identity is another run's.
        overwrite: empty a folder of the same kind first. A folder that holds anything else is never emptied.

    Returns:
        True where an earlier run of the same identity is there to be resumed.

    Raises:
        OutputError: `path` holds something else, another run, or cannot be written.
    """
    path = Path(path)
    identity = json.loads(json.dumps(dict(identity)))
    require_folder(path)
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    entries = [name for name in entries if name != LOCK_NAME and not name.endswith(".tmp")]
    if entries:
        config = read_json(path / CONFIG_NAME) or {}
        if config.get("kind") != kind:
            found = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
            raise OutputError(f"{path} holds something else than {kind} ({found}); choose a new or empty folder")
        if not overwrite:
            if config.get("identity") == identity:
                return True
            differences = _differences(config.get("identity") or {}, identity)
            raise OutputError(f"{path} holds {kind} made with other settings ({differences}); choose another folder or pass --overwrite")
        with disk_errors(path):
            for entry in path.iterdir():
                if entry.name == LOCK_NAME:
                    continue
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    write_json(path / CONFIG_NAME, {"kind": kind, "identity": identity})
    return False


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first three differing fields as `name: old there, new asked`."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = "; ".join(f"{name}: {old.get(name)} there, {new.get(name)} asked" for name in names[:3])
    return shown + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
