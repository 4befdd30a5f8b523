"""kernels/small.cu: few rows of x. Bound by memory: all that counts is that weights keep coming."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: Rows of x that one launch takes.
MOST_ROWS = 16
_WARPS = 16
#: Floats of one token's 32 rows in a warp's partial sums, as REDS in small.cu pads them.
_TOKEN_FLOATS = 36


class _Args(ctypes.Structure):
    _fields_ = (
        *POINTERS,
        *((name, ctypes.c_int) for name in ("m", "n", "k", "units", "tiles", "blocks", "wn", "wk")),
        *((name, ctypes.c_int) for name in ("chunk", "xstride", "grain", "batch")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work. Fields as in small.cu's Args."""

    wn: int
    wk: int
    ctas: int
    stages: int
    blocks: int
    chunk: int
    whole: bool
    batch: int
    shared: int


@functools.lru_cache(maxsize=4096)
def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int, limit: int = SHARED_MEMORY) -> Plan:
    """The division of `tiles` x `units` for m rows, by a model of one CTA's time that was fitted on one H200.

    `limit`: bytes of shared memory.
    """
    stages = 2 if m <= 2 and units > 128 else 1
    ring, sums = _WARPS * stages * (unit_bytes + 8), _WARPS * m * _TOKEN_FLOATS * 4
    room = (limit - ring - sums) // m - 16  # for a row of x
    wn, wk, ctas = _shape(m, tiles, units, processors, room // 512)
    blocks, whole = -(-tiles // wn), ctas == 0
    ctas = min(ctas or processors, blocks if whole else blocks * units)
    fits = room >= units * 256 and (whole or m * units < 1024)
    chunk = units if fits else max(wk, min(room // 512, units, 160 // m) // wk * wk)
    shared = ring + (1 if chunk == units else 2) * m * (chunk * 256 + 16)
    batch = min(-(-blocks // ctas), (limit - shared) // sums) if whole and chunk == units else 1
    return Plan(wn, wk, ctas, stages, blocks, chunk, whole, batch, shared + batch * sums)


def _shape(m: int, tiles: int, units: int, processors: int, half: int) -> tuple[int, int, int]:
    """(warps along rows, warps along K, CTAs or 0 for whole blocks); `half`: units of x that fit twice."""

    def microseconds(rows: int, columns: int, x_units: int, reductions: int) -> float:
        return (rows * columns * 2304 / 33 + x_units * 256 * m / 41) / 1e3 + reductions * (0.1 + 0.13 * m)

    options: list[tuple[float, tuple[int, int, int]]] = []
    for wn in (1, 2, 4, 8):
        wk, blocks = _WARPS // wn, -(-tiles // wn)
        if wk > min(units, half):
            continue
        rounds = -(-blocks // processors)
        x_units = units if m * units * 256 < 110_000 else rounds * units
        options.append((microseconds(rounds * wn, units, x_units, rounds), (wn, wk, 0)))
        ctas = 128 if processors > 128 and blocks * units % 128 == 0 else processors
        share = -(-blocks * units // ctas)
        if wn == 8 and share >= 2:
            options.append((microseconds(wn, share, share, 1) + 4.5, (wn, wk, ctas)))
    return min(options)[1] if options else (_WARPS, 1, 0)


def macros(m: int, own: Plan, *, mxfp4: bool, bf16: bool, bulk: bool = True) -> Macros:
    """What small.cu is compiled for."""
    tiles = 1 if m <= 8 else 2
    values = {"FMT": mxfp4, "BF16": bf16, "NT": tiles, "WARPS": own.wn * own.wk, "BULK": bulk, "STAGES": own.stages}
    return tuple((name, int(value)) for name, value in values.items())


def launcher(
    shape: tuple[int, int, int], weights: tuple[int, int, int], dtype: torch.dtype, device: torch.device, card: Card
) -> Launcher:
    """What computes Y [M, N] = x [M, K] @ W.T * rows + bias for (M, N, K) and units of the shape `weights`."""
    (m, n, k), (tiles, units, unit_bytes) = shape, weights
    own = plan(m, tiles, units, unit_bytes, card.processors, card.shared)
    options = macros(m, own, mxfp4=is_mxfp4(unit_bytes), bf16=dtype == torch.bfloat16, bulk=card.bulk)
    kernel = function("small", "fp4_small", device.index or 0, card.arch, options)
    grain = units if own.whole else 1
    numbers = (m, n, k, units, tiles, own.blocks, own.wn, own.wk, own.chunk, own.chunk * 256 + 16, grain, own.batch)
    return Launcher(
        kernel,
        device,
        (own.ctas, own.wn * own.wk * 32, own.shared),
        _Args(*(None,) * len(POINTERS), *numbers),
        sums=None if own.whole else (2 * own.ctas * 32 * own.wn * m, own.blocks),
        early=card.bulk,
    )
