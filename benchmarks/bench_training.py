"""What a training step costs: over the bare arithmetic of its network, and against a plain loop as the paper's. Ratios come from this one run.

    python benchmarks/bench_training.py

On synthetic latents (32,8,8) in a real store, so it runs anywhere; what is compared takes turns, and each ratio is the median of the turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from revq.cache.manifest import OK, ManifestRow
from revq.cache.store import Encoding, LatentStore
from revq.cache.writer import SplitPlan, SplitWriter
from revq.files import write_json
from revq.models.codebooks import CODEBOOKS_KIND, Codebooks, save_codebooks
from revq.models.device import bf16_is_fast, pick_device
from revq.models.rectifier import Rectifier
from revq.models.transform import LatentTransform
from revq.stages.events import Advance
from revq.stages.network import open_network
from revq.stages.train_rectifier import TrainRectifierConfig, train_rectifier

SHAPE, IMAGENET, EPOCHS = (32, 8, 8), 1_281_167, 100
LOG_EVERY = 25
CLOCK = [time.perf_counter]
PEAK_TFLOPS = {"H100": 989.0, "A100": 312.0, "4090": 165.2}  # dense bf16 with float32 sums, from NVIDIA's data sheets


def make_store(path: Path, rows: int) -> LatentStore:
    """A store of white latents; training does not look at what they are."""
    vae = {"id": "none", "class_name": "None", "revision": None, "config_sha256": "", "weights_sha256": "", "fingerprint": "none"}
    encoding = Encoding(vae=vae, image_size=64, latent_shape=SHAPE, dtype="float16")
    for name, images in (("train", rows), ("val", 16)):
        plan = SplitPlan(name=name, images=images, views=1, seed=0, source="none", order_sha256="", chunk_rows=256, shard_rows=2048)
        writer = SplitWriter(path, encoding, plan)
        for shard in writer.todo:
            latents = np.random.default_rng(shard.start).normal(size=(shard.stop - shard.start, *SHAPE)).astype(np.float16)
            numbers = range(shard.start, shard.stop)
            manifest = [ManifestRow(row=n, key=str(n), view=0, status=OK, source="none", label=0, class_name="") for n in numbers]
            writer.write_shard(shard, latents, manifest)
        writer.finish()
    return LatentStore.open(path)


def make_codebooks(folder: Path, store: LatentStore, codes: int) -> Path:
    """512 codebooks of random data points, plain coordinates."""
    split = store["train"]
    transform = LatentTransform(mean=torch.from_numpy(split.mean).float(), std=torch.from_numpy(split.variance).sqrt().float(), tokens=512)
    points = torch.randn(512, codes, 4, generator=torch.Generator().manual_seed(0))
    identity = {"store_fingerprint": store.fingerprint, "transform": "standardize", "rectifier_share": 0.0, "tokens": 512, "codes": codes}
    write_json(folder / "config.json", {"kind": CODEBOOKS_KIND, "identity": identity})
    counts = torch.zeros(512, codes, dtype=torch.int64)
    save_codebooks(folder, Codebooks(transform=transform, codebooks=points, counts=counts, sensitivity=None, identity=identity))
    return folder


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of `work`, with the device's queue empty before and after."""
    synchronize(device)
    started = CLOCK[0]()
    work()
    synchronize(device)
    return CLOCK[0]() - started


class StageSteps:
    """train-rectifier itself, a log interval of steps at a time; validation and checkpoints lie outside."""

    def __init__(self, store: Path, codebooks: Path, out: Path, device: torch.device, **settings: object) -> None:
        config = TrainRectifierConfig(
            store=str(store), codebooks=str(codebooks), out=str(out), steps=100_000, evaluations=1, device=str(device), **settings
        )  # type: ignore[arg-type]
        self.device = device
        self.events: Iterator[object] = train_rectifier(config)
        self.advance()  # the evaluation at step 0
        self.advance()  # first steps are slower

    def advance(self) -> None:
        while not isinstance(next(self.events), Advance):
            pass

    def seconds_per_step(self) -> float:
        return seconds_of(self.advance, self.device) / LOG_EVERY


