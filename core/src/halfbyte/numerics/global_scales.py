"""Global scales of NVFP4: the float64 multiplier, and what a device needs of it in float32."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats import E2M1_MAX, E4M3_MAX


class GlobalScale(NamedTuple):
    """Global scales made ready for a device: no float64, no transfer and no synchronisation when they are used.

    Make it once with `of`, keep the two tensors, and pass it wherever a global scale is taken.
    """

    #: float32 [*S]: the reciprocals, by which a quantizer multiplies.
    divisor: Tensor
    #: float32 [*S, 256]: every E4M3 code times the global scale; see `scale_table`.
    table: Tensor

    @classmethod
    def of(cls, multiplier: Tensor | float, device: torch.device | str | None = None) -> GlobalScale:
        """Prepare multipliers [*S] for `device` (default: where they are).

        Raises UsageError for a number that is not positive and finite; numbers in a tensor are not looked at.
        """
        multiplier = _as_float64(multiplier)
        device = multiplier.device if device is None else device
        divisor = multiplier.cpu().reciprocal().to(torch.float32)
        return cls(divisor.to(device), scale_table(multiplier).to(device))

    def rows(self, part: Tensor) -> GlobalScale:
        """One value for each row: the global scales [P] at the index `part` (integer [N]) of each row."""
        return GlobalScale(self.divisor[part], self.table[part])

    def times(self, codes: Tensor) -> Tensor:
        """Return E4M3 `codes` (uint8 [*L, G]) times the global scale [*S], float32 [*L, G]; S broadcasts to L."""
        lead = codes.shape[:-1]
        return self.table.expand(*lead, 256).gather(-1, codes.to(torch.int64))


GlobalScaleLike: TypeAlias = GlobalScale | Tensor | float


def scale_table(global_scale: Tensor | float) -> Tensor:
    """Return all 256 E4M3 codes times the global scale: float32 [*S, 256] for multipliers [*S], on their device.

    The product is made in float64 on the CPU and rounded once to float32. So a multiplier that is the float64
    reciprocal of a float32 divisor d (compressed-tensors) gives float32(e4m3 / d) bit for bit where that is a normal
    number: a quotient of 4-bit by 24-bit significands that is not itself at a float32 rounding boundary is at least
    2**-49 (relative) away from one, it cannot be half-way between two float32 numbers, and the two float64 roundings
    move it by less than 2**-51. With a float32 multiplier (ModelOpt) the float64 product is exact.
    """
    multiplier = _as_float64(global_scale)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    products = codes.to(torch.float32).to(torch.float64) * multiplier.cpu().unsqueeze(-1)
    return products.to(torch.float32).to(multiplier.device)


def global_scale_for(tensor: Tensor) -> Tensor:
    """Return a multiplier for `tensor` (floating point): float64 scalar on its device, about amax / (448 * 6).

    It is the reciprocal of compressed-tensors' float32 divisor 2688 / amax, so that either convention stores it
    without loss for that reader. 1 where the tensor is empty or zero, or the divisor is no positive finite number.
    """
    amax = tensor.detach().abs().amax() if tensor.numel() else tensor.new_zeros(())
    divisor = (E4M3_MAX * E2M1_MAX) / amax.cpu().to(torch.float32)
    usable = divisor.isfinite() & (divisor > 0)
    return divisor.masked_fill(~usable, 1.0).to(torch.float64).reciprocal().to(tensor.device)


def prepared(global_scale: GlobalScaleLike, device: torch.device) -> GlobalScale:
    """Return `global_scale` as a GlobalScale on `device`."""
    if isinstance(global_scale, GlobalScale):
        return global_scale
    return GlobalScale.of(global_scale, device)


def _as_float64(multiplier: Tensor | float) -> Tensor:
    if isinstance(multiplier, Tensor):
        if not multiplier.dtype.is_floating_point:
            raise UsageError(f"a global scale is {multiplier.dtype} {list(multiplier.shape)}; expected float64")
        return multiplier.to(torch.float64)
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise UsageError(f"the global scale is {multiplier}; it must be positive and finite")
    return torch.tensor(multiplier, dtype=torch.float64)
