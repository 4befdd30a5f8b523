"""kernels/route.cu: which rows go to which expert, and the weighted sum of what comes back.

A slot is one expert of one token, `token * top_k + j`. Rows are sorted by expert; experts get blocks of rows.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.driver import function, launch, pointers
from halfbyte_cuda_marlin.cuda.nvrtc import Macros

_ROUTE_THREADS: Final = 1024
_KEPT: Final = (1, 4, 16)
_GATHER_THREADS: Final = 256
_SUM_THREADS: Final = 128


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the slots of one call go: int32 tensors on the device, filled in by `fp4_route`.

    All are empty where nothing is sorted: then each slot is a block by itself, in place.
    """

    #: [T, k]: global numbers of experts.
    ids: Tensor
    #: [numbers]: local numbers; None where all `experts` are here.
    expert_map: Tensor | None
    experts: int
    #: Rows of a block, at most.
    block: int
    #: [1]: how many blocks there are.
    count: Tensor
    #: [2]: zero, for the matrix kernels to deal out their work by.
    tickets: Tensor
    #: [max_blocks, 4]: local expert, first sorted row, rows, number within the expert + 65536 * blocks of the expert.
    blocks: Tensor
    #: [slots]: the slot of each sorted row, -1 beyond the last.
    source: Tensor
    #: [slots]: the sorted row of each slot; -1 where the expert is elsewhere, or is none.
    position: Tensor

    @property
    def slots(self) -> int:
        """How many there are, of all tokens."""
        return self.ids.numel()

    @property
    def top_k(self) -> int:
        """Slots of a token."""
        return self.ids.shape[1]

    @property
    def numbers(self) -> int:
        """How many experts there are everywhere."""
        return self.experts if self.expert_map is None else self.expert_map.numel()


class _RouteArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "map", "count", "blocks", "source", "position")),
        *((name, ctypes.c_int) for name in ("slots", "numbers", "experts", "block")),
    )


class _GatherArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "position", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "top_k", "k")),
    )


class _SumArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "position", "weights", "y", "ids", "map")),
        *((name, ctypes.c_int) for name in ("tokens", "top_k", "n", "slots", "splits", "numbers", "experts")),
    )


def most_blocks(slots: int, experts: int, block: int) -> int:
    """The most blocks that any routing of `slots` to `experts` can have."""
    hit = min(slots, experts)
    return hit + (slots - hit) // block


def route(topk_ids: Tensor, expert_map: Tensor | None, experts: int, block: int) -> Routing:
    """Sort the slots of topk_ids (int32 [T, k], contiguous) by expert into blocks of at most `block` rows.

    The first kernel of a chain: the one behind it may be launched early.
    """
    slots = topk_ids.numel()
    most = most_blocks(slots, experts, block)
    memory = torch.empty(4 + 4 * most + 2 * slots, dtype=torch.int32, device=topk_ids.device)
    count, tickets, _, blocks, source, position = memory.split((1, 2, 1, 4 * most, slots, slots))
    own = Routing(topk_ids, expert_map, experts, block, count, tickets, blocks.view(most, 4), source, position)
    addresses = pointers(topk_ids, expert_map, count, blocks, source, position)
    arguments = _RouteArgs(*addresses, slots, own.numbers, experts, block)
    launch(load("fp4_route", topk_ids.device, kept=_kept(slots)), 1, _ROUTE_THREADS, 4 * experts, arguments)
    return own


def alone(topk_ids: Tensor, expert_map: Tensor | None, experts: int) -> Routing:
    """The routing of few slots (at most 32) that are not sorted; the kernels of experts_small.cu alone take it."""
    nothing = topk_ids.new_empty(0)
    return Routing(topk_ids, expert_map, experts, 1, nothing, nothing, nothing, nothing, nothing)


def gather(x: Tensor, routing: Routing) -> Tensor:
    """The rows of x [T, K] in sorted order, [slots, K]; those beyond the last sorted row are not written."""
    (tokens, k), top_k = x.shape, routing.top_k
    y = x.new_empty(tokens * top_k, k)
    ctas = -(-tokens * k // (8 * _GATHER_THREADS))
    arguments = _GatherArgs(*pointers(x, routing.position, y), tokens, top_k, k)
    kernel = load("fp4_gather", x.device)
    launch(kernel, ctas, _GATHER_THREADS, 0, arguments, early=True)
    return y


def weighted_sum(parts: Tensor, routing: Routing, topk_weights: Tensor, y: Tensor) -> None:
    """Y [T, N] = the sum over each token's slots of topk_weights (float32 [T, k]) * their rows of `parts`.

    parts: in y's dtype [slots, N], or float32 [splits, slots, N] that add up to the result.
    """
    wide, splits = parts.dtype != torch.float32, parts.shape[0] if parts.ndim == 3 else 1
    tokens, n = y.shape
    ctas = -(-tokens * n // ((8 if wide else 4) * _SUM_THREADS))
    arguments = _SumArgs(
        *pointers(parts, routing.position, topk_weights, y, routing.ids, routing.expert_map),
        *(tokens, routing.top_k, n, routing.slots, splits, routing.numbers, routing.experts),
    )
    kernel = load("fp4_sum", y.device, wide=wide, bf16=y.dtype == torch.bfloat16)
    launch(kernel, ctas, _SUM_THREADS, 0, arguments, early=True)


def _kept(slots: int) -> int:
    """Slots that each thread of `fp4_route` keeps in registers."""
    return next((kept for kept in _KEPT if slots <= kept * _ROUTE_THREADS), _KEPT[-1])


@functools.lru_cache
def load(name: str, device: torch.device, *, wide: bool = False, bf16: bool = True, kept: int = 1) -> ctypes.c_void_p:
    """One of the kernels of route.cu on a device, compiled if need be."""
    return function("route", name, device.index or 0, "sm_90a", macros(wide=wide, bf16=bf16, kept=kept))


def macros(*, wide: bool = False, bf16: bool = True, kept: int = 1) -> Macros:
    """What route.cu is compiled for."""
    return (("FMT", 0), ("BF16", int(bf16)), ("WIDE", int(wide)), ("KEPT", kept))


def kinds(*, bf16: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of every kernel that some number of slots needs."""
    sorting: list[tuple[str, dict[str, Any]]] = [("fp4_route", {"kept": kept}) for kept in _KEPT]
    sums = [("fp4_sum", {"wide": wide, "bf16": bf16}) for wide in (False, True)]
    return [*sorting, ("fp4_gather", {}), *sums]
