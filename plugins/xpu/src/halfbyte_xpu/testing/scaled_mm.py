"""The contract of torch.nn.functional.scaled_mm for FP4 on an Intel GPU in torch 2.14, computed on a CPU.

Shapes, strides and multiples are those that torch 2.14's meta function for XPU asks for; that scale_b is [N, K/group]
and that global scales come second is in the text of its pull requests, #181726 and #181727.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from halfbyte_xpu.testing import numbers
from halfbyte_xpu.testing.vllm_linear import check

_BLOCKS = {ScalingType.BlockWise1x32: (32, torch.float8_e8m0fnu), ScalingType.BlockWise1x16: (16, torch.float8_e4m3fn)}


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Sequence[Tensor],
    scale_recipe_a: Sequence[ScalingType],
    scale_b: Sequence[Tensor],
    scale_recipe_b: Sequence[ScalingType],
    swizzle_a: Sequence[SwizzleType] = (),
    swizzle_b: Sequence[SwizzleType] = (),
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """The product in float32, rounded once to `output_dtype`."""
    check(not options and bias is None, "strict: neither bias nor options are used")
    check({mat_a.dtype, mat_b.dtype} == {torch.float4_e2m1fn_x2}, "Expected both inputs to be fp4")
    check(mat_a.stride(0) > mat_a.stride(1) == 1, f"self must be row_major, got stride {mat_a.stride()}")
    check(mat_b.stride(1) > mat_b.stride(0) == 1, f"mat2 must be col_major, got stride {mat_b.stride()}")
    check(mat_a.shape[1] % 16 == 0, f"Expected self.size(1) to be divisible by 16, but got {mat_a.shape[1]}")
    check(all(size % 16 == 0 for size in mat_b.shape), "Expected both dimensions of mat2 to be divisible by 16")
    check(mat_a.shape[1] == mat_b.shape[0], "mat_a and mat_b shapes cannot be multiplied")
    check(list(scale_recipe_a) == list(scale_recipe_b), "strict: two recipes")
    check(not any(s is not SwizzleType.NO_SWIZZLE for s in (*swizzle_a, *swizzle_b)), "strict: scales are not swizzled")
    check(output_dtype in (torch.bfloat16, torch.float16), f"strict: the output is {output_dtype}")
    y = _dequantized(mat_a, scale_a, scale_recipe_a) @ _dequantized(mat_b.t(), scale_b, scale_recipe_b).t()
    return y.to(output_dtype)


def _dequantized(packed: Tensor, scales: Sequence[Tensor], recipes: Sequence[ScalingType]) -> Tensor:
    check(recipes[0] in _BLOCKS and len(scales) == len(recipes), "Invalid scaling configuration")
    group, dtype = _BLOCKS[recipes[0]]
    rows, k = packed.shape[0], packed.shape[1] * 2
    block = scales[0]
    check(block.dtype == dtype, f"Invalid scaling configuration: scales are {block.dtype}")
    check(tuple(block.shape) == (rows, k // group) and block.is_contiguous(), f"strict: scales {list(block.shape)}")
    values = numbers.decode(packed)
    if group == 32:
        check(len(scales) == 1, "strict: MXFP4 has no global scale")
        return numbers.scaled(values, numbers.e8m0(block))
    check(list(recipes[1:]) == [ScalingType.TensorWise], "strict: NVFP4 needs its global scale")
    check(scales[1].dtype == torch.float32 and scales[1].numel() == 1, "strict: a global scale is one float32")
    return numbers.scaled(values, block.float()) * scales[1]
