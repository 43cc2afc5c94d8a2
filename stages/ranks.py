"""How the processes of one torchrun share a stage's work. Without torchrun there is one process, and every function here is its trivial case.

`pipeline.distributed` joins the process group before a stage starts; a stage only asks here who it is and exchanges small values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..errors import RevqError

V = TypeVar("V")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if _joined() else 1


def task_of_share(task: str) -> str:
    """The name of a task whose counts and figures are of this rank's share alone."""
    return task if world_size() == 1 else f"{task} (rank {rank()} of {world_size()})"


def barrier() -> None:
    """Wait until every rank has come here."""
    if _joined():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (anything that pickles, and small), in the order of the ranks, on every rank."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not _joined():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(work: Callable[[], V]) -> V:
    """What `work` gives on rank 0, on every rank; an error that it raises there is raised on every rank."""
    answer: tuple[V | None, RevqError | None] | None = None
    if rank() == 0:
        try:
            answer = (work(), None)
        except RevqError as error:
            answer = (None, error)
    value, raised = broadcast(answer)
    if raised is not None:
        raise raised
    return value


@contextmanager
def held(make: Callable[[], AbstractContextManager[V]]) -> Iterator[V]:
    """Enter `make()` on rank 0 for as long as the block runs, and yield what it gives (which pickles, and is small) on every rank.

    An error of entering it is raised on every rank.
    """
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(make()))


def sum_tensors(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor`, in place; sums of float64 are the same on every rank, to the bit."""
    if _joined():
        dist.all_reduce(tensor)
    return tensor


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
