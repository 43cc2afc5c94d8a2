"""One writer at a time in a local folder: the second is told who holds it, and a writer that is gone holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from revq.cache.store_folder import open_folder
from revq.errors import HeldError, OutputError, StoreError
from revq.files import LOCK_NAME
from revq.lock import hold_folder, naming_writer, writer_of
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Begin, run_quietly

HOLDER = """
import sys
from revq.lock import hold_folder
with hold_folder(sys.argv[1], "a long encoding", tree=sys.argv[2] == "tree"):
    print("held", flush=True)
    input()
"""


@contextmanager
def another_holding(folder: Path, *, tree: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder as long as the block runs."""
    command = [sys.executable, "-c", HOLDER, str(folder), "tree" if tree else "folder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.communicate(input="\n")


def who(process: subprocess.Popen[str]) -> str:
    """A pattern of how that process is told."""
    return rf"process {process.pid} of \S+ on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(a long encoding\)"


def test_the_second_writer_is_told_who_holds_the_folder_until_that_one_has_been_killed(tmp_path: Path) -> None:
    with another_holding(tmp_path / "s") as process:
        with pytest.raises(HeldError, match="s is being written by another process: " + who(process)), hold_folder(tmp_path / "s", "second"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "s" / LOCK_NAME).exists()
        assert writer_of(tmp_path / "s") is None
        with hold_folder(tmp_path / "s", "third"):
            assert open_folder(tmp_path / "s").children() == []  # the lock itself is not content
            assert open_folder(tmp_path / "s").sizes() == {}


def test_a_lock_leaves_nothing_behind_not_even_the_folders_that_it_made(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "a" / "s", "first"):
        assert [path.name for path in (tmp_path / "a" / "s").iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    with pytest.raises(KeyboardInterrupt), hold_folder(tmp_path / "s", "second"):
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [tmp_path / "s"]


def test_two_threads_cannot_hold_one_folder(tmp_path: Path) -> None:
    with hold_folder(tmp_path, "first"), pytest.raises(HeldError, match=rf"process {os.getpid()} "), hold_folder(tmp_path, "second"):
        pass


def test_a_hold_whose_file_was_removed_by_hand_does_not_remove_the_next_ones(tmp_path: Path) -> None:
    first = hold_folder(tmp_path, "first")
    first.__enter__()
    (tmp_path / LOCK_NAME).unlink()
    with hold_folder(tmp_path, "second"):
        first.__exit__(None, None, None)
        with pytest.raises(HeldError, match=r"\(second\)"), hold_folder(tmp_path, "third"):
            pass


def test_whoever_asks_who_writes_never_keeps_a_writer_from_beginning(tmp_path: Path) -> None:
    ask = "import sys\nfrom revq.lock import writer_of\nprint(flush=True)\nwhile True:\n    writer_of(sys.argv[1])"
    (tmp_path / LOCK_NAME).write_text("")
    with subprocess.Popen([sys.executable, "-c", ask, str(tmp_path)], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        asking.stdout.readline()
        for _ in range(300):
            with hold_folder(tmp_path, "a writer"):
                pass
        asking.kill()


def test_only_another_process_counts_as_a_writer_and_that_of_a_run_counts_for_the_tokenizer_in_it(tmp_path: Path) -> None:
    with hold_folder(tmp_path, "mine"):
        assert writer_of(tmp_path) is None
    with another_holding(tmp_path) as process:
        assert str(process.pid) in str(writer_of(tmp_path))
        assert str(process.pid) in str(writer_of(tmp_path / "tokenizer", around=True))
        assert writer_of(tmp_path / "evaluation") is None


def test_who_holds_a_tree_holds_the_folders_in_it_and_cannot_hold_it_over_a_folder_that_is_held(tmp_path: Path) -> None:
    with another_holding(tmp_path / "run", tree=True) as process:
        for folder in (tmp_path / "run", tmp_path / "run" / "rectifier", tmp_path / "run" / "a" / "b"):
            with pytest.raises(HeldError, match=f"run is being written by another process: process {process.pid} "), hold_folder(folder, "mine"):
                pass
        assert writer_of(tmp_path / "run" / "codebooks", around=True) is None  # what the run has made may be read without a word
    with another_holding(tmp_path / "run" / "rectifier") as process, pytest.raises(HeldError, match=f"rectifier is being .* {process.pid} "):
        hold_folder(tmp_path / "run", "mine", tree=True).__enter__()
    with hold_folder(tmp_path / "run", "mine", tree=True), hold_folder(tmp_path / "run" / "rectifier", "mine too"):
        pass
    with another_holding(tmp_path / "run"), hold_folder(tmp_path / "run" / "evaluation", "mine"):
        pass


def test_an_error_of_reading_names_the_writer_where_there_is_one(tmp_path: Path) -> None:
    def read() -> None:
        with naming_writer(tmp_path, lambda: writer_of(tmp_path)):
            raise StoreError("torn")

    with pytest.raises(StoreError, match=r"^torn$"):
        read()
    with another_holding(tmp_path) as process, pytest.raises(StoreError, match=rf"being written by .* {who(process)}; wait .* \(torn\)$"):
        read()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the output must be a folder, but .*file is a file"), hold_folder(tmp_path / "file", "mine"):
        pass


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
