"""Stage two, second half: train the rectifier, and the codebooks beside it, from cached latents alone.

    revq train-rectifier STORE CODEBOOKS OUT --steps 2000

In: a latent store and fitted codebooks. Out: a run folder with `tokenizer/` (the result), `checkpoints/`, `metrics.parquet`,
`tensorboard/`, `config.json`, and `usage.parquet` where codebooks were trained. The same command again resumes, and ends with the same
tokenizer as a run never stopped. Its parts are in `training/`: `run.py` is what a process holds, `state.py` what a checkpoint holds.

The latent phase: mean squared error of standardised latents as in the paper, times the transform's scale. Then, for `decoder_steps`, the loss
is taken through the frozen decoder, decode(rectified) against decode(cached latent); only this phase (and `previews`) needs the VAE.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, T tokens per image, K codes per codebook, D dims per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.store import LatentStore
from ..files import local_path, sha256_file
from ..models.codebooks import CODEBOOKS_NAME, load_codebooks
from ..models.quantizer import code_counts, reset_unused
from ..models.rectifier import update_ema
from ..models.tokenizer import ReVQTokenizer
from . import ranks
from .code_usage import count_codes, write_usage
from .configs import TrainRectifierConfig
from .events import Advance, Begin, Event, Note, Result
from .output_folder import OutputFolder, note_on_writer, output_folder
from .training.checkpoints import began_with, resume, save_checkpoint, take_weights
from .training.data import open_inputs
from .training.live_figures import LOG_EVERY, LiveFigures, codebook_figures, mean_usage, row_is_due
from .training.log import require_wandb
from .training.losses import latent_loss
from .training.micro_batches import backward_in_parts, memory_advice
from .training.run import TrainingRun, open_run, settings_of_weights
from .training.schedules import decay, evaluation_interval, rectifier_rate
from .training.state import LATENT_SCORE, PIXEL_SCORE, TrainState, chosen_step, new_state, record_best, stop_early, watch_for_bad_steps
from .training.tokenizer_folder import build_tokenizer, is_complete, result, save_tokenizer
from .training.validation import pixel_error, preview, validate

RUN_KIND = "revq-rectifier-run"


def train_rectifier(config: TrainRectifierConfig) -> Iterator[Event]:
    """Train, then write the tokenizer; yields progress, then a `Result`.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, OutputError, TrainingError, ConfigError: see their messages.
    """
    if config.wandb:
        require_wandb()
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
        run = yield from open_run(config, inputs, state, out)
    try:
        with memory_advice(state, run.pixel_loss):
            yield from _loop(run, state)
    finally:
        run.log.close()
    step, reason = chosen_step(state, config.patience)
    if reason:
        yield Note(text=reason, warning=True)
    step = yield from take_weights(state, out / "checkpoints", step, inputs.device)
    if config.codebook_lr > 0 and state.latent_steps > 0:
        counts, errors = yield from count_codes(inputs.store[config.split], inputs.transform, state.quantizer.codebooks.detach())
        if ranks.rank() == 0:
            write_usage(out, counts, errors)
    tokenizer = build_tokenizer(config, inputs, state, fitted, step)
    if ranks.rank() == 0:
        save_tokenizer(tokenizer, out / "tokenizer")
    ranks.barrier()
    yield Result(value=result(config, tokenizer))


def _identity(config: TrainRectifierConfig, store: LatentStore) -> dict[str, Any]:
    """What makes a run folder this run's."""
    codebooks_sha256 = sha256_file(local_path(config.codebooks) / CODEBOOKS_NAME)
    return {**settings_of_weights(config), "store_fingerprint": store.fingerprint, "codebooks_sha256": codebooks_sha256}


def _loop(run: TrainingRun, state: TrainState) -> Iterator[Event]:
    """Evaluate and save if due, stop if last, step. The device is waited for at log points, and where an epoch's order is copied to it."""
    yield _begin(state)
    live = LiveFigures(run.config, run.inputs, state)
    while True:
        evaluation_is_due = _evaluation_is_due(run, state)
        if evaluation_is_due or state.step % LOG_EVERY == 0:
            live.read(state)
            if not evaluation_is_due and row_is_due(state):
                state.history.append({"step": state.step, "lr": _last_rate(state), **live.row(state)})
                run.log.row(state.history)
            elif evaluation_is_due and (not state.history or state.history[-1]["step"] < state.step):  # a resumed run has this one
                yield from _evaluate(run, state, live)
            yield Advance(done=state.step, values=live.shown(state))
            live.restart(state)
        if state.done:
            return
        train_step(run, state)


def train_step(run: TrainingRun, state: TrainState) -> Tensor:
    """One step of the present phase; returns this rank's losses (2,), the rectifier's and the codebooks', still on the device."""
    state.optimizer.zero_grad()
    losses = decoder_step(run, state) if state.in_decoder_phase else latent_step(run, state)
    _update(run, state, losses)
    return losses


def latent_step(run: TrainingRun, state: TrainState) -> Tensor:
    """The paper's loss and its gradients: squared error of rectified latents, and of the codebooks' coordinates where they train."""
    config, transform = run.config, run.inputs.transform
    index, latents = run.inputs.take(config.batch_size, config.seed, state.step)
    standardised = transform.standardize(latents)
    quantized, codebook_loss = _quantize(run, state, index, standardised)
    loss = latent_loss(run.network(quantized), standardised, transform.scale) if config.width else torch.zeros_like(codebook_loss)
    losses = torch.stack([loss, codebook_loss])
    if losses.requires_grad:
        losses.sum().backward()
    return losses.detach()


