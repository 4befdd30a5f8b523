"""kernels/pair.cu: few rows of x where two CTAs can share memory. Bound by memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from halfbyte.problems import round_up
from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: chunk, step, xs and parts of a Plan, and bytes in all.
_Layout: TypeAlias = tuple[int, int, int, int, int]
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
        *((name, ctypes.c_int) for name in ("xs", "parts")),
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
    shared: int


def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int, limit: int = SHARED_MEMORY) -> Plan | None:
    """The division of `tiles` x `units` for m rows, one block for each pair; None where blocks would be too large.

    `limit`: bytes of shared memory.
    """
    wn, half, top = -(-tiles // (processors // 2)), -(-units // 2), round_up(m, 8)
    stages = 2 if top == 8 and wn * half >= _LONG else 1
    # All numbers of rows up to `top` share machine code, so they have the same warps.
    for most in (next((warps for work, warps in _WARPS if wn * half <= work), 16), 8):
        warps = min(most, wn * (units // 2))
        sizes = (wn, half, stages, unit_bytes, limit)
        found = _whole(top, warps, *sizes)
        if found is None and warps % wn * 8 <= warps:  # x in chunks: then each warp stays in one tile
            warps -= warps % wn
            found = _chunks(top, warps, *sizes) and (_whole(m, warps, *sizes) or _chunks(m, warps, *sizes))
        elif found is not None:
            found = _whole(m, warps, *sizes)
        if found is not None and wn * 16 <= warps * 32:  # a thread for each row that a CTA finishes
            chunk, step, xs, parts, shared = found
            # Two CTAs on one multiprocessor would leave another one idle: that took up to half again as long.
            return Plan(wn, warps, stages, -(-tiles // wn), chunk, step, xs, parts, max(shared, limit // 2 + 128))
    return None


def microseconds(own: Plan, m: int, units: int) -> float:
    """What a launch for 17 to 32 rows takes, beside what any launch takes: fitted to 34 launches on one H200."""
    eights, work = -(-m // 8), own.wn * -(-units // 2)
    return 2.4 + 0.3 * eights + (0.05 + 0.018 * eights) * work


def _whole(m: int, warps: int, wn: int, half: int, stages: int, unit_bytes: int, limit: int) -> _Layout | None:
    """All of a CTA's x at once; None if that does not fit."""
    xs, sums = _around(m, warps, wn, stages, unit_bytes)
    parts = xs + m * (half * 256 + 16)
    return (half, 1, xs, parts, parts + sums) if warps and parts + sums <= limit else None


def _chunks(m: int, warps: int, wn: int, half: int, stages: int, unit_bytes: int, limit: int) -> _Layout | None:
    """Chunks of x, several in all; None if they do not fit. Each tile of a block has as many warps."""
    (xs, sums), step = _around(m, warps, wn, stages, unit_bytes), warps // wn
    room = (limit - xs - sums) // _CHUNKS // m - 16
    most = min(round_up(-(-half // _CHUNKS), max(step, 1)), room // 256, half - 1)
    chunk = most // step * step if step else 0
    parts = xs + min(_CHUNKS, -(-half // max(chunk, 1))) * m * (chunk * 256 + 16)
    return (chunk, step, xs, parts, parts + sums) if chunk > 0 else None


def _around(m: int, warps: int, wn: int, stages: int, unit_bytes: int) -> tuple[int, int]:
    """Bytes before x (rings, barriers, factors and biases) and behind it (the warps' parts, the partner's sums)."""
    bars = warps * stages + 2 * _CHUNKS + 1
    before = round_up(warps * stages * unit_bytes + bars * 8, 16) + wn * 128
    return before, 2 * (warps + wn - 1) * m * _PART * 4 + wn * m * 64


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
    numbers = (m, n, k, units, tiles, own.wn, own.chunk, own.step, own.chunk * 256 + 16, own.xs, own.parts)
    grid = (2 * own.blocks, own.warps * 32, own.shared)
    return Launcher(kernel, device, grid, _Args(*(None,) * len(POINTERS), *numbers), early=True)
