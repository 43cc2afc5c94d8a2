"""What the latent store costs over bare files: reading, streaming, writing, memory, encoding, and the table that chose its layout.

    python benchmarks/bench_store.py                       about 200,000 latents of 4 KiB, 819 MB
    python benchmarks/bench_store.py --rows 1281167        ImageNet: 5.2 GB, needs 24 GB of disk
    python benchmarks/bench_store.py --parts layouts --layouts all

The latents are real ones, since others compress unlike them: the ImageNet sample and TAEF2 of REVQ_SHARED in several views, or without it the
photographs of scikit-image and the embedded VAE, repeated with a period larger than a chunk, so that no codec sees a repeat. Every file is in the
page cache. What is compared is measured in turns; each figure is the best of its turns, which other work on the machine disturbs least, and each
ratio is of two such figures: above 1 means faster than the bare file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from revq import LatentStore
from revq.cache.batches import ResidentLatents, StreamingLatents
from revq.cache.manifest import OK, ManifestRow
from revq.cache.shards import ShardReader
from revq.cache.store import LatentSplit
from revq.cache.writer import SplitPlan, SplitWriter, shard_layout
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REVQ_SHARED", REPOSITORY.parent / "shared")).resolve()
PARTS = ("write", "load", "stream", "memory", "encode", "codecs", "layouts")
VIEWS = 3
BATCH = 256
BUFFER_BYTES = 256 << 20
TABLE_BYTES = 256 << 20
BLOCK_ROWS = 8192
CODECS: dict[str, list[Any]] = {
    "crc32c alone": [],
    "zstd 1": [ZstdCodec(level=1)],
    "blosc lz4, shuffle": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)],
    "blosc lz4, bitshuffle": [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)],
    "blosc zstd 1, shuffle": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2)],
    "blosc zstd 1, bitshuffle": [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=2)],
}
SHUFFLES = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
CHUNK_MIB, SHARD_MIB = (0.5, 2, 8), (16, 32, 64, 128)
CHOSEN = ("blosc lz4, bitshuffle", 2, 32)
Row = tuple[str, str]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor_seconds(work: Callable[[], object]) -> float:
    """Of all threads of this process: what other work on the machine disturbs least."""
    started = time.process_time()
    work()
    return time.process_time() - started


def best(repeats: int, *works: Callable[[], object], clock: Callable[[Callable[[], object]], float] = seconds) -> list[float]:
    """Least seconds of each, measured in turns."""
    turns = [[clock(work) for work in works] for _ in range(repeats)]
    return [min(times) for times in zip(*turns, strict=True)]


def sources() -> tuple[dict[str, str], dict[str, Any]]:
    """(images of each split, settings of encode-latents): real photographs and a real VAE, from REVQ_SHARED or else from packages."""
    images = SHARED / "data" / "imagenet-sample"
    if images.is_dir():
        os.environ["REVQ_SHARED"] = str(SHARED)
        return {name: str(images / name) for name in ("train", "val")}, {"vae": f"{REPOSITORY / 'tests' / 'taef2_plugin.py'}:load", "image_size": 64}
    return {"train": "photographs:train", "val": "photographs:held-out"}, {"vae": "revq-tiny-f8c8", "image_size": 128}


def encode(store: Path, images: str, split: str, settings: dict[str, Any], **more: Any) -> float:
    """Images per second of encode-latents."""
    config = EncodeLatentsConfig(images=images, store=str(store), split=split, **{"batch_size": 64, **settings, **more})
    return float(run_quietly(encode_latents(config))["images_per_s"])


class Latents:
    """The rows of the benchmark, made block by block: real latents, over and over."""

    def __init__(self, real: Path, rows: int) -> None:
        """`real` is a store of latents to repeat; it is made where it is not there."""
        if not real.exists():
            images, settings = sources()
            for split in images:
                encode(real, images[split], split, settings, views=VIEWS)
        store = LatentStore.open(real)
        self.encoding, self.rows = store.encoding, rows
        self.real = np.concatenate([np.asarray(store[split].latents[:]) for split in store.splits])
        self.row_bytes = self.real[0].nbytes

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        return self.real[np.arange(start, stop) % len(self.real)]

    def write_raw(self, path: Path, rows: int) -> float:
        """Seconds that numpy.tofile needs for one flat file, fsync included."""
        spent = 0.0
        with open(path, "wb") as file:
            for start in range(0, rows, BLOCK_ROWS):
                block = self.block(start, min(start + BLOCK_ROWS, rows))
                spent += seconds(lambda block=block: block.tofile(file))
            return spent + seconds(lambda: os.fsync(file.fileno()))

    def write_split(self, path: Path) -> float:
        """Seconds that SplitWriter needs for one split: values, manifest, sums, checksums, every file fsynced."""
        chunk_rows, shard_rows = shard_layout(self.rows, 1, self.row_bytes)
        plan = SplitPlan(name="train", images=self.rows, views=1, seed=0, source="b", order_sha256="", chunk_rows=chunk_rows, shard_rows=shard_rows)
        opened = time.perf_counter()
        writer = SplitWriter(path, self.encoding, plan)
        spent = time.perf_counter() - opened
        for shard in writer.todo:
            block = self.block(shard.start, shard.stop)
            manifest = [manifest_row(row) for row in range(shard.start, shard.stop)]
            spent += seconds(lambda shard=shard, block=block, manifest=manifest: writer.write_shard(shard, block, manifest))
        return spent + seconds(writer.finish)


def manifest_row(row: int) -> ManifestRow:
    key = f"n01440764/n01440764_{row}.JPEG"
    return ManifestRow(row=row, source="train", key=key, label=row // 1300, class_name="n01440764", view=0, status=OK, sha256=f"{row:064x}")


def open_split(store: Path) -> LatentSplit:
    return LatentStore.open(store)["train"]


def load_rows(latents: Latents, raw: Path, split: LatentSplit, repeats: int) -> list[Row]:
    """The resident load against numpy.fromfile, and against zarr's own reading."""
    stored = best(repeats, lambda: np.fromfile(raw, np.float16), lambda: ResidentLatents(split), lambda: read_by_zarr(split))
    array = make_array(raw.with_name("plain.zarr"), split.latents.shape, [], split.latents.chunks[0], split.shard_rows)
    for start in range(0, len(split), split.shard_rows):
        array[start : start + split.shard_rows] = latents.block(start, min(start + split.shard_rows, len(split)))
    os.sync()
    plain = best(repeats, lambda: np.fromfile(raw, np.float16), lambda: read_array(array))
    shutil.rmtree(raw.with_name("plain.zarr"))
    names = [
        "numpy.fromfile",
        "resident load, as stored",
        "the same by zarr's own reading and torch.isfinite",
        "numpy.fromfile",
        "resident load, uncompressed",
    ]
    ratios = [stored[0] / time for time in stored] + [plain[0] / time for time in plain]
    size = raw.stat().st_size
    return [
        (name, f"{time:.2f} s, {size / time / 1e9:.2f} GB/s, ratio {ratio:.2f}")
        for name, time, ratio in zip(names, [*stored, *plain], ratios, strict=True)
    ]


