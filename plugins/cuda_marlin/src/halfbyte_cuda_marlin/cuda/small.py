"""kernels/small.cu: few rows of x. Bound by memory: all that counts is that weights keep coming."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.driver import POINTERS, function, launch, pointers
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.workspace import workspace

_LIMIT = 231_000
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


@functools.lru_cache(maxsize=16_384)
def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int) -> Plan:
    """The division of `tiles` x `units` for m rows, by a model of one CTA's time that was fitted on one H200."""
    wn, wk, ctas, stages = _shape(m, tiles, units, processors)
    blocks, whole, warps = -(-tiles // wn), ctas == 0, wn * wk
    ctas = min(ctas or processors, blocks if whole else blocks * units)
    ring, sums = warps * stages * (unit_bytes + 8), warps * m * _TOKEN_FLOATS * 4
    room = (_LIMIT - ring - sums) // m - 16
    fits = room >= units * 256 and (whole or m * units < 1024)
    chunk = units if fits else max(wk, min(room // 512, units, 160 // m) // wk * wk)
    shared = ring + (1 if chunk == units else 2) * m * (chunk * 256 + 16)
    batch = min(-(-blocks // ctas), (_LIMIT - shared) // sums) if whole and chunk == units else 1
    return Plan(wn, wk, ctas, stages, blocks, chunk, whole, batch, shared + batch * sums)


def _shape(m: int, tiles: int, units: int, processors: int) -> tuple[int, int, int, int]:
    """(warps along rows, warps along K, CTAs or 0 for whole blocks, stages)."""

    def microseconds(rows: int, columns: int, x_units: int, reductions: int) -> float:
        return (rows * columns * 2304 / 33 + x_units * 256 * m / 41) / 1e3 + reductions * (0.1 + 0.13 * m)

    options: list[tuple[float, tuple[int, int, int]]] = []
    for wn in (1, 2, 4, 8):
        wk, blocks = 16 // wn, -(-tiles // wn)
        if wk > units:
            continue
        rounds = -(-blocks // processors)
        x_units = units if m * units * 256 < 110_000 else rounds * units
        options.append((microseconds(rounds * wn, units, x_units, rounds), (wn, wk, 0)))
        ctas = 128 if processors > 128 and blocks * units % 128 == 0 else processors
        share = -(-blocks * units // ctas)
        if wn == 8 and share >= 2:
            options.append((microseconds(wn, share, share, 1) + 4.5, (wn, wk, ctas)))
    wn, wk, ctas = min(options)[1] if options else (16, 1, 0)
    return wn, wk, ctas, 2 if m <= 2 and units > 128 and options else 1


def macros(m: int, own: Plan, *, mxfp4: bool, bf16: bool) -> Macros:
    """What small.cu is compiled for."""
    tiles = 1 if m <= 8 else 2
    values = {"FMT": mxfp4, "BF16": bf16, "NT": tiles, "WARPS": own.wn * own.wk, "BULK": True, "STAGES": own.stages}
    return tuple((name, int(value)) for name, value in values.items())


def load(m: int, own: Plan, device: torch.device, *, mxfp4: bool, bf16: bool) -> ctypes.c_void_p:
    """The kernel for this plan on a device, compiled if need be."""
    return function("small", "fp4_small", device.index or 0, "sm_90a", macros(m, own, mxfp4=mxfp4, bf16=bf16))


def run(
    kernel: ctypes.c_void_p, own: Plan, x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Y [M, N] = x [M, K] @ W.T * rows + bias."""
    (m, k), n = x.shape, y.shape[1]
    part = counter = None
    if not own.whole:
        part, counter = workspace(x.device, 2 * own.ctas * 32 * own.wn * m, own.blocks)
    arguments = _Args(
        *pointers(x, units, rows, bias, y, part, counter),
        m,
        n,
        k,
        units.shape[1],
        units.shape[0],
        own.blocks,
        own.wn,
        own.wk,
        own.chunk,
        own.chunk * 256 + 16,
        units.shape[1] if own.whole else 1,
        own.batch,
    )
    launch(kernel, own.ctas, own.wn * own.wk * 32, own.shared, arguments)
