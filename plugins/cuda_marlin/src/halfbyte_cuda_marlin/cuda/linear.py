"""marlin.cuda: weight-only linear layers by our own kernels. One packed layout serves every number of rows."""

from __future__ import annotations

import ctypes
import functools
from typing import Final

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_marlin.cuda import small, wide
from halfbyte_cuda_marlin.cuda.driver import function, launch, pointers
from halfbyte_cuda_marlin.cuda.packing import UNIT_COLUMNS, UNIT_ROWS, byte_table, empty_units, pack_scales

#: Numbers of rows that between them need every kernel that a layer can need.
_EVERY_KERNEL: Final = (1, 2, 8, 9, 16, 17, 32, 64, 128, 129, 4096)
_PACK_THREADS: Final = 256
#: The kernels load 16 bytes at a time.
_ALIGNMENT: Final = 16


class MarlinCuda:
    """Keeps codes and scales in units of 32 x 128; see packing.py. Needs Hopper."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Rearrange the weights on their device, and compile the kernels that the layer can need.

        `units`: uint8 [N/32, K/128, bytes]; `rows`: float32 [N], what each row's result is multiplied by.
        PluginError with NVRTC's log if a kernel does not compile.
        """
        matrix, dtype = weights.matrix, getattr(torch, problem.dtype)
        with torch.cuda.device(matrix.packed.device):
            units = empty_units(matrix)
            _pack_codes(matrix, dtype, units)
            rows = pack_scales(matrix, dtype, units)
            for m in _EVERY_KERNEL:
                _launcher(m, units.shape[0], units.shape[1], units.shape[2], dtype, units.device)
        return {"units": units, "rows": rows}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n]; sums in float32, in an order that depends on the sizes alone."""
        units = packed["units"]
        y = x.new_empty(x.shape[0], packed.problem.matrices[0][0])
        aligned = x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
        if x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                _run(aligned, units, packed["rows"], bias, y)
        else:
            _run(aligned, units, packed["rows"], bias, y)
        return y


def _run(x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor) -> None:
    kernel, own = _launcher(x.shape[0], *units.shape, x.dtype, x.device)
    if isinstance(own, small.Plan):
        small.run(kernel, own, x, units, rows, bias, y)
    else:
        wide.run(kernel, own, x, units, rows, bias, y)


@functools.lru_cache(maxsize=16_384)
def _launcher(
    m: int, tiles: int, units: int, unit_bytes: int, dtype: torch.dtype, device: torch.device
) -> tuple[ctypes.c_void_p, small.Plan | wide.Plan]:
    """The compiled kernel and the plan for m rows; which of the two kernels is faster was measured on one H200."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    mxfp4, bf16 = unit_bytes == 2048 + 128, dtype == torch.bfloat16
    if m <= (16 if tiles * units > 4096 else 8):
        few = small.plan(m, tiles, units, unit_bytes, processors)
        return small.load(m, few, device, mxfp4=mxfp4, bf16=bf16), few
    many = wide.plan(m, tiles, units, unit_bytes, processors)
    return wide.load(many, device, mxfp4=mxfp4, bf16=bf16), many


class _PackArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("src", "scales", "lut", "dst")),
        *((name, ctypes.c_int) for name in ("n", "kb", "group", "units", "tiles", "unit")),
    )


def _pack_codes(matrix: Matrix, dtype: torch.dtype, units: Tensor) -> None:
    """packing.pack_codes by kernels/pack.cu."""
    device = units.device
    codes, scales, table = matrix.packed.contiguous(), matrix.scales.contiguous(), byte_table(dtype, device)
    tiles, columns, size = units.shape
    group = matrix.format.group_size
    arguments = _PackArgs(
        *pointers(codes, scales, table, units),
        *(matrix.n, matrix.k // 2, group, columns, tiles, size),
    )
    threads = tiles * columns * UNIT_ROWS * UNIT_COLUMNS // 32
    kernel = function("pack", "fp4_pack", device.index or 0, "sm_90a", dynamic=False)
    launch(kernel, min(2048, -(-threads // _PACK_THREADS)), _PACK_THREADS, 0, arguments)
