"""Runs encode-latents in child processes that are killed at random instants, until one comes to its end; run by test_encode_latents.py.

    python killed_encoder.py IMAGES STORE VAE KILLS LONGEST_S

Children are forked after the imports, so that what is killed is the work and not the start of Python. Each is killed after a random time of
at most LONGEST_S seconds. Prints a line for each kill, then the seconds of the child that came to its end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from revq.cache.store import LatentStore, is_store
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly

SETTINGS = {"image_size": 64, "device": "cpu", "limit": 48, "shard_rows": 4, "batch_size": 3, "workers": 2}


def start(config: EncodeLatentsConfig) -> int:
    """The id of a child that encodes."""
    pid = os.fork()
    if pid == 0:
        run_quietly(encode_latents(config))
        os._exit(0)
    return pid


def main(images: str, store: str, vae: str, kills: int, longest_s: float) -> None:
    config = EncodeLatentsConfig(images=images, store=store, vae=vae, **SETTINGS)
    draw = random.Random(7)
    for _ in range(kills):
        pid, delay_s = start(config), draw.uniform(0, longest_s)
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            break  # it was faster: the work is done
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        if is_store(store):
            LatentStore.open(store)
        print(f"killed after {delay_s:.3f} s", flush=True)
    started = time.perf_counter()
    _, status = os.waitpid(start(config), 0)
    assert status == 0, status
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:4], kills=int(sys.argv[4]), longest_s=float(sys.argv[5]))
