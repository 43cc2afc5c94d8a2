"""Latents for the benchmarks: made up, in a real store, so that nothing has to be encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from revq.cache.manifest import OK, ManifestRow
from revq.cache.store import Encoding, LatentStore
from revq.cache.writer import SplitPlan, SplitWriter

SHAPE = (32, 8, 8)


def make_store(path: Path, splits: dict[str, int]) -> LatentStore:
    """A store of so many float16 latents (32,8,8) in each split: channels that go together, and a level common to a whole latent."""
    vae = {"id": "none", "class_name": "None", "revision": None, "config_sha256": "", "weights_sha256": "", "fingerprint": "none"}
    encoding = Encoding(vae=vae, image_size=64, latent_shape=SHAPE, dtype="float16")
    mix = np.eye(SHAPE[0], dtype=np.float32) + np.random.default_rng(0).normal(0, 0.1, (SHAPE[0], SHAPE[0])).astype(np.float32)
    for name, images in splits.items():
        plan = SplitPlan(name=name, images=images, views=1, seed=0, source="none", order_sha256="", chunk_rows=256, shard_rows=8192)
        writer = SplitWriter(path, encoding, plan)
        for shard in writer.todo:
            rows = range(shard.start, shard.stop)
            generator = np.random.default_rng(shard.start)
            white = generator.standard_normal((len(rows), *SHAPE), np.float32)
            level = generator.standard_normal((len(rows), SHAPE[0], 1, 1), np.float32)
            latents = np.einsum("nchw,dc->ndhw", white + 0.5 * level, mix, optimize=True).astype(np.float16)
            manifest = [ManifestRow(row=row, key=str(row), view=0, status=OK, source="none", label=0, class_name="") for row in rows]
            writer.write_shard(shard, latents, manifest)
        writer.finish()
    return LatentStore.open(path)
