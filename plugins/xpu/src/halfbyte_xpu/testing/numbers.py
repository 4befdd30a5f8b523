"""What the doubles compute with: FP4 decoded by table, and the vendor's activation quantizer. Nothing of halfbyte's."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: A magnitude's code is the number of these strictly below it: a tie goes toward zero.
_THRESHOLDS: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode(packed: Tensor) -> Tensor:
    """The values [..., K] in float32 of packed ones [..., K/2], the low nibble first."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    raw = packed.view(torch.uint8)
    return table[torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2).long()]


def scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Values [..., K] times scales [..., groups]."""
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)


def e8m0(codes: Tensor) -> Tensor:
    """2**(code - 127) in float32."""
    return torch.exp2(codes.view(torch.uint8).double() - 127).float()


def exponents(amax: Tensor, epsilon: float) -> Tensor:
    """ceil(log2(max(amax / 6, epsilon))), exact."""
    mantissa, exponent = torch.frexp(torch.clamp(amax / 6.0, min=epsilon))
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def codes(ratio: Tensor) -> Tensor:
    """E2M1 codes (uint8) of numbers in units of their scale; the sign bit is set for what is below zero."""
    thresholds = torch.tensor(_THRESHOLDS)
    magnitude = (ratio.abs().clamp(max=6.0).unsqueeze(-1) > thresholds).sum(-1)
    return (magnitude + 8 * (ratio < 0)).to(torch.uint8)


def pack(values: Tensor) -> Tensor:
    """Codes [..., K] as bytes [..., K/2], the even one in the low nibble."""
    return values[..., 0::2] | values[..., 1::2] << 4
