"""Scales of groups: E4M3 (NVFP4) and E8M0 (MXFP4) as codes in uint8, and the rules that choose them.

E4M3 is torch.float8_e4m3fn: largest value 448, no infinity, NaN in codes 0x7F and 0xFF. E8M0 is 2**(code - 127),
NaN in code 255 (OCP MX v1.0, section 5.4.1). Everything here works on bits in integers, so it needs no float8 support
of the device and does not care whether the device flushes subnormal numbers to zero. Constants are written with
masked_fill, since torch.where copies a Python number to the device, which a CUDA graph forbids.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import UsageError, nearest
from halfbyte.formats import E2M1_MAX, E4M3_MAX, Format

E8M0_NAN: Final = 255
_SCALE_DTYPES: Final = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}
_INFINITY_BITS: Final = 0x7F800000
#: Added to the bits of amax before its exponent is read; E2M1's largest exponent (2) is then subtracted.
_ROUND_UP: Final = {"floor": 0, "ceil": (1 << 22) - 1, "even": 1 << 21}
#: How the MXFP4 scale follows from a group's largest magnitude; see `mxfp4_scale`.
SCALE_RULES: Final = tuple(_ROUND_UP)
_E4M3_TINY: Final = 2.0**-6
#: 0.125 in E4M3.
_E4M3_EIGHTH: Final = 0x20


def scale_codes(scales: Tensor, format: Format) -> Tensor:  # noqa: A002 - the word of this project
    """Return scales as uint8 codes (a view). They are uint8 already, or the format's own 8-bit float dtype.

    Raises UsageError for any other dtype.
    """
    if scales.dtype == torch.uint8:
        return scales
    own = _SCALE_DTYPES[format.scale]
    if scales.dtype != own:
        raise UsageError(f"{format} scales {list(scales.shape)} are {scales.dtype}; expected {own} or torch.uint8")
    return scales.view(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """Return 2**(code - 127) in float32 for uint8 codes: exact, subnormal 2**-127 for code 0, NaN for 255."""
    bits = (codes.to(torch.int32) << 23).masked_fill(codes == 0, 1 << 22)
    return bits.masked_fill(codes == E8M0_NAN, _INFINITY_BITS | 1 << 22).view(torch.float32)


def encode_e4m3(values: Tensor) -> Tensor:
    """Return the uint8 codes of the E4M3 numbers nearest to `values` (float32, not negative), ties to even.

    Beyond 448 the result is 448, infinity included; NaN stays NaN.
    """
    clamped = values.clamp(max=E4M3_MAX)
    bits = clamped.view(torch.int32)
    # 20 of the 23 mantissa bits go; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (clamped * 2.0**9).round()
    codes = torch.where(clamped < _E4M3_TINY, subnormal, normal.to(torch.float32))
    return codes.masked_fill(values.isnan(), 0x7F).to(torch.uint8)


def mxfp4_scale(amax: Tensor, rule: str = "even") -> Tensor:
    """Return the E8M0 codes (uint8) for groups whose largest magnitudes are `amax` (float32), same shape.

    Vendors differ in the rule:

    - "floor": 2**(floor(log2(amax)) - 2), the OCP MX v1.0 conversion (section 6.3). Values may saturate at 6.
    - "ceil": 2**ceil(log2(amax / 6)) of the exact quotient: the least scale at which nothing saturates. Intel's
      quantizer divides in float32 first, which is the same for every bfloat16 and float16 amax, and may give one
      exponent less for a float32 amax within a few units in the last place above 6 * 2**n. The least scale is not
      part of the rule: Intel's caller passes eps=1e-10, so its codes are `mxfp4_scale(amax, "ceil").clamp(min=94)`.
    - "even": the floor rule after amax was rounded to E2M1's one mantissa bit, so up to the next power of two where
      its mantissa is at least 1.75. This is compressed-tensors' rule.

    Scales below 2**-127 become that (code 0), also for an all-zero group. Infinite or NaN `amax` gives 255 (NaN);
    under "even", so does a finite one of at least 1.75 * 2**127, which rounds to infinity, as in compressed-tensors.
    """
    if rule not in _ROUND_UP:
        raise UsageError(f"unknown MXFP4 scale rule {rule!r}{nearest(rule, SCALE_RULES)}")
    if amax.dtype != torch.float32:
        raise UsageError(f"amax must be float32, got {amax.dtype} {list(amax.shape)}")
    bits = amax.abs().view(torch.int32).clamp(max=_INFINITY_BITS)
    exponent = (bits + _ROUND_UP[rule]) >> 23
    overflows = exponent == 255 if rule == "even" else bits == _INFINITY_BITS
    return (exponent - 2).clamp(min=0).masked_fill(overflows, E8M0_NAN).to(torch.uint8)


def nvfp4_scale(amax: Tensor, divisor: Tensor) -> Tensor:
    """Return the E4M3 codes (uint8) for groups whose largest magnitudes are `amax` (float32), same shape.

    The scale is divisor * (amax / 6) in float32 in this order, as in compressed-tensors; `divisor` (float32) is the
    reciprocal of the global scale and broadcasts. A scale that rounds to zero becomes 0.125 (again as there): all
    its values round to zero, and nothing is divided by zero. NaN stays NaN.
    """
    # By a tensor of sixes: torch on CUDA turns a division by a Python number into a product with its reciprocal.
    codes = encode_e4m3(divisor * (amax / torch.full_like(amax, E2M1_MAX)))
    return codes.masked_fill(codes == 0, _E4M3_EIGHTH)
