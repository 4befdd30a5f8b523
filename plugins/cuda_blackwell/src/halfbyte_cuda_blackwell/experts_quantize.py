"""The activations of experts kernels that take x quantized already."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_blackwell import ops

_CAPABILITIES: Final = (100, 103)


def one_scale(scales: Tensor) -> Tensor:
    """The largest of the experts' input scales, for each of them: no input of any expert saturates by it."""
    return scales.max().expand_as(scales)


def quantized(x: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return NVFP4 codes uint8 [T, H/2] and linear scales uint8 [T, H/16] of x [T, H] times `divisor`, float32 [1].

    UsageError below SM100, where FlashInfer's quantizer returns uninitialised memory without an error.
    """
    from flashinfer import fp4_quantize

    ops.require_capability(x.device, _CAPABILITIES, "FlashInfer's quantizer for experts")
    rows = x.view(-1).view(x.shape)  # one row may have any stride, and (1, 1) is taken for column-major
    with ops.current(x.device):
        codes, scales = fp4_quantize(rows, divisor, is_sf_swizzled_layout=False, nvfp4_4over6=None)
    return codes, scales.view(torch.uint8).reshape(x.shape[0], -1)
