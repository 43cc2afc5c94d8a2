"""Bad input gets one clear line, and nothing that was there is lost: every case through the command line, on real images and a real VAE."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
ENCODE = ("--image-size", 64, "--batch-size", 8, "--workers", 2, "--shard-rows", 16)
FIT = ("--codes", 8, "--transform", "pca", "--iterations", 3)
TRAIN = ("--steps", 200, "--batch-size", 16, "--width", 32, "--depth", 1, "--decoder-steps", 4, "--decoder-batch-size", 4, "--ema", 0.9)


@dataclass(frozen=True)
class Made:
    """One small run whose parts are good, and never to be changed by a test."""

    root: Path
    images: Path
    vae: str

    @property
    def store(self) -> Path:
        return self.root / "latents.zarr"

    @property
    def codebooks(self) -> Path:
        return self.root / "codebooks"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def command(self, stage: str, out: Path) -> list[str]:
        """The command of a stage, on the good parts, writing to `out`."""
        commands: dict[str, tuple[object, ...]] = {
            "encode-latents": (self.images / "train", out, "--vae", self.vae, "--limit", 96, *ENCODE),
            "fit-codebooks": (self.store, out, *FIT),
            "train-rectifier": (self.store, self.codebooks, out, *TRAIN),
            "evaluate": (self.run, self.images / "train", out, "--limit", 24, "--batch-size", 2, "--workers", 2, "--no-download"),
        }
        return [stage, *map(str, commands[stage])]


STAGES = ("encode-latents", "fit-codebooks", "train-rectifier", "evaluate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, revq_cli: Cli, imagenet_sample: Path, taef2: str) -> Made:
    made = Made(tmp_path_factory.mktemp("made"), imagenet_sample, taef2)
    revq_cli(*made.command("encode-latents", made.store))
    revq_cli("encode-latents", imagenet_sample / "val", made.store, "--vae", taef2, "--split", "val", "--limit", 16, *ENCODE)
    revq_cli(*made.command("fit-codebooks", made.codebooks))
    revq_cli(*made.command("train-rectifier", made.run))
    return made


def digests(*folders: Path) -> dict[str, str]:
    """SHA-256 of every file under the folders."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def untouched(made: Made) -> Iterator[None]:
    """The good parts are byte for byte the same after the test."""
    before = digests(made.root)
    yield
    assert digests(made.root) == before


def error_of(done: subprocess.CompletedProcess[str], *patterns: str) -> str:
    """The one line of an error, which holds all the patterns."""
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("revq: error: ")
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]
    return lines[0]


# images


def test_a_missing_image_folder(revq_cli: Cli, taef2: str, tmp_path: Path):
    done = revq_cli("encode-latents", tmp_path / "none", tmp_path / "a.zarr", "--vae", taef2, check=1)
    error_of(done, r"none", r"does not exist|no such folder|not exist")
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("files", [[], ["notes.txt", "classes/list.csv"]], ids=["empty", "no image inside"])
def test_a_folder_without_an_image(revq_cli: Cli, taef2: str, tmp_path: Path, files: list[str]):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    done = revq_cli("encode-latents", folder, tmp_path / "a.zarr", "--vae", taef2, check=1)
    error_of(done, r"images", r"\.jpg")
    assert not (tmp_path / "a.zarr").exists()


