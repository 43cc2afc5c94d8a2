"""Stage two, second half: train the rectifier, and the codebooks beside it, from cached latents alone.

    revq train-rectifier STORE CODEBOOKS OUT --steps 2000

In: a latent store and fitted codebooks. Out: a run folder with `tokenizer/` (the result), `checkpoints/`, `metrics.parquet`,
`tensorboard/` and `config.json`. The same command again resumes, and ends with the same tokenizer as a run never stopped.

Two phases. First mean squared error of standardised latents as in the paper, times the transform's scale (1 but for the decoder
transform, whose coordinates weigh a position by how much it moves the picture). Then, for `finish_steps`, the loss is taken
through the frozen decoder, decode(rectified) against decode(cached latent); only this phase needs the VAE.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, T tokens per image, K codes per codebook, D dims per token.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.batches import ResidentLatents, epoch_permutation, split_rows, spread_rows
from ..cache.store import LatentStore
from ..errors import CodebookError, ConfigError, MismatchError, TrainingError
from ..files import claim_output, replacing, sha256_file
from ..models.codebooks import CODEBOOKS_NAME, Codebooks, load_codebooks
from ..models.device import pick_device
from ..models.quantizer import MultiGroupQuantizer, code_counts, reset_unused
from ..models.rectifier import BLOCKS, Rectifier, parameter_count, update_average
from ..models.tokenizer import FORMAT_VERSION, TOKENIZER_KIND, ReVQTokenizer
from ..models.transform import LatentTransform
from ..models.vae import FrozenVAE
from . import ranks
from .checkpoints import TrainState, resume, save_checkpoint
from .events import Advance, Begin, Event, Note, Result

RUN_KIND = "revq-rectifier-run"
_HELD_OUT_SHARE = 0.02
_LOG_EVERY = 25
_EVALUATION_BATCH = 256
_RUNTIME_ONLY = {"store", "codebooks", "out", "device", "vae", "overwrite"}


@dataclass(frozen=True, kw_only=True)
class TrainRectifierConfig:
    """Settings of train-rectifier."""

    store: str
    """The latent store."""
    codebooks: str
    """Folder of fit-codebooks."""
    out: str
    """Run folder: new, empty, or this very run's, to be resumed."""
    split: str = "train"
    """Split of the store to train on."""
    val_split: str = "val"
    """Split to validate on; where the store has none, the last 2 % of the train images are held out."""
    epochs: int = 100
    """Passes over the train latents, where `steps` is None."""
    steps: int | None = None
    """Steps of the first phase; None means as many as `epochs` need."""
    finish_steps: int = 0
    """Steps of the last phase, whose loss goes through the frozen decoder."""
    batch_size: int = 256
    """Latents in a step of the first phase."""
    finish_batch_size: int = 32
    """Latents in a step of the last phase."""
    lr: float = 5e-4
    """Peak learning rate of the rectifier; after a warm-up it decays exponentially to 5 % (the paper)."""
    codebook_lr: float = 0.01
    """Learning rate of the codebooks; 0 keeps them as fitted, and then the tokens are computed only once."""
    weight_decay: float = 1e-4
    """AdamW's, on the rectifier alone."""
    width: int = 512
    """Channels inside the rectifier, a multiple of 32; 0 trains no rectifier."""
    depth: int = 3
    """Blocks of the rectifier."""
    block: str = "conv"
    """Kind of block: "conv", which gained more in short runs (docs/results.md), or "efficientvit" (the paper)."""
    precision: str = "auto"
    """"bf16" autocast, "fp32", or "auto": bf16 on CUDA, fp32 elsewhere."""
    ema: float = 0.999
    """Decay of the moving average of the rectifier's weights, which is what the tokenizer gets; 0 turns it off."""
    evaluations: int = 20
    """How often in a run to validate and to save a checkpoint."""
    seed: int = 0
    """Seed of the rectifier's weights and of the order of the latents."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N, mps."""
    vae: str | None = None
    """Where to find the VAE for the last phase; None means where the store says."""
    overwrite: bool = False
    """Replace a run of other settings in `out`."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("finish_batch_size", 1), ("finish_steps", 0), ("depth", 0), ("evaluations", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {lowest}, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 0:
            raise ConfigError(f"steps must be at least 0, not {self.steps}")
        if self.width < 0 or self.width % 32:
            raise ConfigError(f"width must be a multiple of 32, not {self.width}")
        if not self.lr > 0 or self.codebook_lr < 0:
            raise ConfigError(f"lr must be above 0 and codebook-lr at least 0, not {self.lr} and {self.codebook_lr}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0,1), not {self.ema}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"precision must be auto, bf16 or fp32, not {self.precision!r}")
        if self.block not in BLOCKS:
            raise ConfigError(f"block must be one of {', '.join(BLOCKS)}, not {self.block!r}")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What training reads and never changes."""

    store: LatentStore
    transform: LatentTransform
    train: ResidentLatents
    val: ResidentLatents
    val_name: str
    device: torch.device
    autocast: bool
    vae: FrozenVAE | None
    steps: int
    total: int

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the train latents, at least one."""
        return max(1, len(self.train) // batch_size)


def train_rectifier(config: TrainRectifierConfig) -> Iterator[Event]:
    """Train, then write the tokenizer; yields progress, then a `Result`.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, OutputError, TrainingError, ConfigError: see their messages.
    """
    ranks.refuse_many("train-rectifier")
    store, fitted = LatentStore.open(config.store), load_codebooks(config.codebooks)
    _check_store(store, fitted)
    out = Path(config.out)
    settings = {name: value for name, value in asdict(config).items() if name not in _RUNTIME_ONLY}
    identity = {**settings, "store_fingerprint": store.fingerprint, "codebooks_sha256": sha256_file(Path(config.codebooks) / CODEBOOKS_NAME)}
    inputs = _open_inputs(config, store, fitted)
    claim_output(out, kind=RUN_KIND, identity=identity, overwrite=config.overwrite)
    if (out / "tokenizer" / "config.json").exists():
        yield Note(text=f"{out} is complete already")
        yield Result(value=_result(config, ReVQTokenizer.from_pretrained(out / "tokenizer")))
        return
    state = _new_state(config, inputs, fitted.codebooks)
    yield from resume(state, out / "checkpoints", inputs.device)
    yield from _loop(config, inputs, state, out)
    tokenizer = _build_tokenizer(config, inputs, state, fitted)
    _save_tokenizer(tokenizer, out / "tokenizer")
    yield Result(value=_result(config, tokenizer))


def _loop(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState, out: Path) -> Iterator[Event]:
    """Evaluate if due, save if due, stop if last, step."""
    from torch.utils.tensorboard import SummaryWriter

    due = max(1, math.ceil(inputs.total / config.evaluations))
    tokens = _token_table(config, inputs, state)
    yield Begin(task="train", total=inputs.total, unit="steps", done=state.step)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=state.step)
    values: dict[str, float] = {}
    resumed_at, started = state.step, time.perf_counter()
    try:
        while True:
            last = state.step == inputs.total
            if last or state.step % due == 0:
                if not state.history or state.history[-1]["step"] < state.step:
                    values = {**values, **_validate(config, inputs, state)}
                    state.history.append({"step": state.step, "lr": _learning_rate(config, inputs, state.step), **values})
                    _write_scalars(writer, state.history[-1])
                if state.step > resumed_at or state.step == 0:
                    save_checkpoint(state, out / "checkpoints")
                _write_metrics(state.history, out / "metrics.parquet")
                yield Advance(done=state.step, values=_shown(state.history[-1]))
            if last:
                return
            loss = _step(config, inputs, state, tokens)
            if state.step % _LOG_EVERY == 0:
                rate = (state.step - resumed_at) / (time.perf_counter() - started)
                values = {"train_loss": float(loss), "steps_per_s": rate}
                yield Advance(done=state.step, values={**_shown(state.history[-1]), "loss": float(loss)})
    finally:
        writer.close()


def _step(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState, tokens: Tensor | None) -> Tensor:
    """One update; `tokens` (N,T) are the train latents' indices where the codebooks do not change. Returns the loss."""
    finishing, scale = state.step >= inputs.steps, inputs.transform.scale
    index = _batch_index(config, inputs, state.step)
    latents = inputs.train.batch(index)
    standardised = inputs.transform.standardize(latents)
    codebook_loss = torch.zeros((), device=inputs.device)
    if tokens is not None:
        coordinates = state.quantizer.decode(tokens[index.to(tokens.device)].long())
    else:
        true = inputs.transform.to_coordinates(standardised)
        indices = state.quantizer.encode(true)
        coordinates = state.quantizer.decode(indices)
        state.counts += code_counts(indices, state.counts.shape[1])
        if config.codebook_lr > 0 and not finishing:
            codebook_loss = F.mse_loss(coordinates, true)
    quantized = inputs.transform.from_coordinates(coordinates.detach())
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.autocast):
        rectified = state.rectifier(quantized).float()
    if finishing:
        loss = _picture_loss(inputs, rectified, latents)
    elif config.width == 0:
        loss = codebook_loss
    else:
        loss = F.mse_loss(rectified * scale, standardised * scale) + codebook_loss
    _update(config, inputs, state, loss)
    return loss.detach()