def decoder_step(run: TrainingRun, state: TrainState) -> Tensor:
    """The loss through the frozen decoder and its gradients, a micro-batch at a time; the codebooks stay as they are."""
    assert run.pixel_loss is not None
    config = run.config
    index, latents = run.inputs.take(config.decoder_batch_size, config.seed + 1, state.step - state.latent_steps)
    quantized, codebook_loss = _quantize(run, state, index, run.inputs.transform.standardize(latents))
    loss = backward_in_parts(run.network, run.pixel_loss, quantized, latents)
    return torch.stack([loss, codebook_loss])


def _quantize(run: TrainingRun, state: TrainState, index: Tensor, standardised: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized standardised latents (B,C,H,W), without gradient, and the codebooks' own loss; counts the codes."""
    transform, no_loss = run.inputs.transform, torch.zeros((), device=run.inputs.device)
    if run.train is not None:
        return run.train.batch(index, transform, state.quantizer), no_loss
    true = transform.to_coordinates(standardised)
    indices = state.quantizer.encode(true)
    coordinates = state.quantizer.decode(indices)
    state.counts += code_counts(indices, state.counts.shape[1])
    loss = no_loss if _codebooks_rest(run, state) else F.mse_loss(coordinates, true)
    return transform.from_coordinates(coordinates.detach()), loss


def _update(run: TrainingRun, state: TrainState, losses: Tensor) -> None:
    """Clip, step, average, reset unused codes at the end of an epoch; never waits for the device."""
    config = run.config
    rectifier_group, codebook_group = state.optimizer.param_groups
    rectifier_group["lr"] = _learning_rate(run, state)
    rest = _codebooks_rest(run, state)
    codebook_group["lr"] = 0.0 if rest else config.codebook_lr * decay(config.schedule, state.step, state.planned[0])
    codebooks = state.quantizer.codebooks
    if codebooks.grad is not None and ranks.world_size() > 1:
        ranks.sum_tensors(codebooks.grad).div_(ranks.world_size())
    norm = torch.nn.utils.clip_grad_norm_(state.rectifier.parameters(), 1.0)
    shared = ranks.sum_tensors(losses.clone()).div_(ranks.world_size())
    watch_for_bad_steps(state, shared, norm.to(shared.device))
    state.optimizer.step()
    state.step += 1
    update_ema(state.ema, state.rectifier, config.ema, state.step)
    if not rest and state.step % run.inputs.steps_per_epoch(config.batch_size) == 0:
        _reset_unused(state, config.seed)


def _codebooks_rest(run: TrainingRun, state: TrainState) -> bool:
    return run.config.codebook_lr == 0 or state.in_decoder_phase


@torch.no_grad()
def _reset_unused(state: TrainState, seed: int) -> None:
    """The paper's non-activation reset, by the counts of all ranks; how the codes were used until now stays on the device."""
    state.usage = mean_usage(ranks.sum_tensors(state.counts))
    reset_unused(state.quantizer.codebooks, state.counts, seed=seed * 1_000_003 + state.step)
    state.counts.zero_()


def _evaluate(run: TrainingRun, state: TrainState, live: LiveFigures) -> Iterator[Event]:
    """Validate, end the phase where it no longer gets better, log, save a checkpoint; a diverged run ends before anything is written."""
    config = run.config
    lr = _last_rate(state) if state.step else _learning_rate(run, state)
    row: dict[str, Any] = {"step": state.step, "lr": lr, **live.row(state), **codebook_figures(state), **validate(run, state)}
    after_decoder_step = state.step > state.latent_steps
    if after_decoder_step:
        row |= pixel_error(run, state)
    state.history.append(row)
    best = record_best(state, row, PIXEL_SCORE if after_decoder_step else LATENT_SCORE)
    stopped = stop_early(state, config.patience)
    if state.step == state.latent_steps < state.total_steps:  # where the decoder phase begins, to be judged by a score of its own
        row |= pixel_error(run, state)
        best = record_best(state, row, PIXEL_SCORE)
    if config.previews and config.width and ranks.rank() == 0:
        previewed, picture = preview(run, state, config.previews)
        row |= previewed
        run.log.picture("previews: vae, quantized, rectified", picture, state.step)
    run.log.row(state.history)
    save_checkpoint(state, run.out / "checkpoints", keep=config.keep, best=best)
    if stopped:
        yield Note(text=stopped)
    if stopped or 0 < state.step == state.latent_steps < state.total_steps:
        yield _begin(state)


def _begin(state: TrainState) -> Begin:
    """Of either phase: their steps take different times."""
    task = "train through the decoder" if state.in_decoder_phase and not state.done else "train"
    return Begin(task=task, total=max(1, state.total_steps), unit="steps", done=state.step)


def _evaluation_is_due(run: TrainingRun, state: TrainState) -> bool:
    """At the start and the end of each phase, and evenly between."""
    latent, total = state.planned
    into, steps = (state.step - state.latent_steps, total - latent) if state.in_decoder_phase else (state.step, latent)
    return state.done or into % evaluation_interval(steps, total, run.config.evaluations) == 0


def _learning_rate(run: TrainingRun, state: TrainState) -> float:
    """The rectifier's, for the next step."""
    steps = state.total_steps - state.latent_steps if state.in_decoder_phase else state.planned[0]
    into = state.step - state.latent_steps if state.in_decoder_phase else state.step
    return run.config.lr * rectifier_rate("decoder" if state.in_decoder_phase else run.config.schedule, into, steps)


def _last_rate(state: TrainState) -> float:
    """The rectifier's learning rate of the step just taken."""
    return float(state.optimizer.param_groups[0]["lr"])
