"""kernels/pair.cu: few rows of x where two CTAs can share memory. Bound by memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch

from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: Rows of x that one launch takes.
MOST_ROWS: Final = 32
_WARPS: Final = 16
#: Chunks of x in shared memory, as XBUF.
_CHUNKS: Final = 4
#: Floats of one token's 32 rows in a warp's partial sums, as REDS in few.cuh pads them.
_TOKEN_FLOATS: Final = 36
#: Units of 128 columns from which two of them in flight for each warp are better than one.
_LONG: Final = 128
#: Bytes of x that are not worth dividing into chunks.
_SMALL: Final = 16_384


class _Args(ctypes.Structure):
    _fields_ = (
        *POINTERS,
        *((name, ctypes.c_int) for name in ("m", "n", "k", "units", "tiles", "wn", "wk", "chunk", "xstride")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work. Fields as in pair.cu's Args; `blocks` of 32 * wn rows, one for each pair."""

    wn: int
    wk: int
    stages: int
    blocks: int
    chunk: int
    shared: int


def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int, limit: int = SHARED_MEMORY) -> Plan | None:
    """The division of `tiles` x `units` for m rows, one block for each pair; None where blocks would be too large.

    `limit`: bytes of shared memory.
    """
    wn, half = max(1, -(-tiles // (processors // 2))), -(-units // 2)
    if wn > _WARPS or _WARPS // wn * wn < 14:
        return None
    wk, stages = min(_WARPS // wn, half), 2 if units > _LONG else 1
    ring = -(-wn * wk * stages * (unit_bytes + 8) // 16) * 16
    room = (limit - ring) // _CHUNKS // m - 16
    quarter = -(-half // _CHUNKS // wk) * wk
    chunk = half if m * half * 256 <= _SMALL else min(quarter, max(wk, room // 256 // wk * wk))
    chunk = min(chunk, half)
    x = min(_CHUNKS, -(-half // chunk)) * m * (chunk * 256 + 16)
    shared = ring + max(x, wn * wk * m * _TOKEN_FLOATS * 4)
    return Plan(wn, wk, stages, -(-tiles // wn), chunk, shared) if shared <= limit else None


def macros(m: int, own: Plan, *, mxfp4: bool, bf16: bool) -> Macros:
    """What pair.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "NT": -(-m // 8), "WARPS": own.wn * own.wk, "STAGES": own.stages}
    return tuple((name, int(value)) for name, value in values.items())


def launcher(
    own: Plan,
    shape: tuple[int, int, int],
    weights: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    card: Card,
) -> Launcher:
    """What computes Y [M, N] = x [M, K] @ W.T * rows + bias for (M, N, K) and units of the shape `weights`."""
    (m, n, k), (tiles, units, unit_bytes) = shape, weights
    options = macros(m, own, mxfp4=is_mxfp4(unit_bytes), bf16=dtype == torch.bfloat16)
    kernel = function("pair", "fp4_pair", device.index or 0, card.arch, options)
    numbers = (m, n, k, units, tiles, own.wn, own.wk, own.chunk, own.chunk * 256 + 16)
    grid = (2 * own.blocks, own.wn * own.wk * 32, own.shared)
    return Launcher(kernel, device, grid, _Args(*(None,) * len(POINTERS), *numbers), early=True)
