"""What the frozen modules have in common: float32, evaluation mode, and weights that any mode of torch can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import RevqError


class FrozenModule(nn.Module):
    """A module that is loaded, moved and used, but never trained.

    Its weights are never inference tensors, even where it is made, moved, copied or unpickled under `torch.inference_mode()`: those could not
    take part in a gradient afterwards, as in refining tokens. A subclass ends its `__init__` with `self.settle()`.
    """

    error: ClassVar[type[RevqError]] = RevqError
    """What a refused dtype raises."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, also when `train()` of a module around this one is called."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `cpu`, `half` and their kin call; raises `error`, with nothing changed, where that would leave float32."""
        dtype = fn(torch.empty(0, dtype=torch.float32, device="cpu")).dtype
        if dtype != torch.float32:
            raise self.error(
                f"a {type(self).__name__} keeps its weights in float32, not {dtype}, in which it would be another one; "
                "leave them, and call it under torch.autocast where bfloat16 is faster"
            )
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    def settle(self) -> None:
        """Go to evaluation mode, with all weights in float32, whatever torch's default dtype was, and ordinary tensors."""
        with torch.inference_mode(False):
            for module in self.modules():
                # Replaced, not given other data: a parameter that was made in inference mode never gets a version.
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_inference():
                        module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_inference():
                        module._buffers[name] = buffer.clone()
        self.eval().float()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The end of a copy or of unpickling."""
        super().__setstate__(state)
        self.settle()
