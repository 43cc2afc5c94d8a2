"""Tables: what codebooks cost, against the plain way of doing the same. Ratios come from alternating repeats in this one run.

    python benchmarks/bench_codebooks.py                 # everything that this machine can, about eight minutes on two cores
    python benchmarks/bench_codebooks.py --part nearest  # or once, kmeans, stage, gpu, imagenet
    python benchmarks/bench_codebooks.py --part imagenet --synthetic 2000   # what a GPU does with 1.28 million latents, with fewer anywhere

Peak memory is what a row takes beyond what was there before it (Linux; elsewhere left out). GPU rows appear where there is one.

Shapes: T tokens (codebooks), N points for each, D dims, K codes per codebook.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from synthetic import make_store
from torch import Tensor

from revq.models.kmeans import kmeans
from revq.models.nearest import NearestCodes, _pick_backend, nearest_codes
from revq.stages.configs import EncodeLatentsConfig, FitCodebooksConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Begin, Result, run_quietly
from revq.stages.fit_codebooks import POINTS_PER_CODE, fit_codebooks

PARTS = ("nearest", "once", "kmeans", "stage", "gpu", "imagenet")
IMAGENET = 1_281_167
LINEAR_VAE = """
import torch
import torch.nn.functional as F

class Linear(torch.nn.Module):
    \"\"\"32 orthonormal numbers of each 8 x 8 square: a real, if simple, autoencoder that costs next to nothing.\"\"\"

    def __init__(self):
        super().__init__()
        basis = torch.linalg.qr(torch.randn(192, 32, generator=torch.Generator().manual_seed(0))).Q
        self.basis = torch.nn.Parameter(basis)

    def encode(self, images):
        return torch.einsum("bphw,pc->bchw", F.pixel_unshuffle(images, 8), self.basis)

    def decode(self, latents):
        return F.pixel_shuffle(torch.einsum("bchw,pc->bphw", latents, self.basis), 8)
"""


def measured(action: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """(seconds, peak MiB beyond the start) of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        before = reset_peak()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**20
    return time.perf_counter() - started, peak_kib() / 1024 - before / 1024


