"""kernels/experts_small.cu: experts with few rows each. Bound by memory: what counts is that weights keep coming."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY
from halfbyte_cuda_marlin.cuda.driver import function, launch, pointers
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.routing import Routing, most_blocks

WARPS: Final = 16
#: Units in flight of each warp.
_STAGES: Final = (2, 1)
#: Numbers of parts that K may be divided into where the results may be partial sums.
_SPLITS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
#: Rows of a block that the kernel is made for, best first.
_BLOCKS: Final = (16, 8, 4, 2, 1)


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "row_mult", "bias", "y", "count", "blocks", "source")),
        *((name, ctypes.c_void_p) for name in ("ids", "map")),
        *((name, ctypes.c_int) for name in ("k", "units", "tiles", "n", "slots", "top_k", "numbers", "experts")),
        *((name, ctypes.c_int) for name in ("splits", "chunk")),
        *((name, ctypes.c_int) for name in ("wk", "buffers", "block", "xstride", "list")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work. Fields as in experts_small.cu's Args."""

    block: int
    wk: int
    splits: int
    chunk: int
    buffers: int
    list: int
    stages: int
    ctas: int
    shared: int


@functools.lru_cache(maxsize=16_384)
def plan(
    slots: int,
    here: int,
    experts: int,
    block: int | None,
    tiles: int,
    units: int,
    unit_bytes: int,
    processors: int,
    *,
    partial: bool = False,
) -> Plan:
    """The division for `slots` rows that go to some of `experts`, each `tiles` x `units`; by a model of a CTA's time.

    here: slots that are expected to have an expert here. block: rows of a block, or None for what fits. `partial`: the
    results may be sums over parts of K.
    """
    hit = experts * (1 - (1 - 1 / experts) ** here)
    wanted = 8 if here <= 5 * hit else 16
    for rows in (own for own in _BLOCKS if own <= wanted) if block is None else (block,):
        blocks = max(hit, here / rows)
        options = _options(rows, most_blocks(slots, experts, rows), units, unit_bytes, processors, partial)
        best = min(
            ((_microseconds(own, blocks, tiles, slots, unit_bytes), index, own) for index, own in enumerate(options)),
            default=None,
        )
        if best is not None:
            return best[2]
    raise ValueError(f"{units} units of K do not fit into shared memory with blocks of {block or 1} rows")


def _options(block: int, most: int, units: int, unit_bytes: int, processors: int, partial: bool) -> Iterator[Plan]:
    """All divisions that fit into shared memory."""
    room = most // processors + 3
    for stages in _STAGES:
        for splits in _SPLITS if partial else (1,):
            chunk = -(-units // splits)
            if splits > 1 and (splits > units or chunk * (splits - 1) >= units):
                continue
            for wk in (1, 2, 4, 8, 16):
                sums = 2 * WARPS * (2 if block > 8 else 1) * 1024 if wk > 1 else 0
                rings = WARPS * stages * (unit_bytes + 8) + 32 + 16 * room
                for buffers in (2, 1):
                    shared = rings + buffers * block * (chunk * 256 + 16) + sums
                    if shared <= SHARED_MEMORY:
                        yield Plan(block, wk, splits, chunk, buffers, room, stages, processors, shared)
                        break


#: All kernels that a plan may ask for.
KINDS: Final = tuple(Plan(block, 1, 1, 1, 1, 1, stages, 1, 1) for block in (8, 16) for stages in _STAGES)


def _microseconds(own: Plan, blocks: float, tiles: int, slots: int, unit_bytes: int) -> float:
    """A guess at the time of one CTA, and of adding up the splits, fitted on one H200."""
    items, teams = math.ceil(blocks * tiles * own.splits / own.ctas), WARPS // own.wk
    memory = items * own.chunk * unit_bytes / 31e3 * (1 + 0.01 * own.stages)
    unit = max(0.3 if own.block <= 8 else 0.45, 1.3 / own.stages)
    meeting = 0.3 + 0.04 * own.wk if own.wk > 1 else 0.0
    latency = -(-items // teams) * (-(-own.chunk // own.wk) * unit + meeting)
    strips = items / tiles + 1
    bubbles = strips * (0.1 if own.buffers == 2 else 1.6)
    return max(memory, latency) + bubbles + slots * tiles * 32 * 8 * (own.splits - 1) / 4e6


def load(own: Plan, device: torch.device, *, mxfp4: bool, bf16: bool, act: int, gather: bool) -> ctypes.c_void_p:
    """The kernel for this plan on a device, compiled if need be. `act` as in experts.cuh: 0 gives sums in float32."""
    return function(
        "experts_small",
        "fp4_experts_small",
        device.index or 0,
        "sm_90a",
        macros(own, mxfp4=mxfp4, bf16=bf16, act=act, gather=gather),
    )


def macros(own: Plan, *, mxfp4: bool, bf16: bool, act: int, gather: bool) -> Macros:
    """What experts_small.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "ACT": act, "NT": 1 if own.block <= 8 else 2, "WARPS": WARPS}
    values |= {"STAGES": own.stages, "GATHER": gather}
    return tuple((name, int(value)) for name, value in values.items())


def run(
    kernel: ctypes.c_void_p,
    own: Plan,
    x: Tensor,
    units: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    y: Tensor,
    routing: Routing,
    *,
    early: bool,
) -> None:
    """For each sorted row: y = the expert's W @ x * rows + bias, through the activation function if there is one.

    x: [T, K] or the sorted rows [slots, K], as the kernel was loaded for; y: [slots, N], or float32 [splits, slots, N].
    `early`: it is behind another kernel of the chain.
    """
    _, tiles, columns, _ = units.shape
    numbers = (
        *(x.shape[1], columns, tiles, y.shape[-1], routing.slots, routing.top_k, routing.numbers, routing.experts),
        *(own.splits, own.chunk, own.wk, own.buffers, own.block, own.chunk * 256 + 16, own.list),
    )
    addresses = pointers(x, units, rows, bias, y, routing.count, routing.blocks, routing.source)
    arguments = _Args(*addresses, *pointers(routing.ids, routing.expert_map), *numbers)
    launch(kernel, own.ctas, WARPS * 32 + 32, own.shared, arguments, early=early)
