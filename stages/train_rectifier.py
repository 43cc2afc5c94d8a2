"""Stage two, second half: train the rectifier, and the codebooks beside it, from cached latents alone.

    revq train-rectifier STORE CODEBOOKS OUT --steps 2000

In: a latent store and fitted codebooks. Out: a run folder with `tokenizer/` (the result), `checkpoints/`, `metrics.parquet`,
`tensorboard/`, `config.json`, and `usage.parquet` where codebooks were trained. The same command again resumes, and ends with the same
tokenizer as a run never stopped.

Two phases. First mean squared error of standardised latents as in the paper, times the transform's scale (1 but for the decoder
transform, whose coordinates weigh a position by how much it moves the picture). Then, for `finish_steps`, the loss is taken
through the frozen decoder, decode(rectified) against decode(cached latent); only this phase (and `previews`) needs the VAE.

Read beside it: training_data.py (rows and batch order), frozen_table.py (tokens computed once), network.py (precision, compilation, ranks),
objectives.py and schedules.py (pure functions), micro_batches.py (the last phase in parts), train_state.py (and what ends a run), validation.py,
checkpoints.py, live_figures.py, training_log.py. Under torchrun each rank holds its part of the latents; gradients, counts and validation are
shared, and the global batch is the same one that a single process would take.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, T tokens per image, K codes per codebook, D dims per token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.batches import ResidentLatents
from ..cache.store import LatentStore
from ..errors import ConfigError
from ..files import sha256_file
from ..models.codebooks import CODEBOOKS_NAME, load_codebooks
from ..models.device import bf16_is_fast
from ..models.nearest import search_note
from ..models.quantizer import code_counts, reset_unused
from ..models.rectifier import BLOCKS, update_average
from ..models.tokenizer import ReVQTokenizer
from . import ranks
from .configs import TrainRectifierConfig
from .code_usage import count_codes, write_usage
from .events import Advance, Begin, Event, Note, Result
from .output_folder import OutputFolder, note_on_writer, output_folder
from .training.checkpoints import began_with, resume, save_checkpoint, take_weights
from .training.data import LATENTS, Inputs, open_inputs
from .training.frozen_tokens import FrozenTable, quantize_once
from .training.live_figures import LOG_EVERY, LiveFigures, codebook_figures, mean_usage, row_is_due
from .training.log import TrainingLog, require_wandb
from .training.losses import PictureLoss, latent_loss
from .training.micro_batches import backward_in_parts, memory_advice, try_last_phase
from .training.network import COMPILE, RectifierNetwork, open_network
from .training.schedules import SCHEDULES, decay, evaluation_interval, first_phase_factor, last_phase_factor
from .training.state import LATENT_SCORE, PICTURE_SCORE, TrainState, chosen_step, judge, new_state, stop_early, watch_for_bad_steps
from .training.tokenizer_folder import build_tokenizer, is_complete, result, save_tokenizer
from .training.validation import picture_error, preview, validate

RUN_KIND = "revq-rectifier-run"
# What may change from one command to the next on the same folder: none of it shapes the weights beyond rounding.
# (How latents are read does shape the order: a checkpoint says how its run began, and `resume` refuses the other way.)
_RUNTIME_ONLY = {"store", "codebooks", "out", "device", "vae", "overwrite", "compile", "previews", "keep", "wandb", "latents", "micro_batch"}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one process makes of the inputs before the first step; nothing of it is saved."""

    network: RectifierNetwork
    train: FrozenTable | None
    """Train latents quantized once; None where the codebooks change or the latents are streamed."""
    val: FrozenTable | None
    """The same of the validation latents."""
    pictures: PictureLoss | None
    """The loss of the last phase; None where there is none."""
    log: TrainingLog


def train_rectifier(config: TrainRectifierConfig) -> Iterator[Event]:
    """Train, then write the tokenizer; yields progress, then a `Result`.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, OutputError, TrainingError, ConfigError: see their messages.
    """
    with output_folder(config.out, kind=RUN_KIND, command="train-rectifier") as folder:
        yield from _train(config, folder)


def _train(config: TrainRectifierConfig, folder: OutputFolder) -> Iterator[Event]:
    """The stage, in a folder that is held."""
    yield from note_on_writer(config.codebooks)
    store, fitted, out = LatentStore.open(config.store), load_codebooks(config.codebooks), folder.path
    identity = _identity(config, store)
    inputs = open_inputs(config, store, fitted, None if config.overwrite else began_with(out, identity))
    state = new_state(config, inputs, fitted.codebooks)
    folder.claim(identity, overwrite=config.overwrite)
    if is_complete(out, state.planned):
        yield Note(text=f"{out} is complete already")
        yield Result(value=result(config, ReVQTokenizer.from_pretrained(out / "tokenizer")))
        return
    yield from resume(state, out / "checkpoints", inputs.device)
    with memory_advice(state, None):
        run = yield from _prepare(config, inputs, state, out)
    try:
        with memory_advice(state, run.pictures):
            yield from _loop(config, inputs, state, run, out)
    finally:
        run.log.close()
    step, reason = chosen_step(state, config.patience)
    if reason:
        yield Note(text=reason, warning=True)
    step = yield from take_weights(state, out / "checkpoints", step, inputs.device)
    if config.codebook_lr > 0 and state.first_steps > 0:
        counts, errors = yield from count_codes(inputs.store[config.split], inputs.transform, state.quantizer.codebooks.detach())
        if ranks.rank() == 0:
            write_usage(out, counts, errors)
    tokenizer = build_tokenizer(config, inputs, state, fitted, step)
    if ranks.rank() == 0:
        save_tokenizer(tokenizer, out / "tokenizer")
    ranks.barrier()
    yield Result(value=result(config, tokenizer))


