"""The state of train-rectifier: all that changes while it trains, and all that a checkpoint holds.

Shapes: T tokens, K codes per codebook.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError, TrainingError
from ...models.quantizer import MultiGroupQuantizer
from ...models.rectifier import Rectifier
from ...models.weight_keys import compare_weights
from .. import ranks
from ..configs import TrainRectifierConfig
from .data import Inputs

LATENT_SCORE, PIXEL_SCORE = "val_loss", "val_pixel_loss"
"""The columns by which the first and the decoder phase are judged."""
_DIVERGED = 10.0  # an untrained rectifier changes nothing, so each phase begins at an error that a sound one falls below
_REMEDY = "try a lower --lr or --codebook-lr, or --precision fp32, in a new folder"
_MODULES = ("rectifier", "ema", "quantizer", "optimizer")
_VALUES = ("planned", "streamed", "precision", "latent_steps", "total_steps", "step", "best", "usage", "history")


@dataclass(kw_only=True)
class TrainState:
    """All that changes while training."""

    rectifier: Rectifier
    ema: Rectifier
    """The moving average of its weights."""
    quantizer: MultiGroupQuantizer
    optimizer: torch.optim.Optimizer
    planned: tuple[int, int]
    """Steps of the latent phase and of the whole run that the settings ask for."""
    latent_steps: int
    """Steps of the latent phase: as planned, or fewer where it stopped early."""
    total_steps: int
    """Steps of both phases."""
    streamed: bool
    """Whether the latents are streamed, which is another order of them than resident ones have."""
    precision: str
    """"bf16" or "fp32", found out when the run begins and kept wherever it goes on; "auto" until then."""
    step: int = 0
    counts: Tensor
    """(T,K) int64: how often this rank used each code since the last reset of unused codes."""
    loss_sum: Tensor
    """(2,) sums of the rectifier's and the codebooks' loss since the last log point, on the device."""
    bad_step: Tensor
    """() int64 on the device: the first step whose loss or gradient was not finite, -1 while there is none. From it on no weight changes."""
    best: dict[str, Any] = field(default_factory=dict)
    """"step" and "score" of the best evaluation of the present phase, and which column of the table the score is; lower is better."""
    usage: Tensor | None = None
    """(3,) what `mean_usage` says of the last whole epoch, on the device; None before the first one ends, and where the codebooks do not change."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.parquet so far: of evaluations, and between them of losses alone."""

    @property
    def in_decoder_phase(self) -> bool:
        """Whether the next step belongs to the decoder phase."""
        return self.step >= self.latent_steps

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations so far."""
        return [row for row in self.history if LATENT_SCORE in row]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the same whatever the number of ranks. Every rank must ask at once."""
        modules = {name: getattr(self, name).state_dict() for name in _MODULES}
        return {**modules, **{name: getattr(self, name) for name in _VALUES}, "counts": ranks.sum_tensors(self.counts.clone())}

    def faults(self, state: Mapping[str, Any]) -> str:
        """What keeps `state` from being one that `state_dict` gave for such a run; "" where nothing does. To be asked before any of it is taken."""
        if lacking := [name for name in (*_MODULES, *_VALUES, "counts") if name not in state]:
            return f"it lacks {', '.join(lacking)}"
        for name in ("rectifier", "ema", "quantizer"):
            if faults := compare_weights(getattr(self, name).state_dict(), state[name]):
                return f"{name}: {faults}"
        if state["counts"].shape != self.counts.shape:
            return "counts are of another shape"
        return _optimizer_faults(self.optimizer, state["optimizer"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Where the settings plan other steps now, the early end of the other run is forgotten."""
        if state["streamed"] != self.streamed:
            had, has = ("stream", "resident") if state["streamed"] else ("resident", "stream")
            raise MismatchError(f"the run began with --latents {had}, which has another order than --latents {has}; go on with --latents {had}")
        for name in _MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.best, self.usage, self.history = (state[name] for name in ("step", "best", "usage", "history"))
        self.precision = state["precision"]
        if tuple(state["planned"]) == self.planned:
            self.latent_steps, self.total_steps = state["latent_steps"], state["total_steps"]
        self.counts.copy_(state["counts"])
        if ranks.rank() > 0:
            self.counts.zero_()


def _optimizer_faults(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str:
    """torch itself takes moments of other shapes, and starts without a word at zero where there are none."""
    if [len(group["params"]) for group in state["param_groups"]] != [len(group["params"]) for group in optimizer.param_groups]:
        return "optimizer: it is of other parameters"
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        moments = [state["state"].get(index, {}).get("exp_avg") for index in saved["params"]]
        there = [moment for moment in moments if moment is not None]
        if there and len(there) < len(moments):
            return f"optimizer: {len(moments) - len(there)} of {len(moments)} moments are missing"
        if there and any(moment.shape != parameter.shape for moment, parameter in zip(there, group["params"], strict=True)):
            return "optimizer: moments are of another shape"
    return ""


def new_state(config: TrainRectifierConfig, inputs: Inputs, codebooks: Tensor) -> TrainState:
    """Fresh weights, the fitted codebooks, no step done."""
    channels, device = inputs.store.encoding.latent_shape[0], inputs.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rectifier = Rectifier(channels=channels, width=max(config.width, 32), depth=config.depth, block=config.block).to(device)
    if device.type != "mps":
        rectifier.to(memory_format=torch.channels_last)  # faster in bf16 on CPU and CUDA
    quantizer = MultiGroupQuantizer(codebooks).to(device).train(config.codebook_lr > 0)
    groups: list[dict[str, Any]] = [
        {"params": list(rectifier.parameters()), "weight_decay": config.weight_decay},
        {"params": list(quantizer.parameters()), "weight_decay": 0.0},
    ]
    first = config.steps if config.steps is not None else config.epochs * inputs.steps_per_epoch(config.batch_size)
    total = first + (config.decoder_steps if config.width else 0)
    return TrainState(
        rectifier=rectifier,
        ema=copy.deepcopy(rectifier),
        quantizer=quantizer,
        optimizer=torch.optim.AdamW(groups, lr=config.lr, fused=True),
        planned=(first, total),
        latent_steps=first,
        total_steps=total,
        streamed=inputs.stream is not None,
        precision=config.precision,
        counts=torch.zeros(codebooks.shape[:2], dtype=torch.int64, device=device),
        loss_sum=torch.zeros(2, device=device),
        bad_step=torch.full((), -1, device=device),
    )


def record_best(state: TrainState, row: dict[str, Any], score: str) -> bool:
    """Whether the new evaluation `row` is the best of its phase by the column `score`; a phase starts anew, its scores are no other's.

    Raises:
        TrainingError: the score is not finite, or more than 10 times that of the phase's start: the run has diverged.
    """
    start = state.latent_steps if score == PIXEL_SCORE else 0
    first = next((earlier[score] for earlier in state.evaluations if earlier["step"] == start), row[score])
    figures = [value for name, value in row.items() if name.startswith("val_")]
    if not all(map(math.isfinite, figures)) or row[score] > _DIVERGED * first > 0:
        found = f"{score} is {row[score]:.3g}, and was {first:.3g} at step {start}"
        raise TrainingError(f"training has diverged by step {state.step}: {found}; the checkpoints are from before: {_REMEDY}")
    if state.best.get("by") == score and row[score] >= state.best["score"]:
        return False
    state.best = {"step": state.step, "score": row[score], "by": score}
    return True


def stop_early(state: TrainState, patience: int | None) -> str:
    """End the present phase after `patience` evaluations without a better one; says so, or "" where it goes on."""
    later = [row for row in state.evaluations if row["step"] > state.best["step"]]
    if patience is None or len(later) < patience or state.done or state.step == state.latent_steps:
        return ""
    in_decoder_phase = state.in_decoder_phase
    if in_decoder_phase:
        state.total_steps = state.step
    else:
        state.latent_steps, state.total_steps = state.step, state.step + state.planned[1] - state.planned[0]
    return f"no better since step {state.best['step']}: the {'decoder' if in_decoder_phase else 'latent'} phase ends at step {state.step}"


def chosen_step(state: TrainState, patience: int | None) -> tuple[int, str]:
    """The step whose weights the tokenizer gets, and what to say of it ("" where it goes without saying).

    The last one; the best one of the phase that came last, with `patience` and where the decoder phase ends no better than it began.
    """
    last = state.evaluations[-1]
    if patience is not None:
        return int(state.best["step"]), ""
    start = next((row[PIXEL_SCORE] for row in state.evaluations if row["step"] == state.latent_steps and PIXEL_SCORE in row), None)
    if start is None or last["step"] == state.latent_steps or last[PIXEL_SCORE] < start:
        return int(last["step"]), ""
    best = int(state.best["step"])
    return best, (
        f"the decoder phase ends no better than it began (loss through the decoder {last[PIXEL_SCORE]:.4g}, {start:.4g} at its start): "
        f"the tokenizer gets the weights of step {best}"
    )


def watch_for_bad_steps(state: TrainState, losses: Tensor, norm: Tensor) -> None:
    """Add up the losses (2,), and note on the device the first step that is not finite: from it on the fused optimizer changes no weight.

    `found_inf` is what torch.amp.GradScaler gives it for this purpose; asking the loss itself would wait for the device at each step.
    """
    state.loss_sum += losses
    bad = ~torch.isfinite(losses.sum() + norm)
    state.bad_step.masked_fill_(bad & (state.bad_step < 0), state.step)
    state.optimizer.found_inf = (state.bad_step >= 0).float()  # type: ignore[attr-defined]


def refuse_bad_steps(state: TrainState) -> None:
    """Raise TrainingError, naming the step, where one was not finite. Waits for the device."""
    step = int(state.bad_step)
    if step >= 0:
        raise TrainingError(f"the loss or its gradient is not finite at step {step}; nothing was written over: {_REMEDY}")
