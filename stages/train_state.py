"""The state of train-rectifier: all that changes while it trains, and all that a checkpoint holds.

Shapes: T tokens, K codes per codebook.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MismatchError, TrainingError
from ..models.quantizer import MultiGroupQuantizer
from ..models.rectifier import Rectifier
from . import ranks
from .training_data import Inputs

if TYPE_CHECKING:
    from .train_rectifier import TrainRectifierConfig

_MODULES = ("rectifier", "average", "quantizer", "optimizer")


@dataclass(kw_only=True)
class TrainState:
    """All that changes while training."""

    rectifier: Rectifier
    average: Rectifier
    quantizer: MultiGroupQuantizer
    optimizer: torch.optim.Optimizer
    planned: tuple[int, int]
    """Steps of the first phase and of the whole run that the settings ask for."""
    first_steps: int
    """Steps of the first phase: as planned, or fewer where it stopped early."""
    total_steps: int
    """Steps of both phases."""
    streamed: bool
    """Whether the latents are streamed, which is another order of them than resident ones have."""
    step: int = 0
    counts: Tensor
    """(T,K) int64: how often this rank used each code since the last reset of unused codes."""
    loss_sum: Tensor
    """() sum of the losses since the last evaluation, on the device."""
    bad_step: Tensor
    """() int64 on the device: the first step whose loss or gradient was not finite, -1 while there is none. From it on no weight changes."""
    best: dict[str, float] = field(default_factory=dict)
    """"step" and "score" of the best evaluation of the present phase; lower scores are better."""
    usage: Tensor | None = None
    """() share of the codes used in the last whole epoch, on the device; None before the first one ends, and where the codebooks do not change."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.parquet so far."""

    @property
    def finishing(self) -> bool:
        """Whether the next step belongs to the last phase."""
        return self.step >= self.first_steps

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the same whatever the number of ranks. Every rank must ask at once."""
        modules = {name: getattr(self, name).state_dict() for name in _MODULES}
        names = ("planned", "streamed", "first_steps", "total_steps", "step", "best", "usage", "history")
        return {**modules, **{name: getattr(self, name) for name in names}, "counts": ranks.sum_tensors(self.counts.clone())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Where the settings plan other steps now, the early end of the other run is forgotten."""
        if state["streamed"] != self.streamed:
            had, has = ("stream", "resident") if state["streamed"] else ("resident", "stream")
            raise MismatchError(f"the run began with --latents {had}, which has another order than --latents {has}; go on with --latents {had}")
        for name in _MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.best, self.usage, self.history = (state[name] for name in ("step", "best", "usage", "history"))
        if tuple(state["planned"]) == self.planned:
            self.first_steps, self.total_steps = state["first_steps"], state["total_steps"]
        self.counts.copy_(state["counts"])
        if ranks.rank() > 0:
            self.counts.zero_()


def new_state(config: TrainRectifierConfig, inputs: Inputs, codebooks: Tensor) -> TrainState:
    """Fresh weights, the fitted codebooks, no step done."""
    channels, device = inputs.store.encoding.latent_shape[0], inputs.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rectifier = Rectifier(channels=channels, width=max(config.width, 32), depth=config.depth, block=config.block).to(device)
    if device.type != "mps":
        rectifier.to(memory_format=torch.channels_last)  # faster in bf16 on CPU and CUDA
    quantizer = MultiGroupQuantizer(codebooks).to(device)
    groups: list[dict[str, Any]] = [
        {"params": list(rectifier.parameters()), "weight_decay": config.weight_decay},
        {"params": list(quantizer.parameters()), "weight_decay": 0.0},
    ]
    first = config.steps if config.steps is not None else config.epochs * inputs.steps_per_epoch(config.batch_size)
    total = first + (config.finish_steps if config.width else 0)
    return TrainState(
        rectifier=rectifier,
        average=copy.deepcopy(rectifier),
        quantizer=quantizer,
        optimizer=torch.optim.AdamW(groups, lr=config.lr, fused=True),
        planned=(first, total),
        first_steps=first,
        total_steps=total,
        streamed=inputs.stream is not None,
        counts=torch.zeros(codebooks.shape[:2], dtype=torch.int64, device=device),
        loss_sum=torch.zeros((), device=device),
        bad_step=torch.full((), -1, device=device),
    )


def note_best(state: TrainState, score: float, finishing: bool) -> bool:
    """Whether this evaluation is the best of its phase; the last phase's scores are not the first's, so it starts anew."""
    fresh = not state.best or state.best["finishing"] != finishing
    if fresh or score < state.best["score"]:
        state.best = {"step": state.step, "score": score, "finishing": finishing}
        return True
    return False


def stop_early(state: TrainState, finishing: bool, patience: int | None) -> str:
    """End the present phase after `patience` evaluations without a better one; says so, or "" where it goes on."""
    later = [row for row in state.history if row["step"] > state.best["step"]]
    if patience is None or len(later) < patience or state.done or state.step == state.first_steps:
        return ""
    if finishing:
        state.total_steps = state.step
    else:
        state.first_steps, state.total_steps = state.step, state.step + state.planned[1] - state.planned[0]
    return f"no better since step {state.best['step']:.0f}: the {'last' if finishing else 'first'} phase ends at step {state.step}"


def watch_for_bad_steps(state: TrainState, loss: Tensor, norm: Tensor) -> None:
    """Note on the device the first step that is not finite. From there on the fused optimizer leaves every weight as it is.

    `found_inf` is what torch.amp.GradScaler gives it for this purpose; asking the loss itself would wait for the device at each step.
    """
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    here = torch.full_like(state.bad_step, state.step)  # made on the device: a copy from the host would wait
    state.bad_step = torch.where((state.bad_step < 0) & bad, here, state.bad_step)
    state.loss_sum += loss
    state.optimizer.found_inf = (state.bad_step >= 0).float()  # type: ignore[attr-defined]


def refuse_bad_steps(state: TrainState) -> None:
    """Raise TrainingError, naming the step, where one was not finite."""
    step = int(state.bad_step)
    if step >= 0:
        raise TrainingError(
            f"the loss or its gradient is not finite at step {step}; nothing was written over: try a lower --lr, or --precision fp32, in a new folder"
        )


def mean_loss(state: TrainState) -> float:
    """Of the steps since the last evaluation."""
    return float(state.loss_sum) / max(1, state.step - int(state.history[-1]["step"]))
