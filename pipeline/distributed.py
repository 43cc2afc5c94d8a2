"""Joining the process group that torchrun prepared. There is no launcher here: torchrun starts the processes and ends them when one dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ..errors import ConfigError


def world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun tells them in RANK and WORLD_SIZE; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[int]:
    """Join the others for as long as the block runs; yields this process's rank. One process joins nothing.

    Tensors on a GPU are exchanged by NCCL, all else by gloo.

    Raises:
        ConfigError: torchrun started more processes on this machine than it has GPUs.
    """
    rank, size = world()
    if size == 1:
        yield rank
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()}); lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    # After a restart torchrun's workers meet in the store of the attempt before, where the addresses of dead processes still stand.
    store, rank, size = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(f"revq attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # A rank may wait for another that has a shard more to do; torchrun ends them all when one dies, so nobody waits for the dead.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=12))
    try:
        yield rank
    finally:
        dist.destroy_process_group()
