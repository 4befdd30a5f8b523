"""The layouts of FlashInfer's scales and rows, in plain torch on any device.

With C columns of scales, padded to Cp = round_up(C, 4), the scale of row r and column c lies at byte

- 128x4: ((r // 128) * (Cp / 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
- 8x4:   (r // 8) * (Cp * 8) + (c // 4) * 32 + (r % 8) * 4 + c % 4

of round_up(r, tile) x Cp bytes; what is padding is zero, since a kernel multiplies it in. From cuBLAS's and CUTLASS's
block-scaled layouts; FlashInfer calls them `SfLayout.layout_128x4` and `layout_8x4`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.matrix import Matrix
from halfbyte.problems import round_up

_BLOCK_ROWS: Final = 32


def padded_scale_shape(rows: int, columns: int, tile: int = 128) -> tuple[int, int]:
    """(rows, columns) of the swizzled scales of [rows, columns]: whole tiles of `tile` rows x 4 columns."""
    return round_up(rows, tile), round_up(columns, 4)


def scale_bytes(matrix: Matrix) -> Tensor:
    """The matrix's linear scales [..., N, K/group] as uint8: a view."""
    return matrix.scales.view(torch.uint8)


def float32_on(device: torch.device, values: Tensor) -> Tensor:
    """Factors made in float64, rounded once: a new float32 tensor on the device."""
    return values.to(torch.float32).to(device, copy=True)


def swizzle_128x4(scales: Tensor) -> Tensor:
    """Linear uint8 scales [..., R, C] to [..., round_up(R, 128), round_up(C, 4)] in tiles of 128 rows x 4 columns."""
    padded = _padded(scales)
    *lead, rows, columns = padded.shape
    tiles = padded.reshape(*lead, rows // 128, 4, 32, columns // 4, 4)
    return tiles.transpose(-4, -2).reshape(*lead, rows, columns)


def shuffled_rows(matrix: Tensor) -> Tensor:
    """[..., R, C] with the rows of each block of 32 in trtllm's order: 0, 4, .., 28, 1, 5, .., 29, 2, .., 3, .., 31.

    For weights and for their linear scales, which are swizzled afterwards, never before. UsageError unless R is a
    multiple of 32.
    """
    *lead, rows, columns = matrix.shape
    if rows % _BLOCK_ROWS:
        raise UsageError(f"{list(matrix.shape)} has {rows} rows; trtllm shuffles blocks of {_BLOCK_ROWS}")
    blocks = matrix.reshape(*lead, rows // _BLOCK_ROWS, 8, 4, columns)
    return blocks.transpose(-3, -2).reshape(*lead, rows, columns)


def _padded(scales: Tensor) -> Tensor:
    if scales.dtype != torch.uint8:
        raise UsageError(f"scales are {scales.dtype} {list(scales.shape)}; give their bytes as torch.uint8")
    *lead, rows, columns = scales.shape
    shape = padded_scale_shape(rows, columns)
    if shape == (rows, columns):
        return scales
    padded = scales.new_zeros(*lead, *shape)
    padded[..., :rows, :columns] = scales
    return padded
