"""kernels/wide.cu: many rows of x, on Hopper's warpgroup matrix units."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.driver import POINTERS, function, launch, pointers, tensor_map
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.workspace import workspace

#: Units of 128 columns on their way, by (tokens of a tile, warpgroups): what fits into shared memory.
_STAGES: Final = {(32, 4): 6, (32, 2): 8, (64, 4): 6, (64, 2): 8, (128, 4): 4, (128, 2): 5, (256, 2): 3}


class _Args(ctypes.Structure):
    _fields_ = (
        *POINTERS,
        *((name, ctypes.c_int) for name in ("m", "n", "k", "units", "tiles", "blocks", "ttiles")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work: tiles of `tokens` rows of x and `groups` x 64 rows of W."""

    tokens: int
    groups: int
    stages: int
    ctas: int
    blocks: int
    token_tiles: int
    shared: int


@functools.lru_cache(maxsize=16_384)
def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int) -> Plan:
    """The division for m rows, as measured on one H200."""
    if m <= 128:
        tokens = 32 if m <= 32 else 64 if m <= 64 else 128
        groups = 4 if tiles * units >= (14000 if m <= 32 else 28000) else 2
    else:
        enough = -(-tiles // 4) * -(-m // 256) >= 90 or units > 64
        tokens, groups = 256 if enough else 128, 2
    stages, blocks, token_tiles = _STAGES[tokens, groups], -(-tiles // (2 * groups)), -(-m // tokens)
    items = blocks * token_tiles
    uncut = 100 <= items <= processors
    ctas = items if uncut else min(128, processors, items * units)
    stage = -(-(tokens * 256 + groups * 2 * unit_bytes) // 1024) * 1024
    return Plan(tokens, groups, stages, ctas, blocks, token_tiles, 1024 + stages * (stage + 16))


def macros(own: Plan, *, mxfp4: bool, bf16: bool) -> Macros:
    """What wide.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "NTOK": own.tokens, "WGS": own.groups, "STAGES": own.stages}
    return tuple((name, int(value)) for name, value in values.items())


def load(own: Plan, device: torch.device, *, mxfp4: bool, bf16: bool) -> ctypes.c_void_p:
    """The kernel for this plan on a device, compiled if need be."""
    return function("wide", "fp4_wide", device.index or 0, "sm_90a", macros(own, mxfp4=mxfp4, bf16=bf16))


def run(
    kernel: ctypes.c_void_p, own: Plan, x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Y [M, N] = x [M, K] @ W.T * rows + bias."""
    (m, k), n = x.shape, y.shape[1]
    part, counter = workspace(x.device, 2 * own.ctas * 64 * own.groups * own.tokens, own.blocks * own.token_tiles)
    arguments = _Args(
        *pointers(x, units, rows, bias, y, part, counter),
        m,
        n,
        k,
        units.shape[1],
        units.shape[0],
        own.blocks,
        own.token_tiles,
    )
    _memory, address = tensor_map(x, own.tokens)
    launch(kernel, own.ctas, own.groups * 128 + 128, own.shared, arguments, address)
