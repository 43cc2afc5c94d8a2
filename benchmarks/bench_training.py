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
from synthetic import SHAPE, make_store
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from revq.cache.store import LatentStore
from revq.files import write_json
from revq.models.codebooks import CODEBOOKS_KIND, Codebooks, load_codebooks, save_codebooks
from revq.models.device import bf16_is_fast, pick_device
from revq.models.quantizer import MultiGroupQuantizer
from revq.models.rectifier import Rectifier
from revq.models.transform import LatentTransform
from revq.stages.configs import TrainRectifierConfig
from revq.stages.events import Advance, Begin
from revq.stages.train_rectifier import train_rectifier, train_step
from revq.stages.training.data import open_inputs
from revq.stages.training.network import open_network
from revq.stages.training.run import open_run
from revq.stages.training.state import new_state

IMAGENET, EPOCHS = 1_281_167, 100
PAPER = {"width": 512, "depth": 3}
LOG_EVERY = 25
CLOCK = [time.perf_counter]
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.2}  # dense bf16 with float32 sums, from NVIDIA's data sheets


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
        self.device, self.done = device, 0
        self.events: Iterator[object] = train_rectifier(config)
        while not (isinstance(event := next(self.events), Begin) and event.task == "train"):
            pass
        self.advance()  # the evaluation at step 0
        self.advance()  # first steps are slower

    def advance(self) -> None:
        while not isinstance(event := next(self.events), Advance):
            pass
        self.done = event.done

    def seconds_per_step(self) -> float:
        before = self.done
        return seconds_of(self.advance, self.device) / (self.done - before)


class BareSteps:
    """Forward, backward and optimizer of the same network on a batch that lies ready, in the same precision."""

    def __init__(self, device: torch.device, *, batch: int, width: int, depth: int, block: str) -> None:
        rectifier = Rectifier(channels=SHAPE[0], width=width, depth=depth, block=block).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.latents, self.device = torch.randn(batch, *SHAPE, device=device), device
        self.network, _ = open_network(rectifier, self.latents, bf16=bf16_is_fast(device), compiling="auto")
        self.optimizer = torch.optim.AdamW(rectifier.parameters(), lr=5e-4, fused=True)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.network(self.latents), self.latents).backward()
        self.optimizer.step()

    def seconds_per_step(self) -> float:
        return seconds_of(lambda: [self.step() for _ in range(LOG_EVERY)], self.device) / LOG_EVERY

    def flops(self) -> float:
        """Of forward and backward, counted by torch; it does not see into what is compiled, so on the plain network."""
        with FlopCounterMode(display=False) as counter:
            F.mse_loss(self.network.rectifier(self.latents), self.latents).backward()
        return float(counter.get_total_flops())