def _loop(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, run: _Run, out: Path) -> Iterator[Event]:
    """Evaluate and save if due, stop if last, step. The device is waited for at log points, and where an epoch's order is copied to it."""
    yield _begin(state)
    live = LiveFigures(config, inputs, state)
    while True:
        evaluation_is_due = _evaluation_is_due(config, state)
        if evaluation_is_due or state.step % LOG_EVERY == 0:
            live.read(state)
            if not evaluation_is_due and row_is_due(state):
                state.history.append({"step": state.step, "lr": _last_rate(state), **live.row(state)})
                run.log.row(state.history)
            elif evaluation_is_due and (not state.history or state.history[-1]["step"] < state.step):  # a resumed run has this one
                yield from _evaluate(config, inputs, state, run, live, out)
            yield Advance(done=state.step, values=live.shown(state))
            live.restart(state)
        if state.done:
            return
        _step(config, inputs, state, run)


def _begin(state: TrainState) -> Begin:
    """Of either phase: their steps take different times."""
    task = "train through the decoder" if state.finishing and not state.done else "train"
    return Begin(task=task, total=max(1, state.total_steps), unit="steps", done=state.step)


def _evaluation_is_due(config: TrainRectifierConfig, state: TrainState) -> bool:
    """At the start and the end of each phase, and evenly between."""
    first, total = state.planned
    into, steps = (state.step - state.first_steps, total - first) if state.finishing else (state.step, first)
    return state.done or into % evaluation_interval(steps, total, config.evaluations) == 0


def _step(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, run: _Run) -> Tensor:
    """One update; returns this rank's loss, still on the device."""
    if state.finishing:
        index, latents = inputs.take(config.finish_batch_size, config.seed + 1, state.step - state.first_steps)
    else:
        index, latents = inputs.take(config.batch_size, config.seed, state.step)
    state.optimizer.zero_grad()
    standardised = inputs.transform.standardize(latents)
    loss = codebook_loss = torch.zeros((), device=inputs.device)
    if run.train is not None:
        quantized = run.train.batch(index, inputs.transform, state.quantizer)
    else:
        quantized, codebook_loss = _quantize(config, inputs, state, standardised)
    if state.finishing:
        assert run.pictures is not None
        loss = backward_in_parts(run.network, run.pictures, quantized, latents)
    elif config.width:
        loss = latent_loss(run.network(quantized), standardised, inputs.transform.scale)
    _update(config, inputs, state, torch.stack([loss, codebook_loss]))
    return (loss + codebook_loss).detach()


