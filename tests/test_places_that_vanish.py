"""A place that goes away in the middle of encoding stops the run, and no image is recorded as unreadable for it; one image's fault does not."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import archives
import pytest
from s3_proxy import FORBIDDEN, Answer, Proxy, Request, running_proxy
from test_store import contents

from revq.cache.image_sources.place_errors import neighbours_gone, place_errors
from revq.cache.sources import open_source
from revq.cache.store import LatentStore
from revq.cache.store_folder import open_folder
from revq.errors import ImageError, StoreError
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Advance, Result

Cli = Callable[..., subprocess.CompletedProcess[str]]


def photographs(folder: Path, imagenet_sample: Path, count: int = 60) -> Path:
    """`folder` with photographs in class folders, enough of them to be interrupted."""
    for number, path in enumerate(sorted((imagenet_sample / "val").rglob("*.JPEG"))[:count]):
        place = folder / f"class-{number * 4 // count}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


def rename(place: Path) -> None:
    place.rename(place.with_suffix(".away"))


def empty(place: Path) -> None:
    """As a network mount leaves its mount point."""
    rename(place)
    place.mkdir()


def put_back(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.with_suffix(".away").rename(place)


def encode(images: Path | str, store: Path, taef2: str, at_half: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Encode in shards of four; `at_half` is called when 10 images are done, with at most as many read ahead."""
    settings = {"image_size": 64, "shard_rows": 4, "batch_size": 2, "workers": 2, "device": "cpu"}
    for event in encode_latents(EncodeLatentsConfig(images=str(images), store=str(store), vae=taef2, **settings)):
        if event == Advance(done=10):
            at_half()
        if isinstance(event, Result):
            return event.value
    raise AssertionError("no result")


GONE = {
    "a folder": ("images", rename),
    "a mount point": ("images", empty),
    "a class folder": ("images/class-3", rename),
    "a mount point of a class": ("images/class-3", empty),
    "a Parquet file": ("parquet/train-00001-of-00002.parquet", rename),
}


