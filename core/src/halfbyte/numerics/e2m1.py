"""E2M1, the 4-bit numbers themselves: one sign bit, then 0, 0.5, 1, 1.5, 2, 3, 4, 6.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3. Codes are uint8 values 0 to 15; two of them make a byte,
the even column in the low nibble.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import UsageError, nearest
from halfbyte.formats import E2M1_VALUES

#: What a value half-way between two E2M1 numbers becomes: the one with the even code, or the smaller magnitude.
TIES: Final = ("even", "toward-zero")


def encode(values: Tensor, ties: str = "even") -> Tensor:
    """Return the codes (uint8, same shape) of the E2M1 numbers nearest to `values` (float32).

    Beyond 6 the result is 6, infinity included. E2M1 has no NaN: NaN becomes +6, as in NVIDIA's saturating conversion
    (the callers in this package make the group's scale NaN, so it is not lost). The sign bit is set where the value is
    less than zero: -0.1 becomes negative zero and -0.0 positive zero, as compressed-tensors and Intel's quantizer
    have it. Raises UsageError for another dtype or an unknown tie rule.
    """
    if values.dtype != torch.float32:
        raise UsageError(f"E2M1 encodes float32, got {values.dtype} {list(values.shape)}; convert it with .float()")
    if ties not in TIES:
        raise UsageError(f"unknown tie rule {ties!r}{nearest(ties, TIES)}")
    magnitude = values.abs()
    codes = (values < 0).to(torch.uint8) << 3
    for code in range(1, 8):
        midpoint = (E2M1_VALUES[code - 1] + E2M1_VALUES[code]) / 2
        rounds_up_at_tie = ties == "even" and code % 2 == 0
        below = magnitude < midpoint if rounds_up_at_tie else magnitude <= midpoint
        # Counted by what it is not below, so that NaN lands above every midpoint.
        codes = codes + (~below).to(torch.uint8)
    return codes


def decode(codes: Tensor) -> Tensor:
    """Return the float32 values (same shape) of E2M1 codes (uint8, 0 to 15). Code 8 is -0.0."""
    _check_bytes(codes, "codes")
    # E2M1 is convex in its code, so it is the largest of its three line segments; no table has to be on the device.
    index = (codes & 7).to(torch.float32)
    magnitude = torch.maximum(torch.maximum(index / 2, index - 2), 2 * index - 8)
    # A product, since Triton negates by 0 - x, which loses the sign of negative zero in compiled code.
    return magnitude * (1 - 2 * (codes >> 3).to(torch.float32))


def pack(codes: Tensor) -> Tensor:
    """Pack codes [..., K] (uint8, 0 to 15) to bytes [..., K/2]: low nibble = even column. UsageError for odd K."""
    _check_bytes(codes, "codes")
    if codes.shape[-1] % 2:
        raise UsageError(f"codes {list(codes.shape)} have an odd last dimension; two of them make one byte")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes [..., K/2] to codes [..., K], the inverse of `pack`."""
    _check_bytes(packed, "packed values")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: Tensor) -> Tensor:
    """Return the float32 values [..., K] of bytes [..., K/2]: `decode(unpack(packed))`, one look-up a byte."""
    _check_bytes(packed, "packed values")
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8).unsqueeze(-1)
    return F.embedding(packed.to(torch.int32), decode(unpack(every_byte))).flatten(-2)


def _check_bytes(tensor: Tensor, what: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim == 0:
        raise UsageError(f"{what} must be uint8 with at least one dimension, got {tensor.dtype} {list(tensor.shape)}")
