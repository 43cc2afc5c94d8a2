"""Learning rates and evaluations of train-rectifier as pure functions of the step, so that a resumed run needs no scheduler's history.

The latent phase warms up, then follows one of three curves; the decoder phase (through the decoder) warms up and falls to zero along a cosine.
"""

from __future__ import annotations

import math

WARMUP_STEPS = 100
_DECODER_WARMUP_STEPS = 20
_LEAST_EVALUATIONS = 4
_LAST_SHARE = 0.05  # the paper's exponential decay ends at 5 %


def decay(schedule: str, step: int, steps: int) -> float:
    """Factor in (0,1] at `step` of a latent phase of `steps`: the paper's exponential decay to 5 %, a cosine to zero, or none.

    "constant" is the one that does not look at `steps`: a run with it can be made longer afterwards and equals one that was long at once.
    """
    share = step / max(1, steps)
    if schedule == "exponential":
        return _LAST_SHARE**share
    return 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1.0


def rectifier_rate(schedule: str, step: int, steps: int) -> float:
    """Warm-up times decay at `step` of a phase of `steps`; a warm-up is never longer than the phase, but where its length must not matter.

    Args:
        schedule: of the latent phase; or "decoder", the decoder phase's own short warm-up and cosine to zero.
    """
    warmup = _DECODER_WARMUP_STEPS if schedule == "decoder" else WARMUP_STEPS
    if schedule != "constant":
        warmup = min(warmup, steps)
    return min(1.0, (step + 1) / max(1, warmup)) * decay("cosine" if schedule == "decoder" else schedule, step, steps)


def evaluation_interval(steps: int, total: int, evaluations: int) -> int:
    """Steps between the evaluations of a phase of `steps` in a run of `total`: one interval for the whole run, but at least 4 in each phase."""
    return max(1, min(math.ceil(total / evaluations), math.ceil(steps / min(evaluations, _LEAST_EVALUATIONS))))