def _picture_loss(inputs: _Inputs, rectified: Tensor, latents: Tensor) -> Tensor:
    """Mean squared error in [0,1] pixels between decode(rectified) and decode(cached latent); no image is read."""
    assert inputs.vae is not None
    with torch.no_grad():
        target = inputs.vae.decode(latents)
    return F.mse_loss(inputs.vae.decode(inputs.transform.unstandardize(rectified)), target) / 4


def _update(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState, loss: Tensor) -> None:
    """Backward, clip, step, average, reset unused codes at the end of an epoch."""
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss is {loss.item()} at step {state.step}; nothing was written over: try a lower --lr, or --precision fp32, in a new folder"
        )
    rectifier_group, codebook_group = state.optimizer.param_groups
    rectifier_group["lr"] = _learning_rate(config, inputs, state.step)
    frozen = config.codebook_lr == 0 or state.step >= inputs.steps
    codebook_group["lr"] = 0.0 if frozen else config.codebook_lr * _decay(inputs, state.step)
    state.optimizer.zero_grad()
    if loss.requires_grad:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.rectifier.parameters(), 1.0)
        state.optimizer.step()
    state.step += 1
    update_average(state.average, state.rectifier, config.ema, state.step)
    if not frozen and state.step % inputs.steps_per_epoch(config.batch_size) == 0:
        reset_unused(state.quantizer.codebooks, state.counts, seed=config.seed * 1_000_003 + state.step)
        state.counts.zero_()


