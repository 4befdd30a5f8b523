"""Many rows of x on cards without Hopper's matrix units: weights back to 16 bits, some rows at a time, then cuBLAS."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.cards import Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function, launch, pointers
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import UNIT_COLUMNS, UNIT_ROWS, is_mxfp4

#: Weights that are in 16 bits at a time: large enough for cuBLAS, small enough for the cache of most cards.
_WEIGHTS: Final = 1 << 24
_THREADS: Final = 256
_MOST_BLOCKS: Final = 4096


class _Args(ctypes.Structure):
    """What both kernels of dense.cu take: w is the units or the sums, y the weights or the result."""

    _fields_ = (*POINTERS, *((name, ctypes.c_int) for name in ("m", "n", "units", "tiles", "first", "columns")))


def macros(*, mxfp4: bool, bf16: bool) -> Macros:
    """What dense.cu is compiled for."""
    return (("FMT", int(mxfp4)), ("BF16", int(bf16)))


class Dense:
    """Y [M, N] = x [M, K] @ W.T * rows + bias. Sums stay in float32 until they have been multiplied."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        weights: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        card: Card,
    ) -> None:
        self._shape, self._units = shape, weights[1]
        options = macros(mxfp4=is_mxfp4(weights[2]), bf16=dtype == torch.bfloat16)
        self._unpack, self._finish = (
            function("dense", name, device.index or 0, card.arch, options, dynamic=False)
            for name in ("fp4_unpack", "fp4_finish")
        )
        self._tiles = min(weights[0], max(1, _WEIGHTS // (UNIT_ROWS * UNIT_COLUMNS * weights[1])))

    def __call__(self, x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Run on torch's current stream of the device, which must be the current one."""
        m, n, k = self._shape
        dense = x.new_empty(self._tiles * UNIT_ROWS, self._units * UNIT_COLUMNS)
        for first in range(0, units.shape[0], self._tiles):
            tiles = min(self._tiles, units.shape[0] - first)
            numbers = (m, n, self._units, tiles, first, tiles * UNIT_ROWS)
            unpacked = _Args(*pointers(None, units, None, None, dense, None, None), *numbers)
            self._run(self._unpack, tiles * self._units * 32, unpacked)
            part = dense[: tiles * UNIT_ROWS, :k]
            sums = torch.mm(x, part.t(), out_dtype=torch.float32)
            finished = _Args(*pointers(None, sums, rows, bias, y, None, None), *numbers)
            self._run(self._finish, sums.numel() // 4, finished)

    def _run(self, kernel: ctypes.c_void_p, threads: int, arguments: _Args) -> None:
        launch(kernel, min(_MOST_BLOCKS, -(-threads // _THREADS)), _THREADS, 0, arguments)