def reset_peak() -> float:
    """Set this process's peak resident memory back to what it holds now, in KiB (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return peak_kib()


def peak_kib() -> float:
    try:
        return next(float(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except OSError:
        return float("nan")


def compare(ways: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Least seconds and largest peak MiB of each way, taken in turn; the first round warms up, and its time does not count."""
    rounds = [{name: measured(way, device) for name, way in ways.items()} for _ in range(repeats + 1)]
    return {name: (min(each[name][0] for each in rounds[1:]), max(each[name][1] for each in rounds)) for name in ways}


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print(
            "  "
            + "  ".join(
                f"{cell:<{width}}" if not column else f"{cell:>{width}}" for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def random_points(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def by_cdist(points: Tensor, codebooks: Tensor) -> Tensor:
    """What one writes without thinking: all distances of a group, then the smallest."""
    return torch.stack([torch.cdist(group, codebook).argmin(1) for group, codebook in zip(points, codebooks, strict=True)])


def move_and_query(search: NearestCodes, codebooks: Tensor, points: Tensor) -> Tensor:
    """A step of training codebooks: every code has moved a little since the last one."""
    search.move(codebooks)
    return search.query(points)


def nearest_part(repeats: int) -> None:
    for codes, aim in ((1024, 2.5), (16384, 15.0)):
        points, codebooks = random_points(64, 256, 4), random_points(64, codes, 4, seed=1)
        search, moved = NearestCodes(codebooks), codebooks + 0.01 * random_points(64, codes, 4, seed=2)
        found = compare(
            {
                "torch.cdist(...).argmin, group by group": partial(by_cdist, points, codebooks),
                "NearestCodes, boxes kept": partial(search.query, points),
                "NearestCodes, boxes filled with moved codes": partial(move_and_query, search, moved, points),
                "nearest_codes, boxes cut anew": partial(nearest_codes, points, codebooks),
            },
            repeats,
        )
        plain = found["torch.cdist(...).argmin, group by group"][0]
        rows = [("", "time", "times faster", "peak memory")]
        rows += [(name, f"{1000 * seconds:.1f} ms", f"{plain / seconds:.1f}", f"{mib:.0f} MiB") for name, (seconds, mib) in found.items()]
        table(f"assignment, T=64 N=256 D=4 K={codes} (aim: {aim:g} times with frozen codebooks)", rows)


def by_product(points: Tensor, codebooks: Tensor) -> Tensor:
    """Blocks of a matrix product, without a check of what cancels: not exact."""
    half_norms = codebooks.square().sum(2).div(2).unsqueeze(1)
    rows = max(1, (1 << 22) // codebooks[..., 0].numel())
    return torch.cat([torch.baddbmm(half_norms, some, codebooks.mT, alpha=-1).argmin(2) for some in points.split(rows, 1)], 1)


def least_times(ways: dict[str, Callable[[], object]], seconds: float = 0.4) -> dict[str, float]:
    """Least seconds of each way. Each gets some calls in a row, since torch's threads spin a while after theirs and keep the cores."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(times.values()))) < 5:
        for name, way in ways.items():
            turn = time.perf_counter()
            while time.perf_counter() - turn < 0.02:
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in times.items()}


def once_part() -> None:
    """One search of codebooks never seen: what `auto` picks by (models/nearest.py). In a cell how many times faster it is than each other way."""
    tokens, most = 2, 1 << 24
    worst: dict[str, tuple[float, str]] = {}
    counts = (1, 16, 256, 4096, 100_000)
    rows = [("", *(f"N={count}" for count in counts))]
    for codes, dims in itertools.product((16, 256, 1024, 4096, 16384, 65536), (1, 4, 8, 16, 32)):
        cells = []
        for count in counts:
            points = random_points(tokens, min(count, most // codes // tokens), dims)
            codebooks = random_points(tokens, codes, dims, seed=1)
            ways: dict[str, Callable[[], object]] = {name: partial(once, name, points, codebooks) for name in ("boxes", "scan", "product")}
            ways |= {"plain": partial(by_product, points, codebooks), "auto": partial(nearest_codes, points, codebooks)}
            found = least_times(ways)
            picked = _pick_backend(points.device, codes, dims, points.shape[1])
            times = {name: found[name] / found["auto"] for name in ways if name not in ("auto", picked)}
            worst |= {name: (ratio, f"K={codes} D={dims} N={count}") for name, ratio in times.items() if ratio < worst.get(name, (math.inf,))[0]}
            cells.append(f"{picked} {1000 * found['auto']:.2f} ms: " + " ".join(f"{ratio:.1f}" for ratio in times.values()))
        rows.append((f"K={codes} D={dims}", *cells))
    table(
        f"one search, T={tokens}: what auto picks, its time, and how many times slower the other of boxes and scan, the blocked product, and a plain "
        f"product with argmin are; of more than {most:,} distances as many points as make these",
        rows,
    )
    for name, (ratio, cell) in worst.items():
        print(f"  least for {name}: {ratio:.2f} at {cell}")


def once(backend: str, points: Tensor, codebooks: Tensor) -> Tensor:
    return NearestCodes(codebooks, backend).query(points)


def mean_error(points: Tensor, codebooks: Tensor) -> float:
    chosen = codebooks.gather(1, nearest_codes(points, codebooks).unsqueeze(2).expand(-1, -1, points.shape[2]))
    return float((points - chosen).square().mean())


def sklearn_kmeans(points: Tensor, codes: int, iterations: int) -> Tensor:
    """The same rounds from random points of the data, by scikit-learn."""
    from sklearn.cluster import KMeans

    def fit(group: Tensor, seed: int) -> Tensor:
        model = KMeans(codes, init="random", n_init=1, max_iter=iterations, tol=0, random_state=seed, algorithm="lloyd")
        return torch.from_numpy(model.fit(group.numpy()).cluster_centers_)

    return torch.stack([fit(group, seed) for seed, group in enumerate(points)])


def kmeans_part(repeats: int) -> None:
    groups, count, codes, iterations = 8, 10_000, 1024, 10
    points = random_points(groups, count, 4)
    made: dict[str, Tensor] = {}

    def keep(name: str, fit: Callable[[], Tensor]) -> None:
        made[name] = fit()

    fits: dict[str, Callable[[], Tensor]] = {
        f"kmeans, {backend}": partial(kmeans, points, codes, iterations=iterations, seeds=list(range(groups)), backend=backend)
        for backend in ("faiss", "torch")
    }
    if importlib.util.find_spec("sklearn"):
        fits["scikit-learn KMeans"] = partial(sklearn_kmeans, points, codes, iterations)
    else:
        print("\nscikit-learn is not installed, so k-means is not compared with it: pip install -e '.[dev]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, that ten rounds are not enough to converge
        found = compare({name: partial(keep, name, fit) for name, fit in fits.items()}, repeats)
    rows = [("", "time", "mean squared error", "peak memory")]
    rows += [(name, f"{seconds:.2f} s", f"{mean_error(points, made[name]):.5f}", f"{mib:.0f} MiB") for name, (seconds, mib) in found.items()]
    table(f"k-means, {groups} groups of {count} points, D=4 K={codes}, {iterations} rounds, no early stop expected", rows)


def stage_part(device: str) -> None:
    """The whole of fit-codebooks on 10,000 latents of real photographs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "linear_vae.py").write_text(LINEAR_VAE)
        encode = EncodeLatentsConfig(
            images="photographs:train", store=str(folder / "store"), vae=f"{folder}/linear_vae.py:Linear", image_size=64, views=10, device=device
        )
        run_quietly(encode_latents(encode))
        config = FitCodebooksConfig(
            store=encode.store, out=str(folder / "codebooks"), codes=1024, max_samples=10_000, backend="torch", device=device, calibration_samples=512
        )
        marks: list[tuple[str, float]] = []
        _, mib = measured(partial(timed_tasks, config, marks), device)
        rows = [("", "time", "peak memory"), *((task, f"{seconds:.1f} s", "") for task, seconds in marks)]
        rows.append(("all", f"{sum(seconds for _, seconds in marks):.1f} s", f"{mib:.0f} MiB"))
        table("fit-codebooks, T=512 D=4 K=1024, 10,000 latents (32,8,8), decoder transform, 20 rounds", rows)


def timed_tasks(config: FitCodebooksConfig, marks: list[tuple[str, float]]) -> None:
    """Append (task, seconds) of a whole run."""
    task, started = "open and read", time.perf_counter()
    for event in fit_codebooks(config):
        if isinstance(event, Begin | Result):
            marks.append((task, time.perf_counter() - started))
            task, started = event.task if isinstance(event, Begin) else "", time.perf_counter()


def gpu_part(repeats: int) -> None:
    """Against cdist under vmap, as a share of the multiply-add floor."""
    if not torch.cuda.is_available():
        print("\nno GPU here: its rows are left out")
        return
    properties = torch.cuda.get_device_properties(0)
    for codes in (1024, 16384):
        points, codebooks = random_points(512, 256, 4, device="cuda"), random_points(512, codes, 4, device="cuda", seed=1)
        plain = torch.vmap(lambda group, codebook: torch.cdist(group, codebook).argmin(1), chunk_size=16)
        ways: dict[str, Callable[[], object]] = {
            "cdist under vmap": partial(plain, points, codebooks),
            "fused": partial(NearestCodes(codebooks).query, points),
            "product": partial(NearestCodes(codebooks, "product").query, points),
        }
        found = compare(ways, repeats, "cuda")
        # 128 multiply-adds a cycle on each multiprocessor since Ampere (64 on the A100).
        clock_hz = 1e3 * getattr(properties, "clock_rate", 1.7e6)
        floor = points.shape[0] * points.shape[1] * codes * 4 / (properties.multi_processor_count * 128 * clock_hz)
        rows = [("", "time", "times faster", "share of the floor", "peak memory")]
        for name, (seconds, mib) in found.items():
            times = found["cdist under vmap"][0] / seconds
            rows.append((name, f"{1000 * seconds:.2f} ms", f"{times:.1f}", f"{100 * floor / seconds:.0f} %", f"{mib:.0f} MiB"))
        table(f"assignment on {properties.name}, T=512 N=256 D=4 K={codes} (aim: 20 times)", rows)


def imagenet_part(latents: int, device: str) -> None:
    """The whole of fit-codebooks at ImageNet's size, from a store on disk (5.3 GB) to codebooks; with fewer latents also fewer codes."""
    if not latents and device != "cuda":
        print("\nno GPU here: codebooks of ImageNet's size are left out; --synthetic N fits them on N latents")
        return
    latents = latents or IMAGENET
    codes = min(16384, 2 ** int(math.log2(max(2, latents / POINTS_PER_CODE))))
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        made_s, _ = measured(partial(make_store, store, {"train": latents}))
        config = FitCodebooksConfig(store=str(store), out=f"{name}/codebooks", codes=codes, transform="pca", device=device)
        marks: list[tuple[str, float]] = []
        _, mib = measured(partial(timed_tasks, config, marks), device)
    rows = [("", "time", "peak memory"), ("(making the store)", f"{made_s:.1f} s", "")]
    rows += [(task, f"{seconds:.1f} s", "") for task, seconds in marks]
    rows.append(("all but the store", f"{sum(seconds for _, seconds in marks):.1f} s", f"{mib:.0f} MiB"))
    table(f"fit-codebooks, T=512 D=4 K={codes}, {latents} synthetic latents (32,8,8), pca transform, {config.iterations} rounds", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--synthetic", type=int, default=0, help="latents of the part imagenet; 0: those of ImageNet on a GPU, none elsewhere")
    args = parser.parse_args()
    parts = args.part or PARTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()}-core CPU ({platform.machine()})"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "nearest" in parts:
        nearest_part(args.repeats)
    if "once" in parts:
        once_part()
    if "kmeans" in parts:
        kmeans_part(max(1, args.repeats - 2))
    if "stage" in parts:
        stage_part(device)
    if "gpu" in parts:
        gpu_part(args.repeats)
    if "imagenet" in parts:
        imagenet_part(args.synthetic, device)


if __name__ == "__main__":
    main()
