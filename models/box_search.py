"""Exact nearest code on a CPU: the codes of each codebook in small boxes, most of which a point never opens.

A codebook is cut in four along its widest dim, and again, until some 64 codes are left in a box. For a point the distances to all boxes are bounded,
then the codes of the nearest box are tried, then those of every box that could still hold a nearer one. Boxes and codes lie so that 16 of them fill
a vector register, which is what makes this several times faster than a k-d tree's walk. Distances are differences squared in float32; what comes
within their rounding error of the best is compared again in float64, so the answer is exact, and of equally near codes the lowest index.

How the codes are cut decides the speed alone, not the answer: codes that move a little, as in training or k-means, keep their boxes (`move`).

Shapes: T tokens (codebooks), N points for each, K codes per codebook, D dims, L boxes of S codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_BOX_CODES = 64  # 32 to 128 are within a tenth of each other at 1024 and 16384 codes of 4 dims
_WAYS = 4  # a cut's parts: fewer passes than halves, and boxes as good
_BINS = 256
_SAMPLE = 64  # members that tell a part's widest dim
_WORTH_CUTTING = 256  # N*D; fewer points are compared with every code
_SPREAD = 1.5  # boxes that grew by so much since they were cut are cut anew
_TINY = np.float32(1e-37)  # covers what underflows
# What the loops may assume to be vectorised: no NaN, sums in any order. Latents are finite; a NaN point finds some code, whichever it is.
_FAST = {"nnan", "nsz", "contract", "reassoc"}


Share = Callable[[Callable[[int, int], object], int, int], object]


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba.njit that keeps machine code on disk where there is a place for it, so that only the first run on a machine compiles."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither this folder nor the user's own can be written
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


class BoxSearch:
    """The boxes of T codebooks."""

    def __init__(self, codebooks: NDArray[np.float32], run: Share, *, points: int | None = None) -> None:
        """Cut them.

        Args:
            codebooks: (T,K,D), finite.
            run: how to share work: `run(work, count, size)` calls `work(first, stop)` for runs of 0..count, from threads if it likes; `size` is
                about how many numbers are touched.
            points: N of the only query that will come; few are sooner compared with every code than boxes are cut. None means many.
        """
        tokens, codes, dims = codebooks.shape
        boxes = 1 << max(0, int(np.ceil(np.log2(codes / _BOX_CODES))))
        if points is not None and points * dims < _WORTH_CUTTING:
            boxes = 1
        size = -(-codes // boxes)
        self._run = run
        self._order = np.zeros((tokens, boxes, size), np.int32)
        self._codes = np.empty((tokens, boxes, dims, size), np.float32)
        self._lowest = np.empty((tokens, dims, boxes), np.float32)
        self._highest = np.empty((tokens, dims, boxes), np.float32)
        self._extent = -1.0  # nothing is cut yet
        self.move(codebooks)

    def move(self, codebooks: NDArray[np.float32]) -> None:
        """Search codebooks of the same shape: in the boxes of the earlier ones while these stay small, since filling costs less than cutting."""
        codebooks = np.ascontiguousarray(codebooks)
        if self._extent < 0 or self._fill(codebooks) > _SPREAD * self._extent:
            self._run(lambda first, stop: _cut(codebooks, self._order, first, stop), len(codebooks), codebooks.size)
            self._extent = self._fill(codebooks)

    def _fill(self, codebooks: NDArray[np.float32]) -> float:
        """Put the codes into their boxes; returns the mean extent of those."""
        parts = (self._order, self._codes, self._lowest, self._highest)
        self._run(lambda first, stop: _fill(codebooks, *parts, first, stop), len(codebooks), codebooks.size)
        return float((self._highest - self._lowest).mean())

    def query(self, points: NDArray[np.float32]) -> NDArray[np.int64]:
        """points (T,N,D) -> indices (T,N)."""
        points = np.ascontiguousarray(points)
        found = np.empty(points.shape[:2], np.int64)
        opened = self._lowest[0].size + 4 * self._codes[0, 0].size  # of each point: all boxes' faces, and the codes of a few
        self._run(
            lambda first, stop: _search(points, self._codes, self._lowest, self._highest, self._order, found, first, stop),
            found.size,
            found.size * opened,
        )
        return found


@_compiled()
def _cut(codebooks, order, first, stop):  # type: ignore[no-untyped-def]
    """Fill order (T,L,S): parts of four along the widest dim, again and again; a box one code short holds its last one twice."""
    _, boxes, size = order.shape
    codes = codebooks.shape[1]
    members, spare, bins = np.empty(codes, np.int32), np.empty(codes, np.int32), np.empty(codes, np.int32)
    for token in range(first, stop):
        for code in range(codes):
            members[code] = code
        parts = 1
        while parts < boxes:
            for part in range(parts):
                start, end = codes * part // parts, codes * (part + 1) // parts
                _sort_roughly(codebooks[token], members[start:end], spare[start:end], bins[start:end])
            parts *= min(_WAYS, boxes // parts)
        for box in range(boxes):
            start, end = codes * box // boxes, codes * (box + 1) // boxes
            for slot in range(size):
                order[token, box, slot] = members[min(start + slot, end - 1)]


@_compiled()
def _sort_roughly(book, members, spare, bins):  # type: ignore[no-untyped-def]
    """Bring members (of a part) into the order of their widest dim, up to a bin's width: one pass of counting, whatever the values are."""
    count, step = len(members), max(1, len(members) // _SAMPLE)
    widest, lowest, extent = 0, np.float32(0), np.float32(0)
    for dim in range(book.shape[1]):
        low = high = book[members[0], dim]
        for member in range(0, count, step):
            value = book[members[member], dim]
            low, high = min(low, value), max(high, value)
        if high - low > extent:
            widest, lowest, extent = dim, low, high - low
    if not 0 < extent < np.inf:
        return
    scale, ends = np.float32(_BINS) / extent, np.zeros(_BINS + 1, np.int32)
    for member in range(count):
        place = (book[members[member], widest] - lowest) * scale
        bins[member] = int(min(max(place, np.float32(0)), np.float32(_BINS - 1)))
        ends[bins[member] + 1] += 1
    for number in range(_BINS):
        ends[number + 1] += ends[number]
    for member in range(count):
        spare[ends[bins[member]]] = members[member]
        ends[bins[member]] += 1
    members[:] = spare


@_compiled()
def _fill(codebooks, order, codes, lowest, highest, first, stop):  # type: ignore[no-untyped-def]
    """Codes (T,L,D,S) in their boxes, and the boxes' faces (T,D,L)."""
    _, boxes, size = order.shape
    dims = codebooks.shape[2]
    for token in range(first, stop):
        for box in range(boxes):
            for dim in range(dims):
                low = high = codebooks[token, order[token, box, 0], dim]
                for slot in range(size):
                    value = codebooks[token, order[token, box, slot], dim]
                    codes[token, box, dim, slot] = value
                    low, high = min(low, value), max(high, value)
                lowest[token, dim, box], highest[token, dim, box] = low, high


@_compiled(fastmath=_FAST)
def _search(points, codes, lowest, highest, order, found, first, stop):  # type: ignore[no-untyped-def]
    """Fill found (T,N) from its entry `first` to `stop`, counted row by row."""
    boxes, dims, size = codes.shape[1:]
    points_each = points.shape[1]
    bounds, distances = np.empty(boxes, np.float32), np.empty(size, np.float32)
    # The sum of D squares is off by at most D+2 half units in the last place, and so is the one that it is compared with; doubled for safety.
    slack = np.float32(1 + (dims + 2) * 2.0**-22)
    for entry in range(first, stop):
        token, point = entry // points_each, entry % points_each
        position = points[token, point]
        nearest = _bound(position, lowest[token], highest[token], bounds)
        reach, best, winner = np.float32(np.inf), np.inf, -1
        for turn in range(-1, boxes):
            box = nearest if turn < 0 else turn
            if turn == nearest or bounds[box] > reach:
                continue
            closest = _measure(position, codes[token, box], distances)
            if closest > reach:
                continue
            reach = min(reach, closest * slack + _TINY)
            for slot in range(size):
                if distances[slot] <= reach:
                    best, winner = _better(position, codes[token, box, :, slot], order[token, box, slot], best, winner)
        found[token, point] = max(winner, 0)


@_compiled(fastmath=_FAST)
def _bound(position, lowest, highest, bounds):  # type: ignore[no-untyped-def]
    """Squared distance from a point (D,) to each of L boxes with faces (D,L) into bounds (L,), zero inside; returns the nearest box."""
    bounds[:] = np.float32(0)
    for dim in range(len(position)):
        value, low, high = position[dim], lowest[dim], highest[dim]
        for box in range(len(bounds)):
            outside = max(max(low[box] - value, value - high[box]), np.float32(0))
            bounds[box] += outside * outside
    least = np.float32(np.inf)
    for box in range(len(bounds)):
        least = min(least, bounds[box])
    for box in range(len(bounds)):
        if bounds[box] <= least:
            return box
    return 0


@_compiled(fastmath=_FAST)
def _measure(position, codes, distances):  # type: ignore[no-untyped-def]
    """Squared distances from a point (D,) to the codes (D,S) of a box into distances (S,); returns the least."""
    distances[:] = np.float32(0)
    for dim in range(len(position)):
        value, row = position[dim], codes[dim]
        for slot in range(len(distances)):
            difference = row[slot] - value
            distances[slot] += difference * difference
    least = np.float32(np.inf)
    for slot in range(len(distances)):
        least = min(least, distances[slot])
    return least


@_compiled()  # without fastmath: the sum is the one that NumPy or torch would find in float64
def _better(position, code, index, best, winner):  # type: ignore[no-untyped-def]
    """The nearer of the best code so far and this one, in float64; the lower index of equally near ones."""
    distance = 0.0
    for dim in range(len(position)):
        difference = np.float64(position[dim]) - np.float64(code[dim])
        distance += difference * difference
    if winner < 0 or distance < best or (distance == best and index < winner):
        return distance, index
    return best, winner
