"""One writer at a time: the second is told who holds the store, and a writer that is gone holds nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from revq.cache import lock
from revq.cache.lock import lease, lock_file
from revq.cache.store_folder import open_folder
from revq.errors import OutputError
from revq.stages.encode_latents import EncodeLatentsConfig, encode_latents
from revq.stages.events import Begin, run_quietly

HOLDER = """
import sys, time
from pathlib import Path
from revq.cache.store_folder import open_folder
with open_folder(sys.argv[1]).locked("a long encoding"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with the lock of a local folder, and one with the lease of an object store (fsspec's own local file system)."""
    return str(tmp_path / "s") if request.param == "local" else f"local://{tmp_path / 's'}"


def hold(folder: str) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_refused_and_told_who_holds_the_place_until_that_one_is_gone(folder: str) -> None:
    process = hold(folder)
    try:
        who = rf"is being written by another process: process {process.pid} of \S+ on {socket.gethostname()}, since .* \(a long encoding\)"
        with pytest.raises(OutputError, match=who), open_folder(folder).locked("second"):
            pass
    finally:
        process.kill()
        process.communicate()
    with open_folder(folder).locked("third"):
        assert open_folder(folder).children() == []  # the lock itself is not content


def test_a_lock_leaves_nothing_behind(folder: str, tmp_path: Path) -> None:
    with open_folder(folder).locked("first"):
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["writer.lock"]
    assert list((tmp_path / "s").iterdir()) == []


def test_two_threads_cannot_hold_one_file(tmp_path: Path) -> None:
    with lock_file(tmp_path / "l", "first"), pytest.raises(OutputError, match=rf"process {os.getpid()} "), lock_file(tmp_path / "l", "second"):
        pass


class Bucket:
    """The one object of a lease, in memory."""

    def __init__(self, content: dict[str, object] | None = None) -> None:
        self.content = None if content is None else json.dumps(content).encode()

    def read(self) -> bytes | None:
        return self.content

    def write(self, data: bytes) -> None:
        self.content = data

    def remove(self) -> None:
        self.content = None


def take(bucket: Bucket) -> None:
    with lease("bucket/s/writer.lock", "mine", read=bucket.read, write=bucket.write, remove=bucket.remove, settle_s=0.01):
        assert json.loads(bucket.content or b"")["purpose"] == "mine"


ELSEWHERE = {"host": "elsewhere", "pid": 1, "user": "u", "since": "then", "purpose": "theirs", "token": "t"}


def test_a_lease_of_another_machine_holds_until_it_runs_out() -> None:
    with pytest.raises(OutputError, match=r"bucket/s is being .* on elsewhere, since then \(theirs\); .* ends by itself in \d+ s"):
        take(Bucket({**ELSEWHERE, "expires": time.time() + 60}))
    take(Bucket({**ELSEWHERE, "expires": time.time() - 1}))


def test_a_torn_lease_holds_nothing() -> None:
    bucket = Bucket()
    bucket.content = b'{"host": "elsew'
    take(bucket)
    assert bucket.content is None


def test_of_two_who_come_at_once_only_the_one_whose_lease_stands_goes_on() -> None:
    bucket = Bucket()

    def write_and_be_overtaken(data: bytes) -> None:
        bucket.content = json.dumps({**ELSEWHERE, "expires": time.time() + 60}).encode()

    with (
        pytest.raises(OutputError, match="elsewhere"),
        lease("b/l", "mine", read=bucket.read, write=write_and_be_overtaken, remove=bucket.remove, settle_s=0.01),
    ):
        pass
    assert json.loads(bucket.content or b"")["host"] == "elsewhere"


def test_a_lease_is_renewed_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_S", 0.02)
    bucket = Bucket()
    with lease("b/l", "mine", read=bucket.read, write=bucket.write, remove=bucket.remove, settle_s=0):
        first = json.loads(bucket.content or b"")["expires"]
        time.sleep(0.2)
        assert json.loads(bucket.content or b"")["expires"] > first


def test_a_second_encoding_into_one_store_is_refused_while_the_first_runs(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    def config(split: str) -> EncodeLatentsConfig:
        settings = {"vae": taef2, "image_size": 64, "limit": 4, "device": "cpu", "workers": 1}
        return EncodeLatentsConfig(images=str(imagenet_sample / "val"), store=str(tmp_path / "s"), split=split, **settings)

    first = encode_latents(config("train"))
    assert isinstance(next(first), Begin)
    with pytest.raises(OutputError, match=r"\(encode-latents --split train\)"):
        run_quietly(encode_latents(config("val")))
    run_quietly(first)
    assert run_quietly(encode_latents(config("val")))["rows"] == 4
