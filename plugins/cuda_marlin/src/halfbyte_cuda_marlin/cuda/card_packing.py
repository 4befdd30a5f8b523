"""packing.pack_codes on the card, by kernels/pack.cu."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from halfbyte.matrix import Matrix
from halfbyte_cuda_marlin.cuda.driver import function, launch, pointers
from halfbyte_cuda_marlin.cuda.packing import UNIT_COLUMNS, UNIT_ROWS, byte_table

_THREADS: Final = 256


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("src", "scales", "lut", "dst")),
        *((name, ctypes.c_int) for name in ("n", "kb", "group", "units", "tiles", "unit")),
    )


def pack_codes_on_card(matrix: Matrix, dtype: torch.dtype, units: Tensor, arch: str) -> None:
    """Fill in the codes of all units, on their device, which must be the current one; `arch` as in cards.Card."""
    device = units.device
    codes, scales, table = matrix.packed.contiguous(), matrix.scales.contiguous(), byte_table(dtype, device)
    tiles, columns, size = units.shape
    group = matrix.format.group_size
    arguments = _Args(
        *pointers(codes, scales, table, units),
        *(matrix.n, matrix.k // 2, group, columns, tiles, size),
    )
    threads = tiles * columns * UNIT_ROWS * UNIT_COLUMNS // 32
    kernel = function("pack", "fp4_pack", device.index or 0, arch, dynamic=False)
    launch(kernel, min(2048, -(-threads // _THREADS)), _THREADS, 0, arguments)