@pytest.mark.parametrize(("name", "take_away"), GONE.values(), ids=GONE)
def test_images_that_vanish_in_the_middle_stop_the_run_and_it_goes_on_when_they_are_back(
    imagenet_sample: Path, taef2: str, tmp_path: Path, name: str, take_away: Callable[[Path], None]
) -> None:
    images = photographs(tmp_path / "images", imagenet_sample, 40)
    if name.startswith("parquet"):
        images = archives.parquet_files(tmp_path / "parquet", images)
    with pytest.raises(ImageError, match="give the same command again to go on"):
        encode(images, tmp_path / "s", taef2, lambda: take_away(tmp_path / name))
    with pytest.raises(StoreError, match="is not finished"):
        LatentStore.open(tmp_path / "s")["train"]
    put_back(tmp_path / name)
    encode(images, tmp_path / "s", taef2)
    encode(images, tmp_path / "whole", taef2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


def test_a_command_whose_images_vanish_ends_with_one_line_and_resumes(revq_cli: Cli, imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    images, store = photographs(tmp_path / "images", imagenet_sample, 60), tmp_path / "s"
    settings = ["--image-size", "64", "--shard-rows", "4", "--batch-size", "2", "--workers", "2", "--device", "cpu"]
    work = ["encode-latents", str(images), str(store), "--vae", taef2, *settings]
    with subprocess.Popen([sys.executable, "-m", "revq", *work], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while not list((store / "progress" / "train").glob("*.json")):
            assert run.poll() is None, "it ended before the images could be taken away"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.send_signal(signal.SIGSTOP)
        rename(images)
        run.send_signal(signal.SIGCONT)
        _, told = run.communicate(timeout=120)
    assert run.returncode == 1
    assert re.fullmatch(r"revq: error: .*/images/.* is gone, .* give the same command again to go on\n", told)
    put_back(images)
    assert "resuming: " in revq_cli(*work).stdout
    encode(images, tmp_path / "whole", taef2)
    assert contents(tmp_path / "whole") == contents(store)


def test_an_input_output_error_of_a_disk_stops_the_run_and_a_missing_file_does_not(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", imagenet_sample, 12)
    photograph = sorted(images.rglob("*.JPEG"))[8]
    photograph.rename(tmp_path / "it")
    photograph.symlink_to("/proc/self/mem")  # whose first bytes no process can read
    with pytest.raises(ImageError, match=rf"{photograph.name} cannot be read \(Input/output error\), and that is no fault of one image"):
        encode(images, tmp_path / "s", taef2)
    (tmp_path / "it").rename(photograph)
    encode(images, tmp_path / "s", taef2)
    encode(images, tmp_path / "whole", taef2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")
    source = open_source(images)
    photograph.unlink()
    for index, item in enumerate(source.items):
        if item.key.endswith(photograph.name):
            with pytest.raises(FileNotFoundError):
                source.read(index)
        else:
            assert source.read(index)


def test_links_to_nothing_are_images_that_cannot_be_read_however_many_there_are(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", imagenet_sample, 12)
    for number in range(9):
        next(images.iterdir()).joinpath(f"{number}.jpg").symlink_to("nowhere")
    assert encode(images, tmp_path / "s", taef2)["failed"] == 9


FORBIDDEN_READER = """
import os, sys
from revq.cache.sources import open_source
source = open_source(sys.argv[1])
print(len(source.read(0)))
os.chmod(sys.argv[2], 0)
if os.getuid() == 0:  # whom nothing is forbidden
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(len(source.read(1)))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("locked", ["b", "b/2.jpg"], ids=["a folder", "a file"])
def test_what_may_no_longer_be_read_stops_the_run(locked: str) -> None:
    with tempfile.TemporaryDirectory(prefix="revq-test-") as folder:
        root = Path(folder)
        for name in ("a/1.jpg", "b/2.jpg"):
            (root / name).parent.mkdir()
            (root / name).write_bytes(b"123")
        root.chmod(0o755)
        command = [sys.executable, "-c", FORBIDDEN_READER, str(root), str(root / locked)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
        (root / locked).chmod(0o700)
    first, second = done.stdout.splitlines()
    assert first == "3"
    assert second.startswith("ImageError ")
    assert "b/2.jpg cannot be read (Permission denied), and that is no fault of one image" in second


@pytest.mark.parametrize("name", ["ESTALE", "ENOTCONN", "EIO", "EACCES", "ETIMEDOUT", "EHOSTDOWN"])
def test_what_network_file_systems_answer_when_they_are_away_is_of_the_place(name: str) -> None:
    number = getattr(errno, name)
    with pytest.raises(ImageError, match=f"n/1.jpg cannot be read .{os.strerror(number)}"), place_errors("n/1.jpg"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), place_errors("n/1.jpg"):
        raise FileNotFoundError(errno.ENOENT, "no")
    with pytest.raises(ImageError), place_errors("n/1.tar", archive=True):
        raise FileNotFoundError(errno.ENOENT, "no")


def test_an_image_alone_or_with_a_few_others_may_be_gone_and_more_are_the_place() -> None:
    def told(gone: set[int], index: int, count: int) -> bool:
        return neighbours_gone(lambda i: i not in gone, index, count)

    assert not told({50}, 50, 100)
    assert not told({50, 51, 52, 49, 48}, 50, 100)
    assert told(set(range(40, 60)), 50, 100)
    assert told(set(range(100)), 0, 100)
    assert not told({0}, 0, 1)
    assert not told({0, 1}, 0, 2)


@pytest.fixture
def spoiled(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the bucket's server, which a test may spoil."""
    import s3fs

    with running_proxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("kind", ["folders", "x.tar"])
def test_a_server_that_refuses_in_the_middle_stops_the_run_and_it_goes_on_when_it_answers(
    spoiled: Proxy, bucket: str, imagenet_sample: Path, taef2: str, tmp_path: Path, kind: str
) -> None:
    folders = archives.class_folders(tmp_path / "folders", imagenet_sample)
    archives.write_tar(tmp_path / "x.tar", archives.files_of(folders))
    place = open_folder(f"{bucket}/i")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        place.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    taken = 0

    def stop(request: Request) -> Answer:
        nonlocal taken
        taken += request.method == "GET" and (".JPEG" in request.path or ("Range" in request.headers))
        return FORBIDDEN if taken > 12 else spoiled.forward(request)

    spoiled.rule = stop
    with pytest.raises(ImageError, match=r"s3://latents/i/.* cannot be read .*give the same command again to go on"):
        encode(f"{bucket}/i/{kind}", tmp_path / "s", taef2)
    assert taken > 12
    spoiled.rule = spoiled.forward
    assert encode(f"{bucket}/i/{kind}", tmp_path / "s", taef2)["failed"] == 0
    encode(f"{bucket}/i/{kind}", tmp_path / "whole", taef2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")
    assert LatentStore.open(tmp_path / "s")["train"].images == 20


@contextmanager
def served(file: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A file behind HTTP, by ranges, until the block ends or the server is closed."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            data = file.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if wanted:
                self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(data)}")
            self.end_headers()
            if with_body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_that_is_gone_in_the_middle_stops_the_run_after_a_few_attempts(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    folders = photographs(tmp_path / "folders", imagenet_sample, 30)
    file = archives.write_tar(tmp_path / "x.tar", archives.files_of(folders))
    with served(file) as server:
        port = server.server_port
        url = f"http://127.0.0.1:{port}/x.tar"
        with pytest.raises(ImageError, match=rf"{url} cannot be read after 4 attempts .*give the same command again to go on"):
            encode(url, tmp_path / "s", taef2, lambda: (server.shutdown(), server.server_close()))
    with served(file, port):
        assert encode(url, tmp_path / "s", taef2)["failed"] == 0
        encode(url, tmp_path / "whole", taef2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")
