"""kernels/pair.cu: few rows of x where two CTAs can share memory. Bound by memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch

from halfbyte.problems import round_up
from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: Rows of x that one launch takes.
MOST_ROWS: Final = 32
#: Chunks of x in shared memory, and floats from one token to the next in a part, as XBUF and PART in pair.cu.
_CHUNKS: Final = 4
_PART: Final = 20
#: Units of a CTA up to which so many warps are faster than 16.
_WARPS: Final = ((16, 8), (96, 12))
#: Units of a CTA from which two of them in flight for each warp are better than one, up to 8 rows.
_LONG: Final = 33


class _Args(ctypes.Structure):
    _fields_ = (
        *POINTERS,
        *((name, ctypes.c_int) for name in ("m", "n", "k", "units", "tiles", "wn", "chunk", "step", "xstride")),
        *((name, ctypes.c_int) for name in ("xs", "parts", "over")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work. Fields as in pair.cu's Args; `blocks` of `wn` tiles, one for each pair."""

    wn: int
    warps: int
    stages: int
    blocks: int
    chunk: int
    step: int
    xs: int
    parts: int
    over: bool
    shared: int


def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int, limit: int = SHARED_MEMORY) -> Plan | None:
    """The division of `tiles` x `units` for m rows, one block for each pair; None where blocks would be too large.

    `limit`: bytes of shared memory.
    """
    wn, half = -(-tiles // (processors // 2)), -(-units // 2)
    if units < 2:
        return None
    most = next((warps for units_of_cta, warps in _WARPS if wn * half <= units_of_cta), 16)
    warps, stages = min(most, wn * (units // 2)), 2 if m <= 8 and wn * half >= _LONG else 1
    if wn * 16 > warps * 32:  # a thread for each row that a CTA finishes
        return None
    if _layout(round_up(m, 8), wn, half, warps, stages, unit_bytes, limit, whole=True) is None:
        # x in chunks, for some of the rows that share machine code with these: then each warp stays in one tile.
        if warps % wn * 8 > warps:
            return None
        warps -= warps % wn
    found = _layout(m, wn, half, warps, stages, unit_bytes, limit, whole=True)
    found = found or _layout(m, wn, half, warps, stages, unit_bytes, limit, whole=False)
    if found is None:
        return None
    chunk, step, xs, parts, over, shared = found
    # Two CTAs on one multiprocessor would leave another one idle: that took up to half again as long.
    shared = max(shared, limit // 2 + 128)
    return Plan(wn, warps, stages, -(-tiles // wn), chunk, step, xs, parts, over, shared)


def _layout(
    m: int, wn: int, half: int, warps: int, stages: int, unit_bytes: int, limit: int, *, whole: bool
) -> tuple[int, int, int, int, bool, int] | None:
    """(chunk, step, xs, parts, over, bytes in all) with x as a `whole` or in chunks; None if that does not fit."""
    bars = warps * stages + 2 * _CHUNKS + 1
    xs = round_up(warps * stages * unit_bytes + bars * 8, 16) + wn * 128
    sums = 2 * (warps + wn - 1) * m * _PART * 4 + wn * m * 64
    if whole:
        parts = xs + m * (half * 256 + 16)
        return (half, 1, xs, parts, False, parts + sums) if parts + sums <= limit else None
    step = warps // wn
    for over in (False, True):
        room = (limit - xs - (0 if over else sums)) // _CHUNKS // m - 16
        chunk = min(round_up(-(-half // _CHUNKS), step), room // 256 // step * step)
        if chunk < step:
            continue
        x = min(_CHUNKS, -(-half // chunk)) * m * (chunk * 256 + 16)
        parts = xs if over else xs + x
        if parts + sums <= limit:
            return chunk, step, xs, parts, over, max(xs + x, parts + sums)
    return None


def macros(m: int, own: Plan, *, mxfp4: bool, bf16: bool) -> Macros:
    """What pair.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "NT": -(-m // 8), "WARPS": own.warps, "STAGES": own.stages}
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
    numbers = (m, n, k, units, tiles, own.wn, own.chunk, own.step, own.chunk * 256 + 16, own.xs, own.parts, own.over)
    grid = (2 * own.blocks, own.warps * 32, own.shared)
    return Launcher(kernel, device, grid, _Args(*(None,) * len(POINTERS), *numbers), early=True)
