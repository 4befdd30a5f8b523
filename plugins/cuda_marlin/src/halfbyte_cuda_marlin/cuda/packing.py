"""Weights in the order in which the kernels' threads consume them.

A unit is 32 rows x 128 columns: 2048 bytes of codes, then 256 (NVFP4) or 128 (MXFP4) bytes of scales. A thread reads 16
bytes for each 16 rows x 64 columns: two couples of 32-bit words, each couple its A fragments of two steps of
mma.m16n8k16. Inside a couple the bits lie where `decode` of kernels/fp4.cuh finds them with masks and shifts alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte.formats import Format
from halfbyte.matrix import Matrix
from halfbyte.problems import round_up

UNIT_ROWS, UNIT_COLUMNS, CODE_BYTES = 32, 128, 2048
#: The power of two that results are multiplied by: codes have no exponent bias, and E5M3 scales another one.
_NVFP4_EXPONENT = {torch.bfloat16: 39, torch.float16: 7}


def empty_units(matrix: Matrix) -> Tensor:
    """Room for the units of a matrix [N, K]: uint8 [N/32, K/128, bytes], sizes rounded up."""
    n, k = round_up(matrix.n, UNIT_ROWS), round_up(matrix.k, UNIT_COLUMNS)
    scales = UNIT_ROWS * UNIT_COLUMNS // matrix.format.group_size
    shape = (n // UNIT_ROWS, k // UNIT_COLUMNS, CODE_BYTES + scales)
    return torch.empty(shape, dtype=torch.uint8, device=matrix.packed.device)


def is_mxfp4(unit_bytes: int) -> bool:
    """Whether units of this size are MXFP4's, whose groups of 32 have one scale."""
    return unit_bytes == CODE_BYTES + UNIT_ROWS * UNIT_COLUMNS // 32


