"""Calls that the vendor's host code refuses, in the order of its checks, with the beginning of what it says.

The double has to say the same; tools/xpu_vendor_checks.py compares them with the vendor's own code.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from halfbyte_xpu.vllm_kernels.schemas import FP4_GEMM, QUANTIZE, Op

_BF16, _U8, _F4, _E8 = torch.bfloat16, torch.uint8, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu


def _of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=_U8).view(dtype) if dtype in (_F4, _E8) else torch.zeros(shape, dtype=dtype)


def _quantize(**changes: Any) -> tuple[Op, tuple[Any, ...]]:
    arguments = {"x": _of(_BF16, 8, 64), "q": _of(_U8, 8, 32), "s": torch.zeros(8, 2), "group": 32, "eps": 1e-10}
    return QUANTIZE, tuple({**arguments, **changes}.values())


def _gemm(**changes: Any) -> tuple[Op, tuple[Any, ...]]:
    arguments = {
        "a": _of(_F4, 4, 32),
        "b": _of(_F4, 16, 32).t(),
        "a_scale": _of(_E8, 4, 2),
        "b_scale": _of(_E8, 2, 16),
        "dtype": _BF16,
        "bias": None,
    }
    return FP4_GEMM, tuple({**arguments, **changes}.values())


#: (how the vendor's message begins, the operator and its arguments)
CALLS: Final[tuple[tuple[str, tuple[Op, tuple[Any, ...]]], ...]] = (
    ("input must be contiguous", _quantize(x=_of(_BF16, 64, 8).t(), group=16)),
    ("output_q must be contiguous", _quantize(q=_of(_U8, 32, 8).t(), group=16)),
    ("MXFP4 requires group_size == 32, got 16", _quantize(x=_of(_BF16, 3, 20), group=16)),
    ("input numel must be divisible by group_size", _quantize(x=_of(_BF16, 3, 20), s=torch.zeros(16))),
    ("output_s must be 2-D", _quantize(s=torch.zeros(2, 4, 2), q=_of(torch.int8, 8, 32))),
    ("output_q must be uint8", _quantize(q=_of(_F4, 8, 32))),
    ("output_q must be empty when input is empty", _quantize(x=_of(_BF16, 0, 64), q=_of(_U8, 1, 32))),
    ("A_scale must be contiguous for fp4 matmul", _gemm(a_scale=_of(_E8, 2, 4).t(), b_scale=_of(_E8, 16, 2).t())),
    ("B_scale must be contiguous for fp4 matmul", _gemm(b_scale=_of(_E8, 16, 2).t(), a=_of(_F4, 32))),
    ("OneDNN Matmul only support 2D and 3D inputs!", _gemm(a=_of(_F4, 32))),
    ("OneDNN Matmul only support 2D and 3D weights!", _gemm(b=_of(_F4, 1, 1, 32, 16))),
    ("OneDNN Matmul expects 3D input when using batched weights!", _gemm(b=_of(_F4, 1, 16, 32).transpose(1, 2))),
    ("input and weight must be f4_e2m1x2 or f4_e2m1x2 for fp4 matmul", _gemm(a=_of(_U8, 4, 32), dtype=torch.float32)),
    ("output must be float16 or bfloat16 for fp4 matmul", _gemm(dtype=torch.float32, bias=_of(_BF16, 7))),
    ("Unsupported scale type for fp4 matmul", _gemm(a_scale=torch.ones(4, 2), b_scale=torch.ones(2, 16))),
    ("Mismatched scale data types in mxfp4 matmul", _gemm(b_scale=torch.ones(2, 16))),
    ("unsupported bias dim in matmul", _gemm(bias=_of(_BF16, 7))),
    ("Unsupported data type for bias in int4 matmul", _gemm(bias=_of(torch.int32, 16))),
)
