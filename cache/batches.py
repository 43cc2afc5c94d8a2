"""From a split on disk to batches on the device. Two readers with one interface: `ResidentLatents` holds all rows, so that an epoch costs no
reading; `StreamingLatents` reads ahead of the caller in bounded memory, for stores larger than memory. `open_latents` chooses.

Both have `rows` (N,), `len()`, `device`, `latent_shape`, `epoch(...)` and `sequential(...)`. An epoch has floor(N / B) whole batches and leaves out
the rest of its order (other rows each epoch); where N < B it is one batch of all rows. `sequential` is every row once, in the order of `rows`, the
last batch shorter. A batch is (positions (B,) int64 into `rows`, on the CPU; latents (B,C,H,W) float32, on the device). Their order is a pure
function of (seed, epoch) and, when streaming, of `buffer_bytes`; never of threads or of what was read before.

Shapes: N rows; B batch; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, StoreError
from .rows import epoch_permutation, permutation
from .shards import ShardReader
from .store import LatentSplit

_MAX_READERS = 8
_BATCHES_AHEAD = 3
_BUFFER_BYTES = 1 << 30
_RESIDENT_SHARE = 0.5  # of the memory that is free: training needs the rest

Batch = tuple[Tensor, Tensor]
"""positions (B,) int64 on the CPU, latents (B,C,H,W) float32 on the device."""


class ResidentLatents:
    """The ok rows of a split, or some of them, in one tensor on the device.

    Memory: N*C*H*W values of `dtype` on the device, and a few shards on the host while reading onto another device.
    """

    rows: NDArray[np.int64]
    """(N,) row in the split of each latent held here."""
    latents: Tensor
    """(N,C,H,W) in `dtype`, raw; in pinned host memory where `pinned`."""

    def __init__(
        self,
        split: LatentSplit,
        rows: NDArray[np.integer] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Read the latents.

        Args:
            rows: which rows of the split, in any order; those of failed images are left out. None means all.
            device: where batches lie, and the tensor too unless `pinned`.
            dtype: in which it is held; None means as on disk.
            pinned: hold the tensor in page-locked host memory, for a CUDA device too small for it, and copy each batch over.

        Raises:
            StoreError: no row is ok, a chunk is damaged, or a value is not finite.
        """
        self.rows = _ok_rows(split, rows)
        self.device = torch.device(device)
        self.latent_shape = tuple(split.latents.shape[1:])
        self._pinned = pinned
        dtype = dtype or getattr(torch, str(split.latents.dtype))
        self.latents = _empty((len(self.rows), *self.latent_shape), dtype, torch.device("cpu") if pinned else self.device, pinned=pinned)
        self._read(split)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor) -> Tensor:
        """index (B,) positions in `latents` -> (B,C,H,W) float32 on the device."""
        if self._pinned:
            chosen = torch.empty((len(index), *self.latent_shape), dtype=self.latents.dtype, pin_memory=True)
            torch.index_select(self.latents, 0, index.cpu(), out=chosen)
            return chosen.to(self.device, non_blocking=True).float()
        return self.latents.index_select(0, index.to(self.latents.device)).float()

    def epoch(self, *, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The whole batches of one epoch from number `first_batch` on, in an order drawn from (seed, epoch) over all rows."""
        size = _batch_rows(len(self), batch_size)
        order = epoch_permutation(len(self), seed, epoch)
        for start in range(first_batch * size, len(self) - size + 1, size):
            positions = order[start : start + size]
            yield positions, self.batch(positions)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in the order of `rows`; the last batch may be shorter."""
        for positions in torch.arange(len(self)).split(_batch_rows(len(self), batch_size)):
            yield positions, self.batch(positions)

    def _read(self, split: LatentSplit) -> None:
        """Shards in parallel: each is read once, whatever the order of the rows."""
        reader = ShardReader(split.latents, split.name)
        order = np.argsort(self.rows, kind="stable")
        groups = np.split(order, _shard_cuts(self.rows[order], reader.shard_rows))
        with split.reading(), ThreadPoolExecutor(min(_readers(), len(groups)), thread_name_prefix="revq-latents") as pool:
            try:
                for future in [pool.submit(self._read_shard, reader, group) for group in groups]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _read_shard(self, reader: ShardReader, positions: NDArray[np.int64]) -> None:
        """Fill `latents[positions]`, whose rows lie in one shard and ascend."""
        rows = self.rows[positions]
        start, stop = int(positions[0]), int(positions[-1]) + 1
        consecutive = stop - start == len(positions) and bool((np.diff(positions) == 1).all())
        on_disk = getattr(torch, str(reader.dtype))
        if consecutive and self.latents.dtype == on_disk and self.latents.device.type == "cpu":
            reader.read(rows, self.latents[start:stop].numpy())
            return
        block = torch.empty((len(rows), *self.latent_shape), dtype=on_disk, pin_memory=self.latents.is_cuda)
        reader.read(rows, block.numpy())
        converted = block.to(self.latents.dtype)
        if self.latents.dtype != on_disk and not bool(torch.isfinite(converted).all()):
            finite = torch.isfinite(converted).flatten(1).all(1)
            raise reader.not_finite(int(rows[int((~finite).nonzero()[0, 0])]), self.latents.dtype)
        if consecutive:
            self.latents[start:stop].copy_(converted, non_blocking=True)
        else:
            self.latents[torch.from_numpy(positions).to(self.latents.device)] = converted.to(self.latents.device)


class StreamingLatents:
    """The ok rows of a split, or some of them, read anew each epoch in bounded memory.

    An epoch shuffles the shards, fills one half of the buffer after the other with whole shards, and shuffles the rows within a half. While the
    caller works on one half, threads read the next, and another thread keeps a few batches ready. A batch on the seam takes rows of both halves.

    Memory on the host: `buffer_bytes`; besides, two chunks for each of at most 8 reading threads (a whole shard where the store is no local
    folder) and four batches.
    """

    rows: NDArray[np.int64]
    """(N,) row in the split of each latent, ascending."""

    def __init__(
        self,
        split: LatentSplit,
        rows: NDArray[np.integer] | None = None,
        device: str | torch.device = "cpu",
        *,
        buffer_bytes: int = _BUFFER_BYTES,
        readers: int | None = None,
    ) -> None:
        """Open the split; nothing is read yet.

        Args:
            rows: which rows of the split, each once; they are sorted, and those of failed images are left out. None means all.
            device: where batches lie.
            buffer_bytes: host memory for latents; the order of an epoch depends on it, and is the better shuffled the larger it is.
            readers: threads that read; None means one for each processor, at most 8.

        Raises:
            StoreError: no row is ok.
            ConfigError: the buffer does not hold two shards.
        """
        self.rows = np.unique(_ok_rows(split, rows))
        self.device = torch.device(device)
        self.latent_shape = tuple(split.latents.shape[1:])
        self._reader, self._reading = ShardReader(split.latents, split.name), split.reading
        self.dtype = self._reader.dtype
        self._readers = readers or _readers()
        cuts = _shard_cuts(self.rows, self._reader.shard_rows)
        self._bounds = np.concatenate([[0], cuts, [len(self.rows)]])  # of each shard's positions
        row_bytes = math.prod(self.latent_shape) * self.dtype.itemsize
        self._half_rows = buffer_bytes // 2 // row_bytes
        largest = int(np.diff(self._bounds).max())
        if self._half_rows < largest:
            raise ConfigError(
                f'a buffer of {buffer_bytes} bytes does not hold two shards of split "{split.name}"; give at least {2 * largest * row_bytes} bytes'
            )

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, *, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The whole batches of one epoch from number `first_batch` on; shards that only earlier batches need are not read.

        Raises (while iterating):
            StoreError: a chunk is damaged, or a value is not finite; it names the rows.
        """
        shards = epoch_permutation(len(self._bounds) - 1, seed, epoch).numpy()
        halves = self._halves(shards)
        orders = [permutation(sum(map(len, half)), f"revq buffer {seed} {epoch} {number}").numpy() for number, half in enumerate(halves)]
        size = _batch_rows(len(self), batch_size)
        return self._batches(halves, orders, size, range(first_batch, len(self) // size))

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in the order of `rows`; the last batch may be shorter. Raises what `epoch` raises."""
        halves = self._halves(np.arange(len(self._bounds) - 1))
        orders = [np.arange(sum(map(len, half))) for half in halves]
        size = _batch_rows(len(self), batch_size)
        return self._batches(halves, orders, size, range(-(-len(self) // size)))

    def read(self, positions: range, out: NDArray[Any]) -> None:
        """Fill `out` with the latents at these positions, which lie in one shard; raises StoreError."""
        with self._reading():
            self._reader.read(self.rows[positions.start : positions.stop], out)

    def _halves(self, shards: NDArray[np.int64]) -> list[list[range]]:
        """What fills one half of the buffer at a time: the positions of its shards, in the order given."""
        halves: list[list[range]] = [[]]
        filled = 0
        for shard in shards.tolist():
            positions = range(int(self._bounds[shard]), int(self._bounds[shard + 1]))
            if filled + len(positions) > self._half_rows:
                halves.append([])
                filled = 0
            halves[-1].append(positions)
            filled += len(positions)
        return halves

    def _batches(self, halves: Sequence[Sequence[range]], orders: Sequence[NDArray[np.int64]], size: int, numbers: range) -> Iterator[Batch]:
        """Yield the batches of these numbers; threads live no longer than this generator."""
        readers = ThreadPoolExecutor(self._readers, thread_name_prefix="revq-latents-read")
        maker = ThreadPoolExecutor(1, thread_name_prefix="revq-latents-batch")
        window = _Window(self, halves, orders, readers)
        ahead: deque[Future[Batch]] = deque()
        waiting = iter(numbers)
        try:
            for number in waiting:
                ahead.append(maker.submit(window.batch, number * size, min((number + 1) * size, len(self))))
                if len(ahead) > _BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for pool in (readers, maker):
                pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Half:
    """One half of the buffer while it is read and used."""

    latents: Tensor
    """(rows,C,H,W) as on disk; whole once `reading` is done."""
    positions: NDArray[np.int64]
    """(rows,) where they belong in `StreamingLatents.rows`."""
    reading: Sequence[Future[None]]


class _Window:
    """The two halves of the buffer, moving over an epoch. One thread asks for batches; the readers fill the halves."""

    def __init__(
        self, source: StreamingLatents, halves: Sequence[Sequence[range]], orders: Sequence[NDArray[np.int64]], readers: ThreadPoolExecutor
    ) -> None:
        self._source, self._halves, self._orders, self._readers = source, halves, orders, readers
        self._starts = np.cumsum([0, *map(len, orders)])  # of each half in the epoch's order
        self._held: dict[int, _Half] = {}

    def batch(self, start: int, stop: int) -> Batch:
        """The rows at start .. stop of the epoch's order."""
        device = self._source.device
        shape = (stop - start, *self._source.latent_shape)
        latents = torch.empty(shape, dtype=getattr(torch, str(self._source.dtype)), pin_memory=device.type == "cuda")
        positions = np.empty(stop - start, np.int64)
        done = 0
        while done < len(positions):
            number = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            within = start + done - int(self._starts[number])
            chosen = self._orders[number][within : within + len(positions) - done]
            half = self._half(number)
            torch.index_select(half.latents, 0, torch.from_numpy(chosen), out=latents[done : done + len(chosen)])
            positions[done : done + len(chosen)] = half.positions[chosen]
            done += len(chosen)
            del half  # else it would outlive its place in the buffer while the next one is waited for
        return torch.from_numpy(positions), latents.to(device, non_blocking=True).float()

    def _half(self, number: int) -> _Half:
        """That half, filled; earlier ones are dropped and the next is asked for."""
        self._held = {held: half for held, half in self._held.items() if held >= number}
        for wanted in (number, number + 1):
            if wanted < len(self._halves) and wanted not in self._held:
                self._held[wanted] = self._start_reading(self._halves[wanted])
        for future in self._held[number].reading:
            future.result()
        return self._held[number]

    def _start_reading(self, parts: Sequence[range]) -> _Half:
        positions = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        latents = np.empty((len(positions), *self._source.latent_shape), self._source.dtype)
        ends = np.cumsum([len(part) for part in parts])
        reading = [self._readers.submit(self._source.read, part, latents[end - len(part) : end]) for part, end in zip(parts, ends, strict=True)]
        return _Half(torch.from_numpy(latents), positions, reading)


def open_latents(
    split: LatentSplit, rows: NDArray[np.integer] | None = None, device: str | torch.device = "cpu", *, budget_bytes: int | None = None
) -> ResidentLatents | StreamingLatents:
    """The reader that memory allows: resident on the device; else, for a CUDA device, resident in pinned host memory; else streaming.

    Whether it is resident changes the order of an epoch, so a run that is to be repeated or resumed elsewhere gives `budget_bytes`.

    Args:
        rows, device: as those of the readers.
        budget_bytes: memory for latents. They are resident on the device where they fit in it, else they stream through a buffer of that size, at
            most 1 GiB. None means half of what is free, on the host shared among the processes that torchrun started there, and a buffer of 1 GiB.

    Raises:
        StoreError, ConfigError: what the readers raise.
    """
    if budget_bytes is None:
        return open_reader(reader_that_fits(split, rows, device), split, rows, device)
    if _bytes_of(split, rows) <= budget_bytes:
        return ResidentLatents(split, rows, device)
    return StreamingLatents(split, rows, device, buffer_bytes=min(budget_bytes, _BUFFER_BYTES))


def reader_that_fits(
    split: LatentSplit, rows: NDArray[np.integer] | None = None, device: str | torch.device = "cpu", *, beside_bytes: int = 0
) -> Literal["resident", "pinned", "stream"]:
    """What half of the free memory allows: the latents resident on the device, resident in pinned host memory, or streamed.

    Args:
        rows, device: as those of the readers.
        beside_bytes: what the caller will hold on the device beside resident latents.
    """
    device = torch.device(device)
    size = _bytes_of(split, rows)
    on_host = _free_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else on_host
    if size + beside_bytes <= _RESIDENT_SHARE * on_device:
        return "resident"
    pinned = device.type == "cuda" and beside_bytes <= _RESIDENT_SHARE * on_device and size <= _RESIDENT_SHARE * on_host
    return "pinned" if pinned else "stream"


def open_reader(
    how: str, split: LatentSplit, rows: NDArray[np.integer] | None = None, device: str | torch.device = "cpu"
) -> ResidentLatents | StreamingLatents:
    """The reader that `reader_that_fits` named. Raises what the readers raise."""
    if how == "stream":
        return StreamingLatents(split, rows, device)
    return ResidentLatents(split, rows, device, pinned=how == "pinned")


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool) -> Tensor:
    """`torch.empty`, on the host from numpy, which asks for large pages: filling it takes a sixth of the time (docs/notes/store.md)."""
    if pinned or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _ok_rows(split: LatentSplit, rows: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """Those of `rows` (None means all) whose images could be read; raises StoreError where there is none."""
    wanted = np.arange(len(split)) if rows is None else np.asarray(rows, np.int64)
    ok = wanted[split.ok[wanted]]
    if len(ok) == 0:
        raise StoreError(f'split "{split.name}" has no readable row among the {len(wanted)} asked for; encode more images')
    return ok


def _shard_cuts(rows: NDArray[np.int64], shard_rows: int) -> NDArray[np.int64]:
    """Where ascending rows go over to another shard."""
    return np.flatnonzero(np.diff(rows // shard_rows)) + 1


def _bytes_of(split: LatentSplit, rows: NDArray[np.integer] | None) -> int:
    """Of these rows (None means all) as on disk."""
    return (len(split) if rows is None else len(rows)) * math.prod(split.latents.shape[1:]) * split.latents.dtype.itemsize


def _batch_rows(rows: int, batch_size: int) -> int:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    return min(batch_size, rows)


def _readers() -> int:
    return min(_MAX_READERS, os.cpu_count() or 1)


def _free_host_bytes() -> int:
    """What this process may still take: the machine's available memory, or its control group's where that is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # no Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"])
    except (OSError, ValueError, KeyError):  # no group, or "max": no limit
        return free
    return min(free, limit - used + cached)