def pack_codes(matrix: Matrix, dtype: torch.dtype, units: Tensor) -> None:
    """Fill in the codes of all units by torch operations: what kernels/pack.cu does, slower and anywhere."""
    n, k = units.shape[0] * UNIT_ROWS, units.shape[1] * UNIT_COLUMNS
    codes, scales = _padded(matrix.packed, n, k // 2), _padded_scales(matrix, n, k)
    if matrix.format.scale == "e4m3":  # E5M3 in bf16 has no zero
        kept = ((scales & 0x7F) != 0).unsqueeze(-1)
        codes = torch.where(kept, codes.view(n, -1, matrix.format.group_size // 2), 0).view(n, k // 2)
    # rows: tile, 16-row part, half, g; columns: unit, half of the unit, couple, step, half of the step, t
    grid = codes.view(units.shape[0], 2, 2, 8, units.shape[1], 2, 2, 2, 2, 4)
    table = byte_table(dtype, units.device)
    couples = torch.zeros((), dtype=torch.int64, device=units.device)
    for place in range(8):
        half, byte = divmod(place, 4)
        piece = grid[:, :, half, :, :, :, :, byte // 2, byte % 2, :].permute(0, 3, 1, 4, 2, 6, 5)
        couples = couples | table[place][piece.reshape(-1).to(torch.int64)]
    units[:, :, :CODE_BYTES] = couples.view(torch.uint8).view(*units.shape[:2], CODE_BYTES)


def pack_scales(matrix: Matrix, dtype: torch.dtype, units: Tensor) -> Tensor:
    """Fill in the scales of all units; return what each row's result must be multiplied by, float32 [N]."""
    n, k = units.shape[0] * UNIT_ROWS, units.shape[1] * UNIT_COLUMNS
    scales, globals_ = _padded_scales(matrix, n, k), matrix.row_global_scales()
    if globals_ is None:
        codes, rows = _relative_to_rows(scales, dtype)
    else:
        codes, rows = _e5m3(scales), scales.new_zeros(n, dtype=torch.float32)
        rows[: matrix.n] = globals_ * 2.0 ** _NVFP4_EXPONENT[dtype]
    units[:, :, CODE_BYTES:] = _in_reading_order(codes, matrix.format)
    return rows


@functools.cache
def byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """int64 [8, 256]: the bits of a couple that each value of its byte i (two codes) sets.

    Bytes 0 to 3 are of row g (step 0 first half, second half, step 1 first half, second half), 4 to 7 of row g + 8.
    """
    bits = (15, 8, 7, 6) if dtype == torch.bfloat16 else (15, 11, 10, 9)
    table = [[0] * 256 for _ in range(8)]
    for place in range(8):
        half, byte = divmod(place, 4)
        step, second = divmod(byte, 2)
        register = step * 4 + second * 2 + half
        for value in range(256):
            couple = 0
            for element in range(2):
                code = value >> (4 * element) & 15
                for bit, target in zip((3, 2, 1, 0), bits, strict=True):
                    if code >> bit & 1:
                        word, source = _source_bit(dtype, register, target + 16 * element)
                        couple |= 1 << (32 * word + source)
            table[place][value] = couple - (1 << 64) if couple >> 63 else couple
    return torch.tensor(table, dtype=torch.int64, device=device)


def _source_bit(dtype: torch.dtype, register: int, target: int) -> tuple[int, int]:
    """(word, bit) of a couple from which `decode` takes bit `target` of a fragment register, 0 to 7."""
    word, own = divmod(register, 4)
    if dtype == torch.bfloat16:
        if own < 3:
            return word, (target - (0, 4, 10)[own]) % 32
        merged = (target - (6, 12)[word]) % 32
        return (0, merged) if merged % 16 in (0, 1, 9, 10) else (1, (merged - 2) % 32)
    sign = target % 16 == 15
    return word, (target - (own - 1 if sign and own > 1 else 3 * own)) % 32


def _e5m3(scales: Tensor) -> Tensor:
    """E4M3 bytes as E5M3: times 128 each is a normal fp16 number with three mantissa bits."""
    return ((scales.view(torch.float8_e4m3fn).to(torch.float16) * 128).view(torch.int16) >> 7).to(torch.uint8)


def _relative_to_rows(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """E8M0 bytes as (codes relative to the row's largest, what the row's result must be multiplied by).

    What is 2**-126 (fp16: 2**-38) of the largest vanishes beside it.
    """
    largest = scales.amax(dim=1, keepdim=True).to(torch.int16)
    relative = scales.to(torch.int16) - largest
    if dtype == torch.bfloat16:
        codes = (relative + 254).clamp_(min=0)
    else:
        exponent = relative + 30
        subnormal = torch.where(exponent > -3, 8 >> (1 - exponent).clamp(0, 7), 0)
        codes = torch.where(exponent > 0, exponent << 3, subnormal)
    rows = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), largest.to(torch.int32) - 128)
    return codes.to(torch.uint8), rows[:, 0].to(torch.float32)


def _in_reading_order(codes: Tensor, fmt: Format) -> Tensor:
    """uint8 [N, groups] to [tiles, units, bytes]: a thread reads the scales of its rows of a unit with one load."""
    tiles, groups = codes.shape[0] // UNIT_ROWS, codes.shape[1]
    if fmt.scale == "e4m3":  # bytes of word c: (g, step 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
        order = codes.view(tiles, 2, 2, 8, groups // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    else:  # g, 16-row part, pair of groups, half, group
        order = codes.view(tiles, 2, 2, 8, groups // 4, 2, 2).permute(0, 4, 3, 1, 5, 2, 6)
    return order.reshape(tiles, order.shape[1], -1)


def _padded_scales(matrix: Matrix, n: int, k: int) -> Tensor:
    return _padded(matrix.scales.view(torch.uint8), n, k // matrix.format.group_size)


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(tensor.shape) == (rows, columns):
        return tensor.contiguous()
    padded = tensor.new_zeros(rows, columns)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded
