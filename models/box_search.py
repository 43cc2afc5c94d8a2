"""Exact nearest code on a CPU, in compiled loops: by boxes of codes, most of which a point never opens, or by a scan of all codes.

**Boxes.** A codebook is cut in quarters along its widest dim, again and again. For a point the distances to all boxes are bounded at once, then the
codes of the nearest box are tried, then those of every box that could still hold a nearer one. Boxes and codes lie so that as many as fit are loaded
into a vector register, which makes this several times faster than a k-d tree's walk. How the codes are cut decides the speed alone, not the answer:
codes that move a little, as in training or k-means, keep their boxes (`move`).

**A scan** compares 32 points at once with one code after the other: for few codes, for few points (that would not pay for the cutting), and for many
dims, where no box is out of reach.

Distances are differences squared in float32; what comes within their rounding error of the best is compared again in float64, so the answer is exact,
and of equally near codes the lowest index. No square is negative, so the loops compare their bits as whole numbers, which LLVM can vectorise.

Shapes: T tokens (codebooks), N points for each, K codes per codebook, D dims, L boxes of S codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_SPREAD = 1.5  # boxes that grew by so much since they were cut are cut anew
_WAYS, _BINS, _LOOKED = 4, 256, 32  # parts per cut, bins of the rough sort before it, codes looked at to choose its dim
_LANES, _FEW = 32, 8  # points that are scanned together; so few are scanned one by one
Run = Callable[[Callable[[int, int], object], int, int], object]
_TINY = np.float32(1e-37)  # covers what underflows
_INFINITY = np.int32(0x7F800000)  # its bits
# What the loops may assume to be vectorised: no NaN, sums in any order. Latents are finite; a NaN point finds some code, whichever it is.
_FAST = {"nnan", "nsz", "contract", "reassoc"}


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba.njit that keeps machine code on disk where there is a place for it, so that only the first run on a machine compiles."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither this folder nor the user's own can be written
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


class BoxSearch:
    """The boxes of T codebooks. `run(work, count, cost)` is how to share the work: it calls work(first, stop) on runs of the `count` things to do,
    from threads if it likes; `cost` is about how many ns they take one thread."""

    def __init__(self, codebooks: NDArray[np.float32], run: Run) -> None:
        """codebooks: (T,K,D), finite."""
        tokens, codes, dims = codebooks.shape
        # 64 codes to a box until there are 16 boxes, then up to 256: bounding many boxes costs as much as opening large ones.
        boxes = 1 << max(0, int(np.ceil(np.log2(max(codes / 256, min(16, codes / 64))))))
        size = -(-codes // boxes)
        self._run = run
        self._order = np.zeros((tokens, boxes, size), np.int32)
        self._codes = np.empty((tokens, boxes, dims, size), np.float32)
        self._lowest = np.empty((tokens, dims, boxes), np.float32)
        self._highest = np.empty((tokens, dims, boxes), np.float32)
        self._extent = -1.0  # nothing is cut yet
        self.move(codebooks)

    def move(self, codebooks: NDArray[np.float32]) -> None:
        """Search codebooks of the same shape: in the boxes of the earlier ones while these stay small."""
        codebooks = np.ascontiguousarray(codebooks)
        if self._extent < 0 or self._fill(codebooks) > _SPREAD * self._extent:
            self._run(lambda first, stop: _cut(codebooks, self._order, first, stop), len(codebooks), 25 * codebooks[..., 0].size)
            self._extent = self._fill(codebooks)

    def _fill(self, codebooks: NDArray[np.float32]) -> float:
        """Put the codes into their boxes; returns the mean extent of those."""
        arrays = (codebooks, self._order, self._codes, self._lowest, self._highest)
        self._run(lambda first, stop: _fill(*arrays, first, stop), len(codebooks), 2 * codebooks.size)
        return float(np.subtract(self._highest, self._lowest, dtype=np.float64).mean())

    def query(self, points: NDArray[np.float32]) -> NDArray[np.int64]:
        """points (T,N,D) -> indices (T,N)."""
        points = np.ascontiguousarray(points)
        found = np.empty(points.shape[:2], np.int64)
        arrays = (points, self._codes, self._lowest, self._highest, self._order, found)
        self._run(lambda first, stop: _search(*arrays, first, stop), found.size, 1000 * found.size)
        return found


def scan(points: NDArray[np.float32], codebooks: NDArray[np.float32], run: Run) -> NDArray[np.int64]:
    """points (T,N,D), codebooks (T,K,D) -> indices (T,N), by comparing with every code; `run` as for BoxSearch."""
    points, codebooks = (_in_fours(values) if points.shape[1] > _FEW else np.ascontiguousarray(values) for values in (points, codebooks))
    found = np.empty(points.shape[:2], np.int64)
    blocks = len(points) * -(-points.shape[1] // _LANES)
    run(lambda first, stop: _scan(points, codebooks, found, first, stop), blocks, points.size * codebooks.shape[1] // 8)
    return found


def _in_fours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values (...,D) with zeros added until D is a multiple of four."""
    *shape, dims = values.shape
    if dims % 4 == 0:
        return np.ascontiguousarray(values)
    padded = np.zeros((*shape, dims + -dims % 4), np.float32)
    padded[..., :dims] = values
    return padded