def read_by_zarr(split: LatentSplit) -> NDArray[Any]:
    """What the resident load was before: the plain path, checked for values that are not finite."""
    out = torch.empty(split.latents.shape, dtype=torch.float16)

    def read(start: int) -> None:
        block = torch.from_numpy(np.asarray(split.latents[start : start + split.shard_rows]))
        assert bool(torch.isfinite(block).flatten(1).all())
        out[start : start + len(block)] = block

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, range(0, len(split), split.shard_rows)))
    return out.numpy()


def stream_rows(split: LatentSplit, repeats: int, step_s: float = 0.005) -> list[Row]:
    """An epoch through a buffer against one over resident latents, and whether batches are ready in time."""
    resident, streaming = ResidentLatents(split), StreamingLatents(split, buffer_bytes=BUFFER_BYTES)

    def passed(latents: ResidentLatents | StreamingLatents) -> None:
        for _, batch in latents.epoch(batch_size=BATCH, seed=0, epoch=0):
            assert len(batch) == BATCH

    whole, read = best(repeats, lambda: passed(resident), lambda: passed(streaming))
    waits = list(itertools.islice(waiting_times(streaming.epoch(batch_size=BATCH, seed=0, epoch=0), step_s), 1, None))
    return [
        (f"resident epoch, batches of {BATCH}, nothing done with them", f"{whole:.2f} s"),
        (f"streaming epoch, buffer of {BUFFER_BYTES >> 20} MiB", f"{read:.2f} s, ratio {whole / read:.2f}"),
        (f"batches ready within 1 ms, steps of {step_s * 1000:.0f} ms elsewhere", f"{100 * np.mean(np.array(waits) < 1e-3):.1f} %"),
        ("  time waited, of all steps", f"{100 * sum(waits) / (len(waits) * step_s):.1f} %"),
    ]