def _batch_index(config: TrainRectifierConfig, inputs: _Inputs, step: int) -> Tensor:
    """(B,) rows of the step's batch: a pure function of seed and step."""
    finishing = step >= inputs.steps
    size = min(config.finish_batch_size if finishing else config.batch_size, len(inputs.train))
    epoch, within = divmod(step - inputs.steps if finishing else step, inputs.steps_per_epoch(size))
    return _epoch_order(len(inputs.train), config.seed + finishing, epoch)[within * size : (within + 1) * size]


# Shuffling a million rows takes as long as a step; an epoch's order is the same at each of its steps.
_epoch_order = functools.lru_cache(maxsize=1)(epoch_permutation)


def _decay(inputs: _Inputs, step: int) -> float:
    """Exponential, from 1 to 5 % at the end of the first phase."""
    return 0.05 ** (step / max(1, inputs.steps))


def _learning_rate(config: TrainRectifierConfig, inputs: _Inputs, step: int) -> float:
    """Warm-up and exponential decay in the first phase, warm-up and a cosine to zero in the last."""
    if step < inputs.steps:
        return config.lr * min(1.0, (step + 1) / min(100, inputs.steps)) * _decay(inputs, step)
    done, finish = step - inputs.steps, max(1, inputs.total - inputs.steps)
    return config.lr * min(1.0, (done + 1) / min(20, finish)) * 0.5 * (1 + math.cos(math.pi * done / finish))


@torch.no_grad()
def _validate(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState) -> dict[str, float]:
    """Mean squared error of standardised latents on the validation split, before and after rectification; usage counts stay untouched."""
    before = after = 0.0
    for index in torch.arange(len(inputs.val)).split(_EVALUATION_BATCH):
        standardised = inputs.transform.standardize(inputs.val.batch(index))
        quantized = inputs.transform.from_coordinates(state.quantizer.decode(state.quantizer.encode(inputs.transform.to_coordinates(standardised))))
        before += float((quantized - standardised).square().mean()) * len(index)
        after += float((state.average(quantized) - standardised).square().mean()) * len(index)
    return {"val_mse_quantized": before / len(inputs.val), "val_mse_rectified": after / len(inputs.val)}


@torch.no_grad()
def _token_table(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState) -> Tensor | None:
    """(N,T) indices of all train latents where the codebooks are frozen, so that a batch is a look-up; else None."""
    if config.codebook_lr > 0:
        return None
    batches = torch.arange(len(inputs.train)).split(_EVALUATION_BATCH)
    return torch.cat([state.quantizer.encode(inputs.transform(inputs.train.batch(batch))).int() for batch in batches])


def _check_store(store: LatentStore, fitted: Codebooks) -> None:
    if fitted.identity["store_fingerprint"] != store.fingerprint:
        raise MismatchError(
            f"the codebooks were fitted on latents of fingerprint {fitted.identity['store_fingerprint']}, but {store.path} has {store.fingerprint} "
            "(another VAE, image size or crop); fit codebooks on this store"
        )
    if fitted.transform.mean.shape != torch.Size(store.encoding.latent_shape):
        raise CodebookError(
            f"the codebooks are for latents of shape {tuple(fitted.transform.mean.shape)}, the store has {store.encoding.latent_shape}"
        )