@_compiled()
def _cut(codebooks, order, first, stop):  # type: ignore[no-untyped-def]
    """Fill order (T,L,S): quarters along the widest dim, again and again; a box one code short holds its last one twice."""
    _, boxes, size = order.shape
    codes = codebooks.shape[1]
    members, sorted_members = np.empty(codes, np.int32), np.empty(codes, np.int32)
    bins, starts = np.empty(codes, np.uint8), np.empty(_BINS + 1, np.int32)
    for token in range(first, stop):
        for code in range(codes):
            members[code] = code
        parts = 1
        while parts < boxes:
            for part in range(parts):
                begin, end = codes * part // parts, codes * (part + 1) // parts
                _sort_roughly(codebooks[token], members[begin:end], sorted_members[begin:end], bins, starts)
            members, sorted_members = sorted_members, members
            parts = min(boxes, _WAYS * parts)
        for box in range(boxes):
            begin, end = codes * box // boxes, codes * (box + 1) // boxes
            for slot in range(size):
                order[token, box, slot] = members[min(begin + slot, end - 1)]


@_compiled()
def _sort_roughly(book, members, ordered, bins, starts):  # type: ignore[no-untyped-def]
    """Members (M,) of a codebook (K,D) along the dim that is widest over some of them, up to the order within a bin; beyond those, the outer bins."""
    count = len(members)
    widest, lowest, extent = 0, np.float32(0), np.float32(0)
    for dim in range(book.shape[1]):
        least = most = book[members[0], dim]
        for at in range(0, count, 1 + count // _LOOKED):
            value = book[members[at], dim]
            least, most = min(least, value), max(most, value)
        if most - least > extent:
            widest, lowest, extent = dim, least, most - least
    scale = np.float32(_BINS) / extent if extent > 0 else np.float32(0)
    starts[:] = 0
    for at in range(count):
        place = (book[members[at], widest] - lowest) * scale
        bins[at] = min(place, np.float32(_BINS - 1)) if place > 0 else 0  # NaN: 0
        starts[bins[at] + 1] += 1
    for place in range(_BINS):
        starts[place + 1] += starts[place]
    for at in range(count):
        ordered[starts[bins[at]]] = members[at]
        starts[bins[at]] += 1


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
    """Fill found (T,N) for the points from `first` to `stop`, counted through all tokens."""
    boxes, dims, size = codes.shape[1:]
    bounds, distances = np.empty(boxes, np.float32), np.empty(size + 1, np.float32)
    bound_bits, distance_bits = bounds.view(np.int32), distances.view(np.int32)
    for flat in range(first, stop):
        token, point = flat // points.shape[1], flat % points.shape[1]
        position = points[token, point]
        nearest = _bound(position, lowest[token], highest[token], bounds, bound_bits)
        reach, best, winner = np.float32(np.inf), np.inf, -1
        for turn in range(-1, boxes):
            box = nearest if turn < 0 else turn
            if turn == nearest or bounds[box] > reach:
                continue
            closest = _measure(position, codes[token, box], distances, distance_bits)
            if closest > reach:
                continue
            reach = min(reach, _reach(closest, dims))
            hits, slots = np.int32(0), np.int32(0)
            for slot in range(size):
                hit = np.int32(distances[slot] <= reach)
                hits += hit
                slots += hit * np.int32(slot)
            if hits == 1:
                best, winner = _better(position, codes[token, box, :, slots], order[token, box, slots], best, winner)
                continue
            for slot in range(size):
                if distances[slot] <= reach:
                    best, winner = _better(position, codes[token, box, :, slot], order[token, box, slot], best, winner)
        found[token, point] = max(winner, 0)


@_compiled(fastmath=_FAST)
def _reach(distance, dims):  # type: ignore[no-untyped-def]
    """How large a float32 sum of D squares may be, and the true one still be no larger than that of `distance`."""
    # Each is off by at most D+2 half units in the last place; doubled for safety.
    return distance * np.float32(1 + (dims + 2) * 2.0**-22) + _TINY


@_compiled(fastmath=_FAST)
def _bound(position, lowest, highest, bounds, bits):  # type: ignore[no-untyped-def]
    """Squared distance from a point (D,) to each of L boxes with faces (D,L) into bounds (L,), zero inside; returns the nearest box."""
    for dim in range(len(position)):
        value, low, high = position[dim], lowest[dim], highest[dim]
        for box in range(len(bounds)):
            outside = max(max(low[box] - value, value - high[box]), np.float32(0))
            bounds[box] = outside * outside + (bounds[box] if dim else np.float32(0))
    least = _INFINITY
    for box in range(len(bounds)):
        least = min(least, bits[box])
    for box in range(len(bounds)):
        if bits[box] <= least:
            return box
    return 0


@_compiled(fastmath=_FAST)
def _measure(position, codes, distances, bits):  # type: ignore[no-untyped-def]
    """Squared distances from a point (D,) to the codes (D,S) of a box into distances (S+1,), the least last; returns that."""
    dims, size = codes.shape
    for dim in range(dims):
        value, row = position[dim], codes[dim]
        for slot in range(size):
            difference = row[slot] - value
            distances[slot] = difference * difference + (distances[slot] if dim else np.float32(0))
    least = _INFINITY
    for slot in range(size):
        least = min(least, bits[slot])
    bits[size] = least
    return distances[size]


@_compiled(fastmath=_FAST)
def _scan(points, codebooks, found, first, stop):  # type: ignore[no-untyped-def]
    """Fill found (T,N) for the blocks of 32 points from `first` to `stop`; the last block of a token may be shorter."""
    _, count, dims = points.shape
    blocks = -(-count // _LANES)
    together, distances = np.zeros((dims, _LANES), np.float32), np.empty(_LANES, np.float32)
    near, second, which = np.empty(_LANES, np.int32), np.empty(_LANES, np.int32), np.empty(_LANES, np.int32)
    for flat in range(first, stop):
        token, start = flat // blocks, flat % blocks * _LANES
        lanes = min(_LANES, count - start)
        if lanes <= _FEW:
            for point in range(start, start + lanes):
                found[token, point] = _scan_one(points[token, point], codebooks[token])
            continue
        for lane in range(lanes):
            for dim in range(dims):
                together[dim, lane] = points[token, start + lane, dim]
        _scan_together(together, codebooks[token], distances, distances.view(np.int32), near, second, which)
        for lane in range(lanes):
            near_enough = second.view(np.float32)[lane] <= _reach(near.view(np.float32)[lane], dims)
            found[token, start + lane] = _scan_one(points[token, start + lane], codebooks[token]) if near_enough else which[lane]


@_compiled(fastmath=_FAST)
def _scan_one(position, codes):  # type: ignore[no-untyped-def]
    """The nearest of the codes (K,D) to a point (D,)."""
    reach, best, winner = np.float32(np.inf), np.inf, -1
    for code in range(len(codes)):
        distance = np.float32(0)
        for dim in range(len(position)):
            difference = codes[code, dim] - position[dim]
            distance += difference * difference
        if distance <= reach:
            reach = min(reach, _reach(distance, len(position)))
            best, winner = _better(position, codes[code], code, best, winner)
    return max(winner, 0)


@_compiled(fastmath=_FAST)
def _scan_together(together, codes, distances, bits, near, second, which):  # type: ignore[no-untyped-def]
    """For points (D,32) the bits of the least two squared distances to codes (K,D) into near and second, and the code of the least into which."""
    near[:] = _INFINITY
    second[:] = _INFINITY
    which[:] = 0
    for code in range(len(codes)):
        row = codes[code]
        for four in range(len(together) // 4):  # since sums go through memory
            dim = 4 * four  # a range in steps of four takes twice as long
            for lane in range(_LANES):
                a, b = together[dim, lane] - row[dim], together[dim + 1, lane] - row[dim + 1]
                c, d = together[dim + 2, lane] - row[dim + 2], together[dim + 3, lane] - row[dim + 3]
                distances[lane] = (a * a + b * b) + (c * c + d * d) + (distances[lane] if dim else np.float32(0))
        for lane in range(_LANES):
            distance, least = bits[lane], near[lane]
            second[lane] = min(second[lane], max(distance, least))
            which[lane] = code if distance < least else which[lane]
            near[lane] = min(distance, least)


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
