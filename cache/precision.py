"""Whether a dtype keeps latents apart: its rounding error beside the deviation of each channel.

float16 has 11 bits: latents of 1000 plus or minus a little all become 1000, without a word, and so do all codes that are fitted on them.
Every position is standardised by its own mean and deviation later, so what counts is how much a position varies over the rows; a channel's
deviation is the root mean square of that over its positions.

Shapes: B rows; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError

TOLERATED_LOSS = 0.01
ENOUGH_ROWS = 1024
"""So many tell a deviation to a few percent, and are read in no time."""
# A channel is constant, and so loses nothing, where it varies by a millionth of what another one does (fit-codebooks leaves such positions at
# their mean), or by no more than the last bits in which the same image comes out of the encoder in another batch.
_CONSTANT_BESIDE_OTHERS = 1e-6
_CONSTANT_BESIDE_ITSELF = 6 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Loss:
    """What rounding takes of one channel."""

    channel: int
    offset: float
    """The channel's mean."""
    deviation: float
    share: float
    """Root mean square rounding error over the deviation."""

    def __str__(self) -> str:
        return (
            f"channel {self.channel} of the latents, {self.offset:.4g} with a deviation of {self.deviation:.2g}: "
            f"rounding takes {self.share:.2g} times that deviation, more than {TOLERATED_LOSS}"
        )


class RoundingSums:
    """Sums over rows of latents, as they were computed and as they are kept."""

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        """Start with no rows of (C,H,W)."""
        self.rows = 0
        self._origin = np.zeros(latent_shape)  # the first row: sums of squares far from the mean would themselves lose what is looked for
        self._sum, self._squares, self._errors, self._own_errors = np.zeros((4, *latent_shape))

    def add(self, latents: NDArray[np.floating], kept: NDArray[np.floating] | None = None) -> None:
        """Take in latents (B,C,H,W).

        Args:
            latents: in the dtype in which they were computed, and rounded; or, where nothing else is left, in that of the store.
            kept: the same in the dtype of the store; None means that they are kept as they are.
        """
        values = latents.astype(np.float64)
        if self.rows == 0 and len(values):
            self._origin = values[0]
        self._sum += (values - self._origin).sum(0)
        self._squares += np.square(values - self._origin).sum(0)
        # A value rounded in a unit u of its last place is off by an even distribution of width u.
        self._own_errors += np.square(np.spacing(np.abs(latents)).astype(np.float64)).sum(0) / 12
        if kept is not None:
            self._errors += np.square(values - kept.astype(np.float64)).sum(0)
        self.rows += len(values)

    def worst(self, *, computed: bool = False) -> Loss | None:
        """The channel of which rounding takes most; None where fewer than two rows are known or no channel varies.

        Args:
            computed: look at the rounding of the dtype in which the latents were computed alone.
        """
        if self.rows < 2:
            return None
        mean = self._sum / self.rows
        deviation = np.sqrt(_by_channel(np.maximum(self._squares - self.rows * mean * mean, 0) / (self.rows - 1)))
        size = np.abs(self._origin + mean).mean((1, 2))
        varies = (deviation > _CONSTANT_BESIDE_OTHERS * deviation.max()) & (deviation > _CONSTANT_BESIDE_ITSELF * size)
        error = np.sqrt(_by_channel((self._own_errors if computed else self._errors + self._own_errors) / self.rows))
        share = np.divide(error, deviation, out=np.zeros_like(error), where=varies)
        channel = int(share.argmax())
        offset = float((self._origin + mean)[channel].mean())
        return Loss(channel, offset, float(deviation[channel]), float(share[channel])) if varies.any() else None

    def one_valued(self) -> list[int]:
        """Channels whose positions each hold one value in all rows, and not all of them zero; none where fewer than two rows are known."""
        if self.rows < 2:
            return []
        constant = ~self._squares.any((1, 2)) & self._origin.any((1, 2))
        return [int(channel) for channel in np.flatnonzero(constant)]

    def check(self, dtype: str) -> None:
        """Raise StoreError where keeping these latents in `dtype` takes more than a percent of a channel's deviation."""
        loss, computed = self.worst(), self.worst(computed=True)
        if computed and computed.share > TOLERATED_LOSS:
            raise StoreError(
                f"float32 itself does not resolve {computed}; use a VAE without that offset "
                "(a plug-in that leaves it out of the encoder's last bias, --vae FILE.py:FACTORY)"
            )
        if loss and loss.share > TOLERATED_LOSS:
            raise StoreError(f"{dtype} does not resolve {loss}; encode with --dtype float32 (and --overwrite)")


def _by_channel(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C,H,W) -> (C,)."""
    return np.asarray(squares.mean((1, 2)))