class PaperSteps:
    """Our plain reconstruction of how the paper's loop works (arXiv 2507.10547), in float32.

    A DataLoader over a TensorDataset with a worker for each processor, all distances by torch.cdist, AdamW with PyTorch's defaults for two
    parameter groups, and `.item()` of both losses at each step. An epoch here is short, so the start of its workers is timed by itself and
    shared among as many steps as an epoch of ImageNet has. The workers read ahead while the others have their turn, which is in its favour.
    """

    def __init__(
        self, latents: torch.Tensor, codebooks: torch.Tensor, device: torch.device, *, batch: int, steps: int, width: int, depth: int, block: str
    ) -> None:
        self.device, self.steps = device, steps
        self.data = DataLoader(TensorDataset(latents), batch_size=batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
        self.rectifier = Rectifier(channels=SHAPE[0], width=width, depth=depth, block=block).to(device)
        self.codebooks = torch.nn.Parameter(codebooks.to(device))
        groups = [{"params": self.rectifier.parameters(), "lr": 5e-4}, {"params": [self.codebooks], "lr": 0.01, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.start_s = seconds_of(self.start_epoch, device)
        self.epoch_steps = IMAGENET // batch
        self.step()

    def start_epoch(self) -> None:
        """New workers, and the wait for their first batch, which is put aside."""
        self.batches = iter(self.data)
        next(self.batches)
        self.left = len(self.data) - 1

    def step(self) -> None:
        latents = next(self.batches)
        self.left -= 1
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
        if self.left < self.steps:
            self.start_s = seconds_of(self.start_epoch, self.device)
        return seconds_of(lambda: [self.step() for _ in range(self.steps)], self.device) / self.steps + self.start_s / self.epoch_steps


class OurSteps:
    """The same work by train-rectifier's own step."""

    def __init__(self, store: Path, codebooks: Path, out: Path, device: torch.device, *, steps: int, **settings: object) -> None:
        config = TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=str(out), steps=10_000, device=str(device), **settings)  # type: ignore[arg-type]
        fitted = load_codebooks(codebooks)
        inputs = open_inputs(config, LatentStore.open(store), fitted)
        state = new_state(config, inputs, fitted.codebooks)
        opening = open_run(config, inputs, state, out)
        while True:
            try:
                next(opening)
            except StopIteration as stop:
                run = stop.value
                break
        self.device, self.steps = device, steps
        self.step = lambda: train_step(run, state)
        self.step()

    def seconds_per_step(self) -> float:
        return seconds_of(lambda: [self.step() for _ in range(self.steps)], self.device) / self.steps


def turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each side, which take turns."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            measured[name].append(measure())
    return measured


def ratio(measured: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(measured[one], measured[other], strict=True))


def hours(step_s: float, batch: int) -> tuple[str, str]:
    """A row: how long the epochs of ImageNet would take, with the arithmetic."""
    steps = EPOCHS * (IMAGENET // batch)
    return f"  {EPOCHS} * ({IMAGENET} // {batch}) steps * {step_s:.4f} s / 3600", f"{steps * step_s / 3600:.1f} h"


def overhead_rows(folder: Path, device: torch.device, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The stage's step against bare arithmetic, and what ImageNet would take at this rate."""
    store = make_store(folder / "store", {"train": 4 * args.batch, "val": 16})
    codebooks = make_codebooks(folder / "codebooks", store, args.codes if device.type == "cuda" else 16)
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
        hours(step, args.batch),
    ]  # fmt: skip
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = args.peak_tflops or next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
        rows.append(("  share of the card's peak", f"{tflops / peak:.2f}" if peak else "give --peak-tflops"))
    return rows


def paper_bytes(batch: int, codes: int) -> int:
    """An estimate of what a step of the paper's loop holds at once: all distances, and a second time where cdist and argmin need it."""
    return 2 * batch * 512 * codes * 4


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def largest_batch(device: torch.device, codes: int) -> int:
    """256 as in the paper, or the largest power of two below it with which a step of the paper's loop takes half of what memory is left."""
    batch = 256
    while batch > 1 and paper_bytes(batch, codes) > available_bytes(device) // 2:
        batch //= 2
    needed, left = (size / 2**30 for size in (paper_bytes(batch, codes), available_bytes(device)))
    print(f"batch {batch} for the paper's loop: an estimated {needed:.1f} GiB of the {left:.1f} GiB left")
    return batch


def paper_rows(folder: Path, device: torch.device, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The paper's size (T=512, K=16384): its loop against ours, with codebooks that train and with frozen ones."""
    batch = args.paper_batch or largest_batch(device, args.codes)
    steps = LOG_EVERY if device.type == "cuda" else 1
    store = make_store(folder / "paper-store", {"train": (2 * steps + 14) * batch, "val": 16})
    codebooks = make_codebooks(folder / "paper-codebooks", store, args.codes)
    latents = torch.from_numpy(np.asarray(store["train"].latents[:]))
    points = torch.randn(512, args.codes, 4, generator=torch.Generator().manual_seed(0))
    network = {"width": args.paper_width, "depth": PAPER["depth"], "block": args.paper_block}
    ours: dict[str, dict[str, object]] = {"trained": {"codebook_lr": 0.01}, "frozen": {"codebook_lr": 0.0}}
    if bf16_is_fast(device):  # the paper's loop is in float32, so ours in float32 as well
        ours["trained, float32"] = {"codebook_lr": 0.01, "precision": "fp32"}
    sides: dict[str, Callable[[], float]] = {}
    sides["paper"] = PaperSteps(latents, points, device, batch=batch, steps=steps, **network).seconds_per_step
    for name, settings in ours.items():
        made = OurSteps(folder / "paper-store", codebooks, folder / name, device, steps=steps, batch_size=batch, **settings, **network)
        sides[name] = made.seconds_per_step
    measured = turns(sides, args.repeats)
    size = f"{args.paper_block}, width {args.paper_width}, depth {PAPER['depth']}, T=512, K={args.codes}, batch {batch}"
    precision = "bf16" if bf16_is_fast(device) else "float32"
    titles = {
        "paper": f"the paper's loop, written plainly, in float32 ({size})",
        "trained": f"train-rectifier step in {precision}, codebooks trained as well (aim: 1.5 times faster on a CPU, 8 on a GPU)",
        "trained, float32": "train-rectifier step in float32, codebooks trained as well",
        "frozen": f"train-rectifier step in {precision}, frozen codebooks",
    }
    rows = []
    for name, title in titles.items():
        if name in measured:
            step = statistics.median(measured[name])
            faster = [] if name == "paper" else [("  times faster than the paper's loop", f"{ratio(measured, 'paper', name):.2f}")]
            rows += [(title, f"{1000 * step:.0f} ms"), *faster, hours(step, batch)]
    return rows


def gradient_rows(device: torch.device, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Looking codes up and back as the quantizer does it, against plain indexing, whose gradient a CPU sums in whichever order threads come."""
    quantizer = MultiGroupQuantizer(torch.randn(512, args.codes, 4)).to(device)
    indices = torch.randint(args.codes, (args.batch, 512), device=device)
    tokens = torch.arange(512, device=device)

    def seconds(look_up: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def step() -> None:
            quantizer.codebooks.grad = None
            look_up().square().sum().backward()

        step()
        return lambda: seconds_of(lambda: [step() for _ in range(LOG_EVERY)], device) / LOG_EVERY

    sides = {"fixed": seconds(lambda: quantizer.decode(indices)), "plain": seconds(lambda: quantizer.codebooks[tokens, indices])}
    measured = turns(sides, args.repeats)
    return [
        (f"codes looked up and their gradient, in a fixed order (T=512, K={args.codes}, batch {args.batch})",
         f"{1000 * statistics.median(measured['fixed']):.1f} ms"),
        ("  the same by plain indexing, over it", f"{ratio(measured, 'plain', 'fixed'):.2f}"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=0, help="0: the paper's 512 on CUDA, 128 on the CPU")
    parser.add_argument("--depth", type=int, default=PAPER["depth"])
    parser.add_argument("--batch", type=int, default=0, help="0: the paper's 256 on CUDA, 64 on the CPU")
    parser.add_argument("--block", default="conv")
    parser.add_argument("--codes", type=int, default=16384, help="of the paper's loop, and on CUDA of the step against bare arithmetic")
    parser.add_argument("--paper-batch", type=int, default=0, help="0: 256, or the largest whose distances fit in half of the memory left")
    parser.add_argument("--paper-width", type=int, default=PAPER["width"])
    parser.add_argument("--paper-block", default="efficientvit")
    parser.add_argument("--peak-tflops", type=float, help="of the card, dense bf16")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of this process in place of wall time: for a machine shared with others"
    )
    args = parser.parse_args()
    if args.cpu_time:
        CLOCK[0] = time.process_time
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    args.width, args.batch = args.width or (PAPER["width"] if on_gpu else 128), args.batch or (256 if on_gpu else 64)
    with tempfile.TemporaryDirectory() as name:
        rows = [*gradient_rows(device, args), *overhead_rows(Path(name), device, args), *paper_rows(Path(name), device, args)]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()}-core CPU ({platform.machine()})"
    precision = "bf16" if bf16_is_fast(device) else "float32"
    clock = "processor" if args.cpu_time else "wall"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, rectifier in {precision}, {clock} time\n")
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value:>14}" for label, value in rows))


if __name__ == "__main__":
    main()
