"""What a user watches between evaluations: losses, speed and memory. Reading them waits for the device, so it is done at log points alone."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from .. import ranks
from ..configs import TrainRectifierConfig
from .data import Inputs
from .state import TrainState, chosen_step, refuse_bad_steps

_CODEBOOKS_AT_ONCE = 16
LOG_EVERY = 25
"""Steps between log points."""
_ROWS = 200
"""About so many rows of losses in a long run; a short one has a row for each log point."""


def row_is_due(state: TrainState) -> bool:
    """Whether a log point also gets a row of its own in metrics.parquet and TensorBoard."""
    return state.step % (LOG_EVERY * max(1, round(state.total_steps / _ROWS / LOG_EVERY))) == 0


@dataclass
class _Window:
    """Sums over some steps."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    codebook_loss: float = 0.0


class LiveFigures:
    """Means over the steps since the last log point, for the progress line, and since the last row, for the table."""

    def __init__(self, config: TrainRectifierConfig, inputs: Inputs, state: TrainState) -> None:
        self._config, self._inputs, self._row = config, inputs, _Window()
        self._last: dict[str, float] = {}
        self.restart(state)

    def restart(self, state: TrainState) -> None:
        """Start the clock anew: what an evaluation takes is no training."""
        self._step, self._when = state.step, time.perf_counter()

    def read(self, state: TrainState) -> dict[str, float]:
        """Figures of the steps since the last log point, empty where there are none; raises TrainingError where one was not finite."""
        refuse_bad_steps(state)
        steps = state.step - self._step
        images = steps * self._inputs.batch_size(self._config.decoder_batch_size if _in_decoder_phase(state) else self._config.batch_size)
        window = _Window(steps, images, time.perf_counter() - self._when, *state.loss_sum.tolist())
        state.loss_sum.zero_()
        self._row = _Window(*(a + b for a, b in zip(astuple(self._row), astuple(window), strict=True)))
        self.restart(state)
        self._last = self._means(window, state) | self._memory()
        return self._last

    def shown(self, state: TrainState) -> dict[str, float]:
        """What the progress line shows, under the result's names where the result has it; waits for the device.

        Errors are those of the weights that the tokenizer would get if this were the end: of the newest evaluation, or of `weights_of_step`.
        Losses and images/s are of the steps since the last log point; the result has none.
        """
        newest, (step, _) = state.evaluations[-1], chosen_step(state, self._config.patience)
        chosen = next(row for row in state.evaluations if row["step"] == step)
        shown: dict[str, float] = {
            name: chosen[name] for name in ("val_mse_quantized", "val_mse_rectified", "preview_rectified_db") if name in chosen
        }
        if chosen is not newest:
            shown["weights_of_step"] = step
        if self._config.codebook_lr > 0 and "codebook_usage" in newest:
            shown["codebook_usage"] = newest["codebook_usage"]
        if state.usage is not None:
            shown["codebook_usage"] = float(state.usage[0])
        short_names = {"images_per_s": "images/s", "device_memory_gib": "GiB"}
        shown |= {short_names.get(name, name): value for name, value in self._last.items()}
        if state.in_decoder_phase and not state.done:  # where the decoder phase begins: the codebooks train no more
            shown.pop("codebook_loss", None)
        return shown

    def row(self, state: TrainState) -> dict[str, float]:
        """Figures of the steps since the last row, up to the last log point."""
        row, self._row = self._row, _Window()
        means = self._means(row, state)
        return {name if name == "images_per_s" else f"train_{name}": value for name, value in means.items()} | self._memory()

    def _means(self, window: _Window, state: TrainState) -> dict[str, float]:
        """Of the losses that are trained."""
        if not window.steps:
            return {}
        means = {"loss": window.loss / window.steps} if self._config.width else {}
        if self._config.codebook_lr > 0 and not _in_decoder_phase(state):
            means["codebook_loss"] = window.codebook_loss / window.steps
        return {**means, "images_per_s": window.images / max(1e-9, window.seconds)}

    def _memory(self) -> dict[str, float]:
        if self._inputs.device.type != "cuda":
            return {}
        return {"device_memory_gib": torch.cuda.max_memory_allocated(self._inputs.device) / 2**30}


def _in_decoder_phase(state: TrainState) -> bool:
    """Of the step just taken: a phase's end is an evaluation, so no window reaches over it."""
    return state.step > state.latent_steps


def mean_usage(counts: Tensor) -> Tensor:
    """(T,K) counts -> (3,) float32: mean share of the codes used, mean perplexity, and how many codes of all codebooks were never used.

    It stays on the device, and so is float32, which MPS has too; a few codebooks at a time, since counts may fill half a gigabyte.
    """
    parts = []
    for some in counts.split(_CODEBOOKS_AT_ONCE):
        frequency = some.float() / some.sum(1, keepdim=True).clamp_min(1)
        used = (some > 0).sum(1)
        parts.append(torch.stack([used / some.shape[1], torch.special.entr(frequency).sum(1).exp(), some.shape[1] - used]))
    share, spread, dead = torch.cat(parts, 1)
    return torch.stack([share.mean(), spread.mean(), dead.sum()])


def codebook_figures(state: TrainState) -> dict[str, float]:
    """Of the train latents of all ranks: in the last whole epoch, or so far in the first; none before the first step. Waits for the device."""
    if state.usage is None:
        counts = ranks.sum_tensors(state.counts.clone())
        if not bool(counts.any()):
            return {}
        figures = mean_usage(counts)
    else:
        figures = state.usage
    return dict(zip(("codebook_usage", "codebook_perplexity", "codebook_dead"), figures.tolist(), strict=True))
