"""What the compiled kernels compute, from the bytes that they are given. Nothing of halfbyte is used here.

Sources: csrc/nv_internal/tensorrt_llm/kernels/quantization_utils.cuh (the quantizers, with exact quotients for their
approximate reciprocals), csrc/fp4_gemm_cutlass.cu (the scales' size), the comment of gemm_bf16_fp4._unswizzle_sf_128x4
(the offset).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def pad(size: int, to: int) -> int:
    return (size + to - 1) // to * to


def offsets(rows: int, columns: int, tile: int) -> Tensor:
    """The byte of each scale [rows, columns] in a swizzled buffer."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    blocks = pad(columns, 4) // 4
    if tile == 8:
        return row // 8 * blocks * 32 + column // 4 * 32 + row % 8 * 4 + column % 4
    return (row // 128 * blocks + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def read_scales(buffer: Tensor, rows: int, columns: int, group: int, tile: int = 128) -> Tensor:
    """The scales [rows, columns] in float32; the whole buffer must be there, and what is padding must be zero."""
    flat, where = buffer.reshape(-1), offsets(rows, columns, tile)
    if flat.numel() != pad(rows, tile) * pad(columns, 4):
        raise RuntimeError(f"{flat.numel()} bytes of scales for [{rows}, {columns}] in tiles of {tile} rows")
    padding = torch.ones(flat.numel(), dtype=torch.bool)
    padding[where.reshape(-1)] = False
    if flat[padding].any():
        raise RuntimeError("the scales' padding is not zero: a kernel multiplies it in")
    return decode_scales(flat[where], group)


def decode_scales(codes: Tensor, group: int) -> Tensor:
    if group == 32:
        return torch.exp2(codes.float() - 127)
    return codes.view(torch.float8_e4m3fn).float()


def values(codes: Tensor) -> Tensor:
    """uint8 [R, K/2] to float32 [R, K]; the low nibble is the even column."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    return torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), dim=-1).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return values(codes) * scales.repeat_interleave(group, dim=-1)


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group: int, tile: int = 128) -> Tensor:
    """a @ b.T [M, N] in float32, of codes and swizzled scales."""
    (m, k), n = (a.shape[0], a.shape[1] * 2), b.shape[0]
    left = dequantize(a, read_scales(a_scales, m, k // group, group, tile), group)
    right = dequantize(b, read_scales(b_scales, n, k // group, group), group)
    return left @ right.T


def quantize(x: Tensor, encode: Tensor | None, codes: Tensor, scales: Tensor, tile: int) -> None:
    """Fill in codes [M, K/2] and the flat swizzled scales; NVFP4 with `encode`, else MXFP4."""
    group = 32 if encode is None else 16
    groups = x.float().reshape(x.shape[0], -1, group)
    sixth = groups.abs().amax(-1) * torch.tensor(1 / 6, dtype=torch.float32)
    if encode is None:
        bits = sixth.view(torch.int32)
        code = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(0, 254).to(torch.uint8)
        factor = torch.where(sixth != 0, torch.exp2(127 - code.float()), 0.0)
    else:
        rounded = (encode * sixth).clamp(max=448.0).to(torch.float8_e4m3fn)
        code = rounded.view(torch.uint8)
        factor = torch.where(sixth != 0, 1 / (rounded.float() * (1 / encode)), 0.0)
    scales.zero_()
    scales[offsets(code.shape[0], code.shape[1], tile)] = code
    nibbles = encode_e2m1((groups * factor.unsqueeze(-1)).flatten(1))
    codes.copy_(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)


def encode_e2m1(numbers: Tensor) -> Tensor:
    """The nearest E2M1 code, ties to even, beyond 6 it is 6; NaN (zero times infinity, where the scale is zero) too."""
    size, middles = numbers.abs().nan_to_num(nan=6.0, posinf=6.0), torch.tensor(_MIDDLES)
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    code = torch.where((below != above) & (below % 2 == 1), above, below)
    return (code + 8 * (numbers < 0)).to(torch.uint8)