def waiting_times(batches: Iterator[object], step_s: float) -> Iterator[float]:
    """Seconds from asking for a batch to having it, when each is followed by a step that leaves the processor idle."""
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            return
        yield time.perf_counter() - asked
        time.sleep(step_s)


def write_rows(latents: Latents, folder: Path) -> list[Row]:
    """SplitWriter against numpy.tofile, both synced to the disk."""
    bare, split = latents.write_raw(folder / "latents.bin", latents.rows), latents.write_split(folder / "store.zarr")
    size = (folder / "latents.bin").stat().st_size
    stored = sum(file.stat().st_size for file in (folder / "store.zarr" / "train").rglob("*") if file.is_file())
    return [
        ("numpy.tofile and fsync", f"{bare:.2f} s, {size / bare / 1e9:.2f} GB/s"),
        ("SplitWriter, fsync of every file, manifest, checksums", f"{split:.2f} s, {size / split / 1e9:.2f} GB/s, ratio {bare / split:.2f}"),
        ("share of the bytes on disk", f"{100 * stored / size:.1f} %"),
    ]


LOAD_PTH = "import torch; latents = torch.load({path!r}, weights_only=True)['latents']; print(len(latents))"
LOAD = "from revq import LatentStore; from revq.cache.batches import *; split = LatentStore.open({path!r})['train']; "
# Not ru_maxrss, which Linux hands down from the parent.
PEAK_KIB = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
CHILDREN = {
    "imports alone": "",
    "torch.load of one .pth": LOAD_PTH,
    "resident load": LOAD + "print(len(ResidentLatents(split)))",
    "resident load of one rank of four": LOAD + "print(len(ResidentLatents(split, rank_rows(split.ok.nonzero()[0], 0, 4))))",
    f"streaming epoch, buffer of {BUFFER_BYTES >> 20} MiB": LOAD
    + f"print(sum(len(p) for p, _ in StreamingLatents(split, buffer_bytes={BUFFER_BYTES}).sequential({BATCH})))",
}


def memory_rows(latents: Latents, raw: Path, store: Path, folder: Path, repeats: int) -> list[Row]:
    """Time and largest resident size, each in a process of its own."""
    pth = folder / "latents.pth"
    values = torch.from_numpy(np.memmap(raw, np.float16, mode="c").reshape(latents.rows, *latents.real.shape[1:]))
    torch.save({"latents": values}, pth)
    del values
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in CHILDREN}
    for _, (name, code) in itertools.product(range(repeats), CHILDREN.items()):
        measured[name].append(child(code.format(path=str(pth if "pth" in name else store))))
    pth.unlink()
    return [(name, f"{min(time for time, _ in turns):.2f} s, peak {max(peak for _, peak in turns):.0f} MiB") for name, turns in measured.items()]


