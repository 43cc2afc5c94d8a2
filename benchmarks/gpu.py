"""Everything that only a GPU can show, in one go under nine minutes: `make gpu`. Prints one table and writes a JSON.

    python benchmarks/gpu.py --out gpu.json            # all parts, in order of worth
    python benchmarks/gpu.py --part search --part dcae # some
    python benchmarks/gpu.py --small                   # a rehearsal at small sizes, on a CPU too

Each part runs in a process of its own with a limit of time, so one that fails or hangs costs the others nothing: its row says how it ended, its last
lines are printed, and the rows it had found by then stay. What needs CUDA is left out on a CPU, and says so.

Shapes: T tokens (codebooks), N points for each, D dims, K codes per codebook.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = tuple[str, str]
BUDGET_S = 530
WRONG = ("WRONG", "OTHER BYTES", "NAMES NO")
"""How the value of a row begins that fails its part."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """What is measured, and the most seconds it may take."""

    limit_s: int
    rows: Callable[[bool], Iterator[Row]]
    """Of small sizes or whole ones."""


def gpu_tests(small: bool) -> Iterator[Row]:
    """Every test that needs a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(HERE.parent / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"]
    yield "tests that need a GPU", lines[-1].strip("= ")
    yield from (("  failed", line.removeprefix("FAILED ")[:120]) for line in lines if line.startswith("FAILED"))
    if done.returncode:
        raise RuntimeError(f"pytest ended with exit code {done.returncode}: {lines[-1]}")


def search(small: bool) -> Iterator[Row]:
    """Both searches against all squared differences in float64: no code found may be farther than the nearest."""
    from revq.models.nearest import NearestCodes

    device = _device()
    backends = ("fused", "product") if device == "cuda" else ("product",)
    for dims, codes in ((1, 512), (2, 4096), (4, 16384), (8, 65536), (16, 4096)) if not small else ((1, 16), (4, 64)):
        tokens, count = (4, 256) if not small else (2, 8)
        generator = torch.Generator().manual_seed(dims)
        points, codebooks = (torch.randn(tokens, size, dims, generator=generator).to(device) for size in (count, codes))
        squares = torch.cdist(points.double(), codebooks.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        least = squares.min(2).values
        for backend in backends:
            found = NearestCodes(codebooks, backend).query(points)
            chosen = squares.gather(2, found.unsqueeze(2)).squeeze(2)
            verdict = "as near as float64's" if torch.allclose(chosen, least, rtol=1e-5, atol=1e-12) else "WRONG"
            yield f"search {backend}, D={dims} K={codes}", f"{verdict}, farther by at most {float((chosen - least).max()):.1e}"


def determinism(small: bool) -> Iterator[Row]:
    """The same command twice gives the same tokenizer, as docs/concepts/repeating.md promises for one machine."""
    from revq.files import sha256_file

    with tempfile.TemporaryDirectory() as name:
        digests = set()
        for run in ("one", "two"):
            _train(Path(name), run, small, codebook_lr=0.01)
            digests.add(sha256_file(Path(name) / run / "tokenizer" / "model.safetensors"))
    yield "train-rectifier twice, codebooks trained too", "the same bytes" if len(digests) == 1 else "OTHER BYTES"


def precision(small: bool) -> Iterator[Row]:
    """bf16 training against float32: the validation error that they end at."""
    with tempfile.TemporaryDirectory() as name:
        for kind in ("fp32", "bf16"):
            started = time.perf_counter()
            rectified = _train(Path(name), kind, small, codebook_lr=0.0, precision=kind)["val_mse_rectified"]
            yield f"train-rectifier in {kind}", f"val mse rectified {rectified:.6f}, {time.perf_counter() - started:.0f} s in all"


def memory(small: bool) -> Iterator[Row]:
    """A decoder phase that does not fit: its error must name a --micro-batch."""
    from revq.errors import RevqError
    from revq.stages.configs import EncodeLatentsConfig, FitCodebooksConfig, TrainRectifierConfig
    from revq.stages.encode_latents import encode_latents
    from revq.stages.events import run_quietly
    from revq.stages.fit_codebooks import fit_codebooks
    from revq.stages.train_rectifier import train_rectifier

    if _device() != "cuda":
        yield "out of memory in the decoder phase", "needs a GPU"
        return
    with tempfile.TemporaryDirectory() as name:
        images = _noise_images(Path(name) / "images", 40, 128)
        run_quietly(encode_latents(EncodeLatentsConfig(images=str(images), store=f"{name}/store", vae="revq-tiny-f8c8", image_size=128)))
        fit = FitCodebooksConfig(store=f"{name}/store", out=f"{name}/codebooks", tokens=256, codes=16, transform="standardize")
        run_quietly(fit_codebooks(fit))
        train = {"steps": 0, "decoder_steps": 4, "decoder_batch_size": 32, "width": 64, "depth": 1, "codebook_lr": 0.0}
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated() + 400 * 2**20
        torch.cuda.set_per_process_memory_fraction(left / torch.cuda.get_device_properties(0).total_memory)
        try:
            config = TrainRectifierConfig(store=f"{name}/store", codebooks=f"{name}/codebooks", out=f"{name}/run", **train)
            run_quietly(train_rectifier(config))
            yield "out of memory in the decoder phase", "it fitted into 400 MiB, so nothing was shown"
        except RevqError as error:
            named = "names a --micro-batch" if "--micro-batch" in str(error) else "NAMES NO --micro-batch"
            yield "out of memory in the decoder phase", f"{named}: {error}"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def faiss_kmeans(small: bool) -> Iterator[Row]:
    """FAISS's k-means, which `auto` takes on a GPU that it can use, against ours: time and error."""
    from revq.models.kmeans import faiss_uses, kmeans
    from revq.models.nearest import nearest_codes

    device = torch.device(_device())
    tokens, count, codes = (16, 160_000, 4096) if not small else (2, 400, 16)
    points = torch.randn(tokens, count, 4, generator=torch.Generator().manual_seed(0)).to(device)
    if device.type == "cuda" and not faiss_uses(device):
        yield "k-means by FAISS", "this FAISS has no GPU part"
    for backend in ("torch", "faiss") if device.type == "cpu" or faiss_uses(device) else ("torch",):
        started = time.perf_counter()
        codebooks = kmeans(points, codes, iterations=10, seeds=list(range(tokens)), backend=backend).to(device)
        _wait()
        seconds = time.perf_counter() - started
        found = nearest_codes(points, codebooks)
        error = float((points - codebooks.gather(1, found.unsqueeze(2).expand(-1, -1, 4))).square().mean())
        yield f"k-means by {backend}, T={tokens} N={count} D=4 K={codes}, 10 rounds", f"{seconds:.1f} s, mse {error:.6f}"


def assignment(small: bool) -> Iterator[Row]:
    """Speed of the search, by bench_codebooks."""
    yield from _lines_of("bench_codebooks.py", "--part", "gpu", "--repeats", "1" if small else "5")


def training_step(small: bool) -> Iterator[Row]:
    """A step over bare arithmetic and against the paper's plain loop, by bench_training."""
    options = (
        ["--width", "32", "--depth", "1", "--batch", "8", "--codes", "16", "--paper-batch", "2", "--paper-width", "32", "--repeats", "1"]
        if small
        else ["--repeats", "3"]
    )
    yield from _lines_of("bench_training.py", *options)


def fitting(small: bool) -> Iterator[Row]:
    """fit-codebooks as a whole on synthetic latents, by bench_codebooks."""
    yield from _lines_of("bench_codebooks.py", "--part", "imagenet", "--synthetic", "400" if small else "200000")


def dcae(small: bool) -> Iterator[Row]:
    """DC-AE f32c32 at its full size, with random weights: images/s of its two halves, and TFLOP/s by torch's counter."""
    from diffusers import AutoencoderDC
    from torch.utils.flop_counter import FlopCounterMode

    device = _device()
    options = {"encoder_block_out_channels": (32,) * 6, "decoder_block_out_channels": (32,) * 6, "attention_head_dim": 8} if small else {}
    batch, side = (16, 256) if not small else (1, 64)
    with torch.no_grad():
        vae: Any = AutoencoderDC(**options)  # type: ignore[arg-type]
        vae.eval().to(device)
        images = torch.randn(batch, 3, side, side, device=device)
        latents = vae.encode(images).latent
        halves: dict[str, Callable[[], object]] = {"encode": lambda: vae.encode(images).latent, "decode": lambda: vae.decode(latents).sample}
        flops = {}
        for half, work in halves.items():
            with FlopCounterMode(display=False) as counter:
                work()
            flops[half] = counter.get_total_flops()
        for name, tf32, bf16, channels_last in (
            ("float32", False, False, False), ("TF32", True, False, False), ("bf16", True, True, False), ("bf16, channels_last", True, True, True),
        ):  # fmt: skip
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            vae.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                for half, work in halves.items():
                    seconds = _median_seconds(work, 1 if small else 5)
                    yield f"DC-AE {half}, {side} px, {name}", f"{batch / seconds:.1f} images/s, {flops[half] / seconds / 1e12:.2f} TFLOP/s"


def profiles(small: bool) -> Iterator[Row]:
    """Where the time of a training step and of the search goes: the five costliest operators of each."""
    from torch.profiler import ProfilerActivity, profile

    from revq.models.nearest import NearestCodes
    from revq.models.rectifier import Rectifier

    device = _device()
    batch, width, codes = (256, 512, 16384) if not small else (2, 32, 16)
    rectifier = Rectifier(channels=32, width=width, depth=3).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = torch.randn(batch, 32, 8, 8, device=device)
    finder, points = NearestCodes(torch.randn(512, codes, 4, device=device)), torch.randn(512, batch, 4, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = (rectifier(latents) - latents).square().mean()
        loss.backward()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for name, work in (("rectifier's step", step), ("search", lambda: finder.query(points))):
        work()
        with profile(activities=activities) as profiler:
            for _ in range(1 if small else 10):
                work()
            _wait()
        own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        costs = sorted(((getattr(event, own), event.key) for event in profiler.key_averages()), reverse=True)
        total = sum(cost for cost, _ in costs) or 1
        for cost, key in costs[:5]:
            yield f"profile of the {name}: {key[:60]}", f"{100 * cost / total:.0f} %"


PARTS = {
    "tests": Part(80, gpu_tests),
    "search": Part(40, search),
    "determinism": Part(40, determinism),
    "precision": Part(40, precision),
    "memory": Part(40, memory),
    "faiss": Part(40, faiss_kmeans),
    "assignment": Part(40, assignment),
    "step": Part(100, training_step),
    "fit": Part(60, fitting),
    "dcae": Part(50, dcae),
    "profiles": Part(30, profiles),
}
"""In order of worth: where time runs out, the last are left out."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    _wait()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        _wait()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def _train(folder: Path, run: str, small: bool, **settings: object) -> dict[str, Any]:
    """The result of train-rectifier on synthetic latents in `folder`, which is filled by the first call."""
    from bench_training import make_codebooks
    from synthetic import make_store

    from revq.cache.store import LatentStore
    from revq.stages.configs import TrainRectifierConfig
    from revq.stages.events import run_quietly
    from revq.stages.train_rectifier import train_rectifier

    steps, batch, codes, width = (200, 256, 1024, 256) if not small else (4, 4, 16, 32)
    if not (folder / "codebooks").exists():
        make_store(folder / "store", {"train": 4 * batch, "val": 2 * batch})
        make_codebooks(folder / "codebooks", LatentStore.open(folder / "store"), codes)
    common: dict[str, object] = {"steps": steps, "batch_size": batch, "width": width, "depth": 2, "seed": 7, "evaluations": 2}
    paths = {"store": str(folder / "store"), "codebooks": str(folder / "codebooks"), "out": str(folder / run)}
    return dict(run_quietly(train_rectifier(TrainRectifierConfig(**paths, **common | settings))))  # type: ignore[arg-type]


def _noise_images(folder: Path, count: int, side: int) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


def _lines_of(script: str, *options: str) -> Iterator[Row]:
    """What another benchmark prints, a row for each of its lines as they come: title and last column."""
    command = [sys.executable, str(HERE / script), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                title, *cells = re.split(r"\s{2,}", line.rstrip().lstrip(" "))
                yield title, ", ".join(cells)
    if process.returncode:
        raise RuntimeError(f"{script} ended with exit code {process.returncode}")


def run_part(name: str, small: bool) -> None:
    """In the part's own process: a JSON list for each row, as it is found."""
    bad = []
    for row in PARTS[name].rows(small):
        print("ROW " + json.dumps(row), flush=True)
        bad += [row[0]] if row[1].startswith(WRONG) else []
    if bad:
        sys.exit(f"wrong: {', '.join(bad)}")


def watch_part(name: str, small: bool, limit_s: float) -> tuple[list[Row], str]:
    """Run a part beside this process; its rows and how it ended: "done", or what went wrong."""
    command = [sys.executable, str(Path(__file__)), "--inside", name, *(["--small"] if small else [])]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        lines = output.read().splitlines()
    rows: list[Row] = [tuple(json.loads(line.removeprefix("ROW "))) for line in lines if line.startswith("ROW ")]
    if code == 0:
        return rows, "done"
    said = [line for line in lines if line.strip() and not line.startswith("ROW ")]
    print("\n".join(f"    {line}" for line in said[-15:]))
    if code is None:
        return rows, f"stopped after {limit_s:.0f} s"
    return rows, f"FAILED with exit code {code}: {said[-1][:150] if said else 'nothing said'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The part and what it started, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given more than once; default all")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON; default gpu.json")
    parser.add_argument("--small", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds of all parts together; default {BUDGET_S}")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_part(arguments.inside, arguments.small)
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()}-core CPU ({platform.machine()}), no GPU"
    header = f"{machine}, torch {torch.__version__}, Python {platform.python_version()}"
    print(header, flush=True)
    started, report = time.monotonic(), {}
    for name in arguments.part or PARTS:
        left = arguments.budget_s - (time.monotonic() - started)
        before = time.monotonic()
        rows, ended = watch_part(name, arguments.small, min(PARTS[name].limit_s, left)) if left > 5 else ([], "left out: no time")
        seconds = time.monotonic() - before
        report[name] = {"rows": rows, "ended": ended, "seconds": round(seconds, 1)}
        print(f"\n{name}: {ended}, {seconds:.0f} s")
        width = min(100, max((len(title) for title, _ in rows), default=0))
        print("\n".join(f"  {title:<{width}}  {value}" for title, value in rows), flush=True)
        arguments.out.write_text(json.dumps({"machine": header, "small": arguments.small, "parts": report}, indent=1))
    bad = [name for name, part in report.items() if part["ended"] != "done"]
    print(f"\nall parts: {time.monotonic() - started:.0f} s, written to {arguments.out}" + (f"; not whole: {', '.join(bad)}" if bad else ""))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