class BareSteps:
    """Forward, backward and optimizer of the same network on a batch that lies ready, in the same precision."""

    def __init__(self, device: torch.device, *, batch: int, width: int, depth: int, block: str) -> None:
        rectifier = Rectifier(channels=SHAPE[0], width=width, depth=depth, block=block).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.latents, self.device = torch.randn(batch, *SHAPE, device=device), device
        self.network, _ = open_network(rectifier, self.latents, precision="auto", compiling="auto")
        self.optimizer = torch.optim.AdamW(rectifier.parameters(), lr=5e-4, fused=True)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.network(self.latents), self.latents).backward()
        self.optimizer.step()

    def seconds_per_step(self) -> float:
        return seconds_of(lambda: [self.step() for _ in range(LOG_EVERY)], self.device) / LOG_EVERY

    def flops(self) -> float:
        """Of forward and backward, counted by torch."""
        with FlopCounterMode(display=False) as counter:
            F.mse_loss(self.network(self.latents), self.latents).backward()
        return float(counter.get_total_flops())


class PaperSteps:
    """Our plain reconstruction of how the paper's loop works (arXiv 2507.10547), in float32.

    A DataLoader over a TensorDataset with a worker for each processor, all distances by torch.cdist, AdamW with PyTorch's defaults for two
    parameter groups, and `.item()` of both losses at each step.
    """

    def __init__(
        self, latents: torch.Tensor, codebooks: torch.Tensor, device: torch.device, *, batch: int, width: int, depth: int, block: str
    ) -> None:
        self.device, self.loader = device, None
        self.data = DataLoader(TensorDataset(latents), batch_size=batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
        self.batches = iter(self.data)
        self.rectifier = Rectifier(channels=SHAPE[0], width=width, depth=depth, block=block).to(device)
        self.codebooks = torch.nn.Parameter(codebooks.to(device))
        groups = [{"params": self.rectifier.parameters(), "lr": 5e-4}, {"params": [self.codebooks], "lr": 0.01, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.step()

    def step(self) -> None:
        latents = next(self.batches, None) or next(iter(self.data))
        latent = latents[0].to(self.device).float()
        points = latent.flatten(1).unflatten(1, (len(self.codebooks), -1)).transpose(0, 1)
        with torch.no_grad():
            indices = torch.cdist(points, self.codebooks).argmin(2)
        chosen = self.codebooks.gather(1, indices.unsqueeze(2).expand(-1, -1, self.codebooks.shape[2]))
        codebook_loss = F.mse_loss(chosen, points)
        quantized = chosen.detach().transpose(0, 1).reshape_as(latent)
        loss = F.mse_loss(self.rectifier(quantized), latent)
        self.optimizer.zero_grad()
        (loss + codebook_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.rectifier.parameters(), 1.0)
        self.optimizer.step()
        loss.item(), codebook_loss.item()

    def seconds_per_step(self) -> float:
        return seconds_of(self.step, self.device)


class OurSteps:
    """The same work by train-rectifier's own step, one at a time."""

    def __init__(self, store: Path, codebooks: Path, out: Path, device: torch.device, **settings: object) -> None:
        from revq.models.codebooks import load_codebooks
        from revq.stages import train_rectifier as stage
        from revq.stages.train_state import new_state
        from revq.stages.training_data import open_inputs

        config = TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=str(out), steps=1000, device=str(device), **settings)  # type: ignore[arg-type]
        fitted = load_codebooks(codebooks)
        inputs = open_inputs(config, LatentStore.open(store), fitted)
        state = new_state(config, inputs, fitted.codebooks)
        preparing = stage._prepare(config, inputs, state, out)
        while True:
            try:
                next(preparing)
            except StopIteration as stop:
                run = stop.value
                break
        self.device = device
        self.step = lambda: stage._step(config, inputs, state, run)
        self.step()

    def seconds_per_step(self) -> float:
        return seconds_of(self.step, self.device)


def turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each side, which take turns."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            measured[name].append(measure())
    return measured


def ratio(measured: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(measured[one], measured[other], strict=True))


def overhead_rows(folder: Path, device: torch.device, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The stage's step against bare arithmetic, and what ImageNet would take at this rate."""
    store = make_store(folder / "store", 4 * args.batch)
    codebooks = make_codebooks(folder / "codebooks", store, 16)
    network = {"width": args.width, "depth": args.depth, "block": args.block}
    stage = StageSteps(folder / "store", codebooks, folder / "run", device, batch_size=args.batch, codebook_lr=0.0, **network)
    bare = BareSteps(device, batch=args.batch, **network)
    measured = turns({"stage": stage.seconds_per_step, "bare": bare.seconds_per_step}, args.repeats)
    step, flops = statistics.median(measured["stage"]), bare.flops()
    images_per_s, tflops = args.batch / step, flops / step / 1e12
    rows = [
        (f"forward, backward and optimizer alone ({args.block}, width {args.width}, depth {args.depth}, batch {args.batch})",
         f"{1000 * statistics.median(measured['bare']):.1f} ms"),
        ("train-rectifier step, frozen codebooks", f"{1000 * step:.1f} ms"),
        ("  ratio (aim: at most 1.05)", f"{ratio(measured, 'stage', 'bare'):.2f}"),
        ("  images/s", f"{images_per_s:.0f}"),
        (f"  {flops / args.batch / 1e9:.3f} GFLOP an image, reached", f"{tflops:.3f} TFLOP/s"),
        (f"  {EPOCHS} * {IMAGENET} images / {images_per_s:.0f} images/s / 3600 (this network)", f"{EPOCHS * IMAGENET / images_per_s / 3600:.1f} h"),
    ]  # fmt: skip
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = args.peak_tflops or next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
        rows.append(("  share of the card's peak", f"{tflops / peak:.2f}" if peak else "give --peak-tflops"))
    return rows


def paper_rows(folder: Path, device: torch.device, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The paper's size (width 512, depth 3, T=512, K=16384): its loop against ours, with codebooks that train and with frozen ones."""
    store = make_store(folder / "paper-store", 64 * args.paper_batch)
    codebooks = make_codebooks(folder / "paper-codebooks", store, args.codes)
    latents = torch.from_numpy(np.asarray(store["train"].latents[:]))
    points = torch.randn(512, args.codes, 4, generator=torch.Generator().manual_seed(0))
    network = {"width": 512, "depth": 3, "block": args.paper_block}
    sides: dict[str, Callable[[], float]] = {}
    sides["paper"] = PaperSteps(latents, points, device, batch=args.paper_batch, **network).seconds_per_step
    for name, lr in (("trained", 0.01), ("frozen", 0.0)):
        settings = {"batch_size": args.paper_batch, "codebook_lr": lr, **network}
        sides[name] = OurSteps(folder / "paper-store", codebooks, folder / name, device, **settings).seconds_per_step
    measured = turns(sides, args.repeats)
    size = f"{args.paper_block}, width 512, depth 3, T=512, K={args.codes}, batch {args.paper_batch}"
    milliseconds = {name: f"{1000 * statistics.median(values):.0f} ms" for name, values in measured.items()}
    return [
        (f"the paper's loop, written plainly ({size})", milliseconds["paper"]),
        ("train-rectifier step, codebooks trained as well", milliseconds["trained"]),
        ("  times faster (aim: at least 1.5 on a CPU, 8 on a GPU)", f"{ratio(measured, 'paper', 'trained'):.2f}"),
        ("train-rectifier step, frozen codebooks", milliseconds["frozen"]),
        ("  times faster", f"{ratio(measured, 'paper', 'frozen'):.2f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", default="conv")
    parser.add_argument("--codes", type=int, default=16384, help="of the paper's loop")
    parser.add_argument("--paper-batch", type=int, default=0, help="0: 256 on CUDA, 32 on the CPU")
    parser.add_argument("--paper-block", default="efficientvit")
    parser.add_argument("--peak-tflops", type=float, help="of the card, dense bf16")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of this process in place of wall time: for a machine shared with others"
    )
    args = parser.parse_args()
    if args.cpu_time:
        CLOCK[0] = time.process_time
    device = pick_device(args.device)
    args.paper_batch = args.paper_batch or (256 if device.type == "cuda" else 32)
    with tempfile.TemporaryDirectory() as name:
        rows = overhead_rows(Path(name), device, args) + paper_rows(Path(name), device, args)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()}-core CPU ({platform.machine()})"
    precision = "bf16" if bf16_is_fast(device) else "float32"
    clock = "processor" if args.cpu_time else "wall"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, rectifier in {precision}, {clock} time\n")
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value:>14}" for label, value in rows))


if __name__ == "__main__":
    main()