@pytest.fixture
def with_a_bad_image(imagenet_sample: Path, tmp_path: Path) -> Path:
    """Three real images and one that is cut off."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted((imagenet_sample / "val").rglob("*.JPEG"))[:3]):
        shutil.copyfile(path, folder / f"{number}.jpg")
    (folder / "1b.jpg").write_bytes((folder / "1.jpg").read_bytes()[:200])
    return folder


def test_an_unreadable_image_is_recorded_what_is_none_is_counted_and_the_run_goes_on(
    revq_cli: Cli, taef2: str, tmp_path: Path, with_a_bad_image: Path
):
    (with_a_bad_image / "2b.heic").write_bytes(b"x")
    done = revq_cli("encode-latents", with_a_bad_image, tmp_path / "a.zarr", "--vae", taef2, *ENCODE)
    assert re.search(r"^warning: .*1b\.jpg", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^1 entries of .* are passed over: 1 \.heic \(2b\.heic\)$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ +skipped +\.heic 1$", done.stdout, re.MULTILINE), done.stdout
    rows = pq.read_table(tmp_path / "a.zarr" / "manifest" / "train.parquet").to_pylist()
    assert [(row["key"], row["status"]) for row in rows] == [("0.jpg", "ok"), ("1.jpg", "ok"), ("1b.jpg", "failed"), ("2.jpg", "ok")]
    assert rows[2]["reason"]


def test_strict_makes_an_unreadable_image_an_error(revq_cli: Cli, taef2: str, tmp_path: Path, with_a_bad_image: Path):
    done = revq_cli("encode-latents", with_a_bad_image, tmp_path / "a.zarr", "--vae", taef2, "--strict", *ENCODE, check=1)
    error_of(done, r"1b\.jpg")


# VAE


def test_a_vae_that_cannot_be_had_offline_says_how_to_pass_a_local_one(revq_cli: Cli, imagenet_sample: Path, tmp_path: Path):
    arguments = ("encode-latents", imagenet_sample / "val", tmp_path / "a.zarr")
    done = revq_cli(*arguments, check=1, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")})
    error_of(done, r"mit-han-lab/dc-ae-f32c32-sana-1\.1-diffusers", r"pass --vae a local folder in diffusers' format, FILE\.py:FACTORY")
    assert not (tmp_path / "a.zarr").exists()


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> str:
    """The same network with one weight changed: another VAE."""
    plugin = tmp_path_factory.mktemp("vae") / "other.py"
    here = Path(__file__).parent / "taef2_plugin.py"
    plugin.write_text(
        textwrap.dedent(
            f"""
            import runpy

            def load():
                network = runpy.run_path({str(here)!r})["load"]()
                network.decoder[1].bias.data += 0.01
                return network
            """
        )
    )
    return f"{plugin}:load"


TWO_FINGERPRINTS = r"[0-9a-f]{16}.*[0-9a-f]{16}"


@pytest.mark.usefixtures("untouched")
def test_a_split_from_another_vae_does_not_enter_a_store(revq_cli: Cli, made: Made, other_vae: str):
    done = revq_cli("encode-latents", made.images / "val", made.store, "--split", "more", "--vae", other_vae, *ENCODE, check=1)
    error_of(done, TWO_FINGERPRINTS)


@pytest.mark.usefixtures("untouched")
def test_a_split_of_another_image_size_does_not_enter_a_store(revq_cli: Cli, made: Made, taef2: str):
    done = revq_cli("encode-latents", made.images / "val", made.store, "--split", "more", "--vae", taef2, "--image-size", 128, check=1)
    error_of(done, r"image_size: 64 there, 128 asked")


@pytest.mark.usefixtures("untouched")
def test_codebooks_are_not_calibrated_with_another_vae(revq_cli: Cli, made: Made, other_vae: str, tmp_path: Path):
    done = revq_cli("fit-codebooks", made.store, tmp_path / "c", "--codes", 8, "--transform", "decoder", "--vae", other_vae, check=1)
    error_of(done, TWO_FINGERPRINTS)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, revq_cli: Cli, imagenet_sample: Path, other_vae: str) -> Path:
    store = tmp_path_factory.mktemp("other") / "latents.zarr"
    revq_cli("encode-latents", imagenet_sample / "val", store, "--vae", other_vae, "--limit", 16, *ENCODE)
    return store


@pytest.mark.usefixtures("untouched")
def test_codebooks_of_another_store_do_not_train(revq_cli: Cli, made: Made, other_store: Path, tmp_path: Path):
    done = revq_cli("train-rectifier", other_store, made.codebooks, tmp_path / "run", *TRAIN, check=1)
    error_of(done, TWO_FINGERPRINTS)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("untouched")
def test_a_tokenizer_is_not_evaluated_with_another_vae(revq_cli: Cli, made: Made, other_vae: str, tmp_path: Path):
    done = revq_cli("evaluate", made.run, made.images / "val", tmp_path / "e", "--vae", other_vae, "--no-download", check=1)
    error_of(done, TWO_FINGERPRINTS)
    assert not (tmp_path / "e").exists()


# sizes


@pytest.mark.usefixtures("untouched")
def test_tokens_that_do_not_divide_the_latent(revq_cli: Cli, made: Made, tmp_path: Path):
    done = revq_cli("fit-codebooks", made.store, tmp_path / "c", "--tokens", 500, "--codes", 8, check=1)
    error_of(done, r"500", r"2048")
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("untouched")
def test_fewer_latents_than_codes_names_the_largest_number_that_fits(revq_cli: Cli, made: Made, tmp_path: Path):
    done = revq_cli("fit-codebooks", made.store, tmp_path / "c", "--codes", 128, check=1)
    error_of(done, r"\b96\b", r"--codes 96 or fewer")
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("untouched")
def test_a_split_that_is_not_there_names_those_that_are(revq_cli: Cli, made: Made, tmp_path: Path):
    error_of(revq_cli("fit-codebooks", made.store, tmp_path / "c", "--split", "test", check=1), r'"test"', r"train, val")


@pytest.mark.parametrize("stage", ["fit-codebooks", "train-rectifier", "evaluate"])
@pytest.mark.usefixtures("untouched")
def test_an_input_that_is_not_there(revq_cli: Cli, made: Made, tmp_path: Path, stage: str):
    arguments = made.command(stage, tmp_path / "out")
    error_of(revq_cli(stage, tmp_path / "nothing", *arguments[2:], check=1), "nothing")
    assert not (tmp_path / "out").exists()


# output folders


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("untouched")
def test_an_output_folder_that_holds_something_else_is_left_alone(revq_cli: Cli, made: Made, tmp_path: Path, stage: str):
    (tmp_path / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        done = revq_cli(*made.command(stage, tmp_path), *extra, check=1)
        error_of(done, re.escape(str(tmp_path)), r"choose")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"thesis.tex": "years of work"}


@pytest.mark.usefixtures("untouched")
def test_codebooks_of_other_settings_are_not_replaced_unasked(revq_cli: Cli, made: Made):
    done = revq_cli("fit-codebooks", made.store, made.codebooks, "--codes", 4, "--transform", "pca", "--iterations", 3, check=1)
    error_of(done, r"codes: 8 there, 4 asked", r"--overwrite")


# interruption


def interrupt(arguments: list[str], when: str, how: signal.Signals) -> tuple[int, str, str]:
    """Start a command, send it a signal at the first line that matches; its exit code, standard output, standard error."""

    def listen_to_ctrl_c() -> None:
        # A shell that starts the tests in the background makes its children ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "revq", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_ctrl_c)
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if re.search(when, line):
            break
    child.send_signal(how)
    out, err = child.communicate(timeout=60)
    return child.returncode, "".join(seen) + out, err


@dataclass(frozen=True)
class Interruption:
    stage: str
    when: str
    """First line after which the signal comes."""
    product: str
    """File or folder whose bytes must be those of a run never interrupted; empty: there is none to compare with."""
    resumed: str
    """What the second run says."""
    how: signal.Signals = signal.SIGINT


INTERRUPTIONS = [
    Interruption("encode-latents", r"encode train: \d+/96", "train", r"encode train: 96 images, \d+ done before"),
    Interruption("fit-codebooks", r"^k-means", "codebooks.safetensors", ""),
    Interruption("train-rectifier", r"train: \d+/", "tokenizer/model.safetensors", r"resuming at step \d+"),
    Interruption("train-rectifier", r"train: \d+/", "tokenizer/model.safetensors", r"resuming at step \d+", signal.SIGTERM),
    Interruption("evaluate", r"evaluate: \d+/24", "", ""),
]


@pytest.mark.parametrize("case", INTERRUPTIONS, ids=lambda case: f"{case.stage} {case.how.name}")
@pytest.mark.usefixtures("untouched")
def test_an_interrupted_stage_says_so_and_the_same_command_finishes_it(revq_cli: Cli, made: Made, tmp_path: Path, case: Interruption):
    out = tmp_path / "out"
    arguments = made.command(case.stage, out)
    code, _, err = interrupt(arguments, case.when, case.how)
    assert code == 128 + case.how
    assert err == "interrupted; the same command continues where this stopped\n"
    again = revq_cli(*arguments)
    assert re.search(case.resumed, again.stdout), again.stdout
    if case.product:
        reference = {"encode-latents": made.store, "fit-codebooks": made.codebooks, "train-rectifier": made.run}[case.stage]
        assert same_bytes(out / case.product, reference / case.product)
    else:
        assert (out / "metrics.json").is_file()


def same_bytes(ours: Path, theirs: Path) -> bool:
    if ours.is_file():
        return ours.read_bytes() == theirs.read_bytes()
    return {Path(name).relative_to(ours): digest for name, digest in digests(ours).items()} == {
        Path(name).relative_to(theirs): digest for name, digest in digests(theirs).items()
    }


# full disk


class SmallDisk:
    """A file system that is soon full, or where none can be mounted, a limit on the size of a file."""

    def __init__(self, folder: Path, size_kib: int) -> None:
        self.folder = folder
        self.size_kib = size_kib
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
        self.mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def run_full(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """Run the command on the small disk."""
        command = [sys.executable, "-m", "revq", *arguments]
        limit = None if self.mounted else self._limit
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False)

    def make_room(self) -> None:
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=256m", str(self.folder)], check=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def _limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size_kib * 128, self.size_kib * 128))


@pytest.mark.parametrize(
    ("stage", "size_kib"),
    [("encode-latents", 200), ("fit-codebooks", 2048), ("train-rectifier", 4096), ("evaluate", 64)],
    ids=STAGES,
)
@pytest.mark.usefixtures("untouched")
def test_a_full_disk_is_one_line_and_with_room_the_same_command_finishes(revq_cli: Cli, made: Made, tmp_path: Path, stage: str, size_kib: int):
    disk = SmallDisk(tmp_path / "disk", size_kib)
    try:
        arguments = made.command(stage, disk.folder / "out")
        error_of(disk.run_full(arguments), r"no room left to write", r"free some space, then give the same command again")
        disk.make_room()
        revq_cli(*arguments)
        assert not list(disk.folder.rglob("*.tmp"))
        product = {"encode-latents": "train/latents", "fit-codebooks": "codebooks.safetensors", "train-rectifier": "tokenizer/model.safetensors"}
        if stage in product:
            reference = {"encode-latents": made.store, "fit-codebooks": made.codebooks, "train-rectifier": made.run}[stage]
            assert same_bytes(disk.folder / "out" / product[stage], reference / product[stage])
    finally:
        disk.close()


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not write to; root may write anywhere but on a file system mounted to be read only."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() != 0:
        yield folder
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"root may write anywhere, and cannot mount a read-only file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_may_not_be_written(revq_cli: Cli, imagenet_sample: Path, taef2: str, locked_folder: Path):
    error_of(revq_cli("encode-latents", imagenet_sample / "val", locked_folder / "a.zarr", "--vae", taef2, *ENCODE, check=1), "cannot be written")
