"""Malformed or unwanted calls, to be refused before the vendor's code sees them: it would take most to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte_xpu.vllm_kernels import ops


def _bytes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def _quantize(*shape: int, dtype: torch.dtype = torch.bfloat16, group_size: int = 32) -> Callable[[], Any]:
    return lambda: ops.quantize_mxfp4(torch.zeros(shape, dtype=dtype), group_size)


def _gemm(**changes: Any) -> Callable[[], Any]:
    """A product of x [4, 64] and W [16, 64] but for the changes."""
    arguments = {
        "x": _bytes(4, 32),
        "x_scales": _bytes(4, 2),
        "weight": _bytes(16, 32),
        "scales": _bytes(2, 16),
        "bias": None,
        "dtype": torch.bfloat16,
    }
    return lambda: ops.fp4_gemm(**{**arguments, **changes})


#: What is wrong to the call.
CALLS: Final[dict[str, Callable[[], Any]]] = {
    "quantize: K of 48": _quantize(2, 48),
    "quantize: K of 16 in an even number of rows": _quantize(4, 16),
    "quantize: no dimension": _quantize(),
    "quantize: K of 0": _quantize(4, 0),
    "quantize: integers": _quantize(4, 64, dtype=torch.int32),
    "quantize: float64": _quantize(4, 64, dtype=torch.float64),
    "quantize: groups of 16": _quantize(4, 64, group_size=16),
    "gemm: another K": _gemm(x=_bytes(4, 16), x_scales=_bytes(4, 1)),
    "gemm: K off the group": _gemm(x=_bytes(4, 24), weight=_bytes(16, 24)),
    "gemm: one scale for all of x": _gemm(x_scales=_bytes(1, 1)),
    "gemm: one scale for all weights": _gemm(scales=_bytes(1, 1)),
    "gemm: scales not transposed": _gemm(scales=_bytes(16, 2)),
    "gemm: scales transposed as a view": _gemm(scales=_bytes(16, 2).t()),
    "gemm: weights packed along N": _gemm(weight=_bytes(32, 16).t()),
    "gemm: scales in float32": _gemm(x_scales=torch.ones(4, 2)),
    "gemm: x in another dtype": _gemm(x=torch.zeros(4, 32, dtype=torch.bfloat16)),
    "gemm: x not contiguous": _gemm(x=_bytes(32, 4).t()),
    "gemm: fewer scales than rows": _gemm(x_scales=_bytes(3, 2)),
    "gemm: bias of M": _gemm(bias=torch.zeros(4, dtype=torch.bfloat16)),
    "gemm: bias of one": _gemm(bias=torch.zeros(1, dtype=torch.bfloat16)),
    "gemm: bias with gaps": _gemm(bias=torch.zeros(32, dtype=torch.bfloat16)[::2]),
    "gemm: bias in another dtype": _gemm(bias=torch.zeros(16, dtype=torch.float16)),
    "gemm: float32 result": _gemm(dtype=torch.float32),
    "gemm: no columns": _gemm(weight=_bytes(0, 32), scales=_bytes(2, 0)),
    "gemm: weights on another device": _gemm(weight=_bytes(16, 32).to("meta")),
}