def _open_inputs(config: TrainRectifierConfig, store: LatentStore, fitted: Codebooks) -> _Inputs:
    """Open everything before anything slow, and choose the rows: rectifier and codebooks may see different images."""
    device = pick_device(config.device)
    split = store[config.split]
    share = fitted.identity["rectifier_share"]
    rows = spread_rows(split, share, "second" if share else "first")
    if config.val_split in store.splits:
        val_split, val_rows, val_name = store[config.val_split], None, config.val_split
    else:
        val_split, val_rows, val_name = split, split_rows(split, _HELD_OUT_SHARE, "holdout"), f"last 2 % of {config.split}"
        rows = np.setdiff1d(rows, val_rows)
    if not len(rows):
        raise TrainingError(f"no latents are left to train on in split {config.split!r} of {store.path}; encode more images")
    vae = None
    if config.finish_steps and config.width:
        vae = FrozenVAE.load_recorded(store.encoding.vae, spec=config.vae, device=device)
    steps = config.steps if config.steps is not None else config.epochs * max(1, len(rows) // config.batch_size)
    return _Inputs(
        store=store,
        transform=fitted.transform.to(device),
        train=ResidentLatents(split, rows, device=device),
        val=ResidentLatents(val_split, val_rows, device=device),
        val_name=val_name,
        device=device,
        autocast=config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"),
        vae=vae,
        steps=steps,
        total=steps + (config.finish_steps if config.width else 0),
    )


def _new_state(config: TrainRectifierConfig, inputs: _Inputs, codebooks: Tensor) -> TrainState:
    channels = inputs.store.encoding.latent_shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rectifier = Rectifier(channels=channels, width=max(config.width, 32), depth=config.depth, block=config.block).to(inputs.device)
    quantizer = MultiGroupQuantizer(codebooks).to(inputs.device)
    groups: list[dict[str, Any]] = [
        {"params": list(rectifier.parameters()), "weight_decay": config.weight_decay},
        {"params": list(quantizer.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    counts = torch.zeros(codebooks.shape[:2], dtype=torch.int64, device=inputs.device)
    return TrainState(rectifier=rectifier, average=copy.deepcopy(rectifier), quantizer=quantizer, optimizer=optimizer, counts=counts)


def _write_scalars(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name != "step":
            writer.add_scalar(name, value, row["step"])


def _write_metrics(history: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in history for name in row))
    table = pa.table({name: [row.get(name) for row in history] for name in names})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _shown(row: dict[str, Any]) -> dict[str, float]:
    """The figures worth watching, under the names that the progress bar has room for."""
    return {"quantized": row["val_mse_quantized"], "rectified": row["val_mse_rectified"]}


def _build_tokenizer(config: TrainRectifierConfig, inputs: _Inputs, state: TrainState, fitted: Codebooks) -> ReVQTokenizer:
    tokens, codes, _ = fitted.codebooks.shape
    encoding = inputs.store.encoding
    last = state.history[-1]
    tokenizer = ReVQTokenizer(
        {
            "kind": TOKENIZER_KIND,
            "format_version": FORMAT_VERSION,
            "tokens": tokens,
            "codes": codes,
            "latent_shape": list(encoding.latent_shape),
            "image_size": encoding.image_size,
            "resize_filter": encoding.resize_filter,
            "crop": encoding.crop,
            "transform": fitted.identity["transform"],
            "rectifier": state.rectifier.settings if config.width else None,
            "vae": encoding.vae,
            "store_fingerprint": inputs.store.fingerprint,
            "metrics": {"val_mse_quantized": last["val_mse_quantized"], "val_mse_rectified": last["val_mse_rectified"]},
            "validated_on": inputs.val_name,
            "steps": inputs.total,
        }
    )
    tokenizer.transform.load_state_dict(fitted.transform.state_dict())
    tokenizer.quantizer.load_state_dict(state.quantizer.state_dict())
    if tokenizer.rectifier is not None:
        tokenizer.rectifier.load_state_dict(state.average.state_dict())
    return tokenizer


def _save_tokenizer(tokenizer: ReVQTokenizer, folder: Path) -> None:
    """The folder appears under its name only when it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def _result(config: TrainRectifierConfig, tokenizer: ReVQTokenizer) -> dict[str, Any]:
    """What `--json` prints."""
    rectifier = tokenizer.rectifier
    return {
        "out": config.out,
        "tokenizer": str(Path(config.out) / "tokenizer"),
        "steps": tokenizer.config["steps"],
        "tokens": tokenizer.tokens,
        "codes": tokenizer.codes,
        "bits_per_image": tokenizer.bits_per_image,
        "rectifier_parameters": 0 if rectifier is None else parameter_count(rectifier.requires_grad_(True)),
        "fingerprint": tokenizer.fingerprint,
        **tokenizer.config["metrics"],
        "validated_on": tokenizer.config["validated_on"],
    }