def _quantize(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, standardised: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized standardised latents (B,C,H,W), without gradient, and the codebooks' own loss; counts the codes."""
    true = inputs.transform.to_coordinates(standardised)
    indices = state.quantizer.encode(true)
    coordinates = state.quantizer.decode(indices)
    state.counts += code_counts(indices, state.counts.shape[1])
    loss = torch.zeros((), device=inputs.device) if state.finishing or config.codebook_lr == 0 else F.mse_loss(coordinates, true)
    return inputs.transform.from_coordinates(coordinates.detach()), loss


def _update(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, losses: Tensor) -> None:
    """Backward from losses (2,) where that is still to be done, clip, step, average, reset unused codes at the end of an epoch; never waits for
    the device."""
    frozen = config.codebook_lr == 0 or state.finishing
    rectifier_group, codebook_group = state.optimizer.param_groups
    rectifier_group["lr"] = _learning_rate(config, state)
    codebook_group["lr"] = 0.0 if frozen else config.codebook_lr * decay(config.schedule, state.step, state.planned[0])
    if losses.requires_grad:
        losses.sum().backward()
    codebooks = state.quantizer.codebooks
    if codebooks.grad is not None and ranks.world_size() > 1:
        ranks.sum_tensors(codebooks.grad).div_(ranks.world_size())
    norm = torch.nn.utils.clip_grad_norm_(state.rectifier.parameters(), 1.0)
    shared = ranks.sum_tensors(losses.detach().clone()).div_(ranks.world_size())
    watch_for_bad_steps(state, shared, norm.to(shared.device))
    state.optimizer.step()
    state.step += 1
    update_average(state.average, state.rectifier, config.ema, state.step)
    if not frozen and state.step % inputs.steps_per_epoch(config.batch_size) == 0:
        _reset_unused(state, config.seed)


@torch.no_grad()
def _reset_unused(state: TrainState, seed: int) -> None:
    """The paper's non-activation reset, by the counts of all ranks; how the codes were used until now stays on the device."""
    state.usage = mean_usage(ranks.sum_tensors(state.counts))
    reset_unused(state.quantizer.codebooks, state.counts, seed=seed * 1_000_003 + state.step)
    state.counts.zero_()


def _learning_rate(config: TrainRectifierConfig, state: TrainState) -> float:
    """The rectifier's, for the next step."""
    if state.finishing:
        return config.lr * last_phase_factor(state.step - state.first_steps, max(1, state.total_steps - state.first_steps))
    return config.lr * first_phase_factor(config.schedule, state.step, state.planned[0])


def _last_rate(state: TrainState) -> float:
    """The rectifier's learning rate of the step just taken."""
    return float(state.optimizer.param_groups[0]["lr"])


def _evaluate(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, run: _Run, live: LiveFigures, out: Path) -> Iterator[Event]:
    """Validate, end the phase where it no longer gets better, log, save a checkpoint; a diverged run ends before anything is written."""
    lr = _last_rate(state) if state.step else _learning_rate(config, state)
    row: dict[str, Any] = {"step": state.step, "lr": lr, **live.row(state), **codebook_figures(state), **validate(inputs, state, run.val)}
    in_last_phase = state.step > state.first_steps
    if in_last_phase:
        row |= picture_error(inputs, state, run.val, run.pictures)
    state.history.append(row)
    best = judge(state, row, PICTURE_SCORE if in_last_phase else LATENT_SCORE)
    stopped = stop_early(state, config.patience)
    if state.step == state.first_steps < state.total_steps:  # where the last phase begins, to be judged by a score of its own
        row |= picture_error(inputs, state, run.val, run.pictures)
        best = judge(state, row, PICTURE_SCORE)
    if config.previews and config.width and ranks.rank() == 0:
        previewed, picture = preview(inputs, state, run.val, config.previews)
        row |= previewed
        run.log.picture("previews: vae, quantized, rectified", picture, state.step)
    run.log.row(state.history)
    save_checkpoint(state, out / "checkpoints", keep=config.keep, best=best)
    if stopped:
        yield Note(text=stopped)
    if stopped or 0 < state.step == state.first_steps < state.total_steps:
        yield _begin(state)


def _identity(config: TrainRectifierConfig, store: LatentStore) -> dict[str, Any]:
    """What makes a run folder this run's."""
    codebooks_sha256 = sha256_file(Path(config.codebooks) / CODEBOOKS_NAME)
    return {**config.identity(), "store_fingerprint": store.fingerprint, "codebooks_sha256": codebooks_sha256}


def _prepare(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, out: Path) -> Generator[Event, None, _Run]:
    """Everything that is done once before the first step."""
    if state.precision == "auto":
        state.precision = ranks.broadcast("bf16" if bf16_is_fast(inputs.device) else "fp32")
    example, finish_example = (_example(inputs, size) for size in (config.batch_size, config.finish_batch_size))
    compiling = config.compile if config.width else "off"
    network, note = open_network(state.rectifier, example, bf16=state.precision == "bf16", compiling=compiling)
    if note:
        yield Note(text=note, warning=True)
    if note := search_note(inputs.device, state.quantizer.codebooks.shape[2]):
        yield Note(text=note)
    train = val = pictures = None
    if config.codebook_lr == 0 and isinstance(inputs.train, ResidentLatents):
        train = yield from quantize_once(inputs.train, config.split, inputs.transform, state.quantizer)
        state.counts = train.counts
    if config.codebook_lr == 0:
        val = yield from quantize_once(inputs.val, inputs.val_name, inputs.transform, state.quantizer)
    if inputs.vae is not None:
        micro_batch = config.micro_batch or len(finish_example)
        pictures = PictureLoss(
            vae=inputs.vae, transform=inputs.transform, lpips=inputs.lpips, lpips_weight=config.finish_lpips, micro_batch=micro_batch
        )
        if config.finish_steps and not state.done:
            pictures, note = try_last_phase(network, pictures, state, finish_example)
            if note:
                yield Note(text=note)
    settings = {**config.identity(), "epochs": config.epochs, "steps": config.steps}
    log = TrainingLog(out, step=state.step + 1 if state.history else 0, wandb=config.wandb, settings=settings)
    return _Run(network=network, train=train, val=val, pictures=pictures, log=log)


def _example(inputs: Inputs, batch_size: int) -> Tensor:
    """A batch (B/R,C,H,W) of zeros, of the shape that steps of that batch size have."""
    return torch.zeros(inputs.batch_size(batch_size) // ranks.world_size(), *inputs.store.encoding.latent_shape, device=inputs.device)
