"""Marlin's locks: int32 zeros that a call finds and leaves, and that calls running at the same time must not share."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: A multiprocessor runs at most so many of Marlin's blocks.
_BLOCKS: Final = 4
_KEPT: dict[tuple[int, int], Tensor] = {}


def make(device: torch.device) -> Tensor:
    """Locks for every block that the device can run at once."""
    count = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(count, dtype=torch.int32, device=device)


def current(layers: Tensor) -> Tensor:
    """The current stream's locks; while a graph is captured the layer's own, which need no node of their own there.

    So graphs that hold the same layer must not be replayed at the same time.
    """
    if torch.cuda.is_current_stream_capturing():
        return layers
    index = layers.device.index or 0
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    kept = _KEPT.get(key)
    if kept is None:
        kept = _KEPT[key] = make(layers.device)
    return kept