def child(code: str) -> tuple[float, float]:
    """(seconds, peak MiB) of Python code in a new process; its seconds without those of its imports."""
    timed = f"import time, torch, revq; started = time.perf_counter()\n{code}\nprint(time.perf_counter() - started)\n" + PEAK_KIB
    seconds_spent, peak_kib = subprocess.run([sys.executable, "-c", timed], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-2:]
    return float(seconds_spent), float(peak_kib) / 1024


def encode_rows(folder: Path, repeats: int) -> list[Row]:
    """encode-latents with 1, 2 and 4 threads that decode images."""
    images, settings = sources()
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for turn, workers in itertools.product(range(repeats), rates):
        rates[workers].append(encode(folder / f"encode-{turn}-{workers}.zarr", images["train"], "train", settings, workers=workers))
    name = f"encode-latents, {settings['image_size']} px, workers"
    return [(f"{name} {workers}", f"{max(found):.0f} images/s, ratio {max(found) / max(rates[1]):.2f}") for workers, found in rates.items()]


def codec_rows(latents: Latents, repeats: int) -> list[str]:
    """A line of a Markdown table for each codec and size of chunk: GB/s of uncompressed bytes in processor time, and the share of the bytes."""
    lines = ["| codec | chunk MiB | encode GB/s | decode GB/s | share |", "|---|---|---|---|---|"]
    for (name, codecs), chunk_mib in itertools.product(list(CODECS.items())[1:], CHUNK_MIB):
        chunk = latents.block(0, int(chunk_mib * 2**20) // latents.row_bytes)
        settings = codecs[0].to_dict()["configuration"]
        blosc = "cname" in settings
        numcodec = Blosc(settings["cname"], settings["clevel"], SHUFFLES[settings["shuffle"]], typesize=2) if blosc else Zstd(level=1)
        encoded, out = numcodec.encode(chunk), np.empty_like(chunk)
        works = [lambda c=numcodec, x=chunk: c.encode(x), lambda c=numcodec, x=encoded, y=out: c.decode(x, out=y)]
        rates = [chunk.nbytes / time / 1e9 for time in best(5 * repeats, *works, clock=processor_seconds)]
        lines.append(f"| {name} | {chunk_mib} | {rates[0]:.2f} | {rates[1]:.2f} | {100 * len(encoded) / chunk.nbytes:.1f} % |")
    return lines


def layout_rows(latents: Latents, folder: Path, repeats: int, layouts: str, codecs: list[str]) -> list[str]:
    """A line of a Markdown table for each layout: reading and writing against a bare file, and the share of the bytes on disk."""
    rows = min(latents.rows, TABLE_BYTES // latents.row_bytes)
    raw = folder / "table.bin"
    lines = ["| codec, then crc32c | chunk MiB | shard MiB | read | read, processor | write, processor | on disk |", "|---|---|---|---|---|---|---|"]
    for codec, chunk, shard in itertools.product(codecs, CHUNK_MIB, SHARD_MIB):
        differences = sum(one != other for one, other in zip((codec, chunk, shard), CHOSEN, strict=True))
        if layouts == "all" or differences < 2:
            ratios, share = measure_layout(latents, raw, folder / "table.zarr", rows, repeats, CODECS[codec], chunk, shard)
            lines.append(f"| {codec} | {chunk} | {shard} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + f" | {100 * share:.1f} % |")
    raw.unlink(missing_ok=True)
    return lines


def measure_layout(
    latents: Latents, raw: Path, path: Path, rows: int, repeats: int, codecs: list[Any], chunk_mib: float, shard_mib: int
) -> tuple[list[float], float]:
    """Ratios of reading by the clock, reading and writing in processor time; share on disk. Without fsync on either side."""
    chunk_rows = int(chunk_mib * 2**20) // latents.row_bytes
    shard_rows = (shard_mib << 20) // latents.row_bytes // chunk_rows * chunk_rows
    array = make_array(path, (rows, *latents.real.shape[1:]), codecs, chunk_rows, shard_rows)
    bare = written = 0.0
    with open(raw, "wb") as file:
        for start in range(0, rows, shard_rows):
            block = latents.block(start, min(start + shard_rows, rows))
            bare += processor_seconds(lambda block=block: block.tofile(file))
            written += processor_seconds(lambda block=block, start=start: array.__setitem__(slice(start, start + len(block)), block))
    works = [lambda: np.fromfile(raw, np.float16), lambda: read_array(array)]
    by_clock, by_processor = best(repeats, *works), best(repeats, *works, clock=processor_seconds)
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return [by_clock[0] / by_clock[1], by_processor[0] / by_processor[1], bare / written], stored / (rows * latents.row_bytes)


def make_array(path: Path, shape: tuple[int, ...], codecs: list[Any], chunk_rows: int, shard_rows: int) -> zarr.Array:
    """An empty array like a split's latents, with these codecs before the checksum."""
    shutil.rmtree(path, ignore_errors=True)
    layout = {"chunks": (chunk_rows, *shape[1:]), "shards": (shard_rows, *shape[1:]), "compressors": [*codecs, Crc32cCodec()]}
    # write_empty_chunks: else each chunk is compared with the fill value, which costs more than all the rest.
    return zarr.create_array(str(path), shape=shape, dtype="float16", fill_value=np.nan, config={"write_empty_chunks": True}, **layout)


def read_array(array: zarr.Array) -> NDArray[Any]:
    """The whole array by the reader of the resident load."""
    reader, out = ShardReader(array, "table"), np.empty(array.shape, array.dtype)

    def read(start: int) -> None:
        rows = np.arange(start, min(start + reader.shard_rows, len(out)))
        reader.read(rows, out[start : start + len(rows)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, range(0, len(out), reader.shard_rows)))
    return out


def report(title: str, rows: list[Row] | list[str]) -> None:
    width = max((len(row[0]) for row in rows if isinstance(row, tuple)), default=0)
    lines = [f"{row[0]:<{width}}  {row[1]}" if isinstance(row, tuple) else row for row in rows]
    print(f"\n{title}\n" + "\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layouts", choices=["near", "all"], default="near", help="those that differ from the chosen one in one thing, or all")
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS), help="of the layouts")
    parser.add_argument("--real", help="a store whose latents to repeat; it is made where it is not there, and kept")
    parser.add_argument("--folder", help="where to make the files, which are removed again; default: the system's temporary folder")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{os.cpu_count()}-core CPU ({platform.machine()}), torch {torch.__version__}, {threads} threads, zarr {zarr.__version__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="revq-bench-", dir=args.folder) as name:
        folder = Path(name)
        latents = Latents(Path(args.real or folder / "real.zarr"), args.rows)
        print(f"{args.rows} latents of {latents.row_bytes} bytes, {len(latents.real)} of them different", flush=True)
        if {"load", "stream", "write", "memory"} & set(args.parts):
            report("Writing", write_rows(latents, folder))
            os.sync()
        raw, store = folder / "latents.bin", folder / "store.zarr"
        if "load" in args.parts:
            report("Loading", load_rows(latents, raw, open_split(store), args.repeats))
        if "stream" in args.parts:
            report("Streaming", stream_rows(open_split(store), args.repeats))
        if "memory" in args.parts:
            report("In a process of its own", memory_rows(latents, raw, store, folder, min(2, args.repeats)))
        shutil.rmtree(store, ignore_errors=True)
        raw.unlink(missing_ok=True)
        if "encode" in args.parts:
            report("Encoding", encode_rows(folder, min(2, args.repeats)))
        if "codecs" in args.parts:
            report("Codecs alone, on one processor", codec_rows(latents, args.repeats))
        if "layouts" in args.parts:
            report("Layouts, read and write as ratios to a bare file", layout_rows(latents, folder, args.repeats, args.layouts, args.codecs))


if __name__ == "__main__":
    main()
