"""Whether a file holds the weights of a network, all of them and no others, and one line that names what differs.

A loader that goes on without a tensor makes its values up, other ones each time: then nothing downstream can be right, and nothing says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

_NAMED = 3
# How many batches a BatchNorm has seen: no evaluation uses it, and files older than PyTorch 0.4.1 do not have it.
_UNUSED_COUNTER = ".num_batches_tracked"


def compare_weights(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What keeps `found` from being the weights of a network whose state is `expected`, both tensors by name; "" where nothing does."""
    both = expected.keys() & found.keys()
    shapes = [(name, tuple(found[name].shape), tuple(expected[name].shape)) for name in both]
    return explain_weights(
        missing=expected.keys() - both, unexpected=found.keys() - both, mismatched=[shape for shape in shapes if shape[1] != shape[2]]
    )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash over names, shapes and float32 values, so that a copy in another file format is the same network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def explain_weights(*, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Sequence[Any]]) -> str:
    """One line that counts the tensors at fault and names the first; "" where there are none.

    Args:
        missing: names that the network has and the file has not.
        unexpected: names that the file has and the network has not.
        mismatched: (name, shape in the file, shape in the network).
    """
    missing, unexpected = ([name for name in names if not name.endswith(_UNUSED_COUNTER)] for names in (missing, unexpected))
    shapes = [f"{name} is {_shape(found)} and not {_shape(expected)}" for name, found, expected in mismatched]
    parts = [_part("missing", missing), _part("unexpected", unexpected), _part("of another shape", shapes)]
    return "; ".join(part for part in parts if part)


def _part(fault: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {fault}: {shown}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single value"
