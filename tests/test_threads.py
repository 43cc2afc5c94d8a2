"""What gives the same bytes, in processes with 1, 2 and 3 threads: every stage over again, stopped and resumed, and on two ranks.

With one thread sums have one order, so that a sum in whichever order threads come shows here alone. `same_bytes.py` is the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROCESS = Path(__file__).with_name("same_bytes.py")
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "127.0.0.1:0",
    "--local-addr",
    "127.0.0.1",
]

pytestmark = pytest.mark.timeout(900)  # a process goes through all stages, twice
Hashes = dict[str, list[str]]


@pytest.fixture(scope="module")
def hashes_of(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path, inception: Path) -> Callable[..., Hashes]:
    """By stage the SHA-256 of each repeat, of one process or of two ranks with so many threads each; made once for each."""
    made: dict[tuple[int, bool], Hashes] = {}

    def hashes(threads: int, *, two_ranks: bool = False) -> Hashes:
        if (threads, two_ranks) not in made:
            folder = tmp_path_factory.mktemp("repeats")
            numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
            # Without MKL_DYNAMIC=FALSE torch takes no more threads than there are cores; more of them than cores must not wait by spinning.
            numbers |= {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "passive"}
            environment = {**os.environ, **numbers, "TORCH_HOME": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, *(TORCHRUN if two_ranks else []), str(PROCESS), str(imagenet_sample), str(inception), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told["threads"] == threads
            made[threads, two_ranks] = told["sha256"]
        return made[threads, two_ranks]

    return hashes


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_stage_gives_the_same_bytes_each_time_with_so_many_threads(threads: int, hashes_of: Callable[..., Hashes]) -> None:
    found = hashes_of(threads)
    assert {stage.split()[0] for stage in found} == {"encode-latents", "fit-codebooks", "train-rectifier", "evaluate"}
    assert all(len(repeats) >= 2 for repeats in found.values())
    assert {stage for stage, repeats in found.items() if len(set(repeats)) > 1} == set()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_store_of_the_embedded_vae_and_plain_codebooks_do_not_depend_on_the_number_of_threads(
    threads: int, hashes_of: Callable[..., Hashes]
) -> None:
    for stage in ("encode-latents views", "fit-codebooks standardize", "fit-codebooks standardize by FAISS"):
        assert hashes_of(threads)[stage] == hashes_of(1)[stage]


def test_two_ranks_of_two_threads_give_the_store_and_codebooks_of_one_process_of_two(hashes_of: Callable[..., Hashes]) -> None:
    ours, theirs = hashes_of(2, two_ranks=True), hashes_of(2)
    same = [stage for stage in theirs if stage.startswith(("encode-latents", "fit-codebooks"))]
    assert len(same) == 5
    assert {stage: ours[stage] for stage in same} == {stage: theirs[stage] for stage in same}


def test_two_ranks_train_to_the_same_bytes_each_time_and_when_stopped_and_resumed(hashes_of: Callable[..., Hashes]) -> None:
    trained = {stage: repeats for stage, repeats in hashes_of(2, two_ranks=True).items() if stage.startswith("train-rectifier")}
    assert [len(repeats) for repeats in trained.values()] == [3]
    assert {stage for stage, repeats in trained.items() if len(set(repeats)) > 1} == set()
