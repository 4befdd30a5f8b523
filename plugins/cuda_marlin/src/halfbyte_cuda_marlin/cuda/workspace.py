"""Memory for sums of blocks that several CTAs share: partial sums, and counters that are zero between calls."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    """(float32 [at least sums], int32 zeros [at least counters]) that no other stream uses.

    Kept for each stream, whose calls come one after the other. A CUDA graph gets memory of its own, since it may be
    replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return _make(device, sums, counters)
    index = device.index or 0
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    kept = _KEPT.get(key)
    if kept is None or kept[0].numel() < sums or kept[1].numel() < counters:
        before = (0, 0) if kept is None else (kept[0].numel(), kept[1].numel())
        kept = _KEPT[key] = _make(device, max(sums, before[0]), max(counters, before[1]))
    return kept


def _make(device: torch.device, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
