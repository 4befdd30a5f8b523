"""Our custom operators over vllm-xpu-kernels, and the validators that implementation and fake share.

The vendor's host code checks neither K nor the sizes of scales and outputs and would read out of bounds on the device,
so everything is checked here. Packed values and E8M0 scales are uint8 on both sides: torch.library cannot check
operators that take 4-bit and 8-bit floats, and inductor cannot generate the cast to E8M0.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats import MXFP4

GROUP: Final = MXFP4.group_size
#: The least amax / 6 that the quantizer assumes: scales are at least 2**-33. What vLLM passes.
EPSILON: Final = 1e-10
_INPUTS: Final = (torch.bfloat16, torch.float16, torch.float32)
_OUTPUTS: Final = (torch.bfloat16, torch.float16)


@torch.library.custom_op("halfbyte_xpu::quantize_mxfp4", mutates_args=())
def quantize_mxfp4(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K] (float32, bfloat16, float16; any strides) by `_C::per_token_group_quant_mxfp4`.

    Returns uint8 [..., K/2], the low nibble is the even column, and E8M0 codes uint8 [..., K/32]. Scales are
    2**ceil(log2(amax / 6)), at least 2**-33; ties of E2M1 go toward zero. NaN and infinity are undefined. UsageError
    (a ValueError) with the shape and the fix for a K that is no multiple of 32, another dtype or group size.
    """
    packed_shape, scales_shape = check_quantizable(x, group_size)
    k = x.shape[-1]
    rows = x.reshape(x.numel() // k, k).contiguous()
    packed = torch.empty(rows.shape[0], k // 2, dtype=torch.uint8, device=x.device)
    # The operator takes scales in two dimensions only, and writes powers of two in float32.
    scales = torch.empty(rows.shape[0], k // group_size, dtype=torch.float32, device=x.device)
    torch.ops._C.per_token_group_quant_mxfp4(rows, packed, scales, group_size, EPSILON)
    codes = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    return packed.view(packed_shape), codes.view(scales_shape)


@quantize_mxfp4.register_fake
def _quantize_mxfp4_fake(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    packed_shape, scales_shape = check_quantizable(x, group_size)
    return x.new_empty(packed_shape, dtype=torch.uint8), x.new_empty(scales_shape, dtype=torch.uint8)


def check_quantizable(x: Tensor, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of packed values and scales of x; UsageError if it cannot be quantized."""
    what = f"cannot quantize {x.dtype} {list(x.shape)} to MXFP4"
    if group_size != GROUP:
        raise UsageError(f"{what} in groups of {group_size}; MXFP4 has groups of {GROUP}")
    if x.dtype not in _INPUTS:
        raise UsageError(f"{what}; convert it to bfloat16, float16 or float32")
    if x.ndim == 0 or x.shape[-1] % GROUP or x.shape[-1] == 0:
        raise UsageError(f"{what}: the last dimension is not a positive multiple of {GROUP}; pad it with zeros")
    lead, k = tuple(x.shape[:-1]), x.shape[-1]
    return (*lead, k // 2), (*lead, k // GROUP)


@torch.library.custom_op("halfbyte_xpu::fp4_gemm", mutates_args=())
def fp4_gemm(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return y [..., N] in `dtype` of x [..., K/2] and weight [N, K/2], both packed uint8, by `_xpu_C::fp4_gemm`.

    E8M0 codes are uint8: x_scales [..., K/32] and scales transposed, [K/32, N] contiguous. `bias` [N] in `dtype` is
    added before the one rounding. UsageError (a ValueError) for anything that is not so.
    """
    shape = check_gemm(x, x_scales, weight, scales, bias, dtype)
    rows, k = x.numel() // x.shape[-1], x.shape[-1] * 2
    if not rows:
        return torch.empty(shape, dtype=dtype, device=x.device)
    y: Tensor = torch.ops._xpu_C.fp4_gemm(
        x.reshape(rows, k // 2).view(torch.float4_e2m1fn_x2),
        # A view: the operator knows the layout by its strides, and a contiguous copy would be packed along N.
        weight.view(torch.float4_e2m1fn_x2).t(),
        x_scales.reshape(rows, k // GROUP).view(torch.float8_e8m0fnu),
        scales.view(torch.float8_e8m0fnu),
        dtype,
        bias,
    )
    return y.view(shape)


@fp4_gemm.register_fake
def _fp4_gemm_fake(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(check_gemm(x, x_scales, weight, scales, bias, dtype), dtype=dtype)


def check_gemm(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[int, ...]:
    """Return the shape of the product; UsageError naming the tensor that does not fit the others."""
    if dtype not in _OUTPUTS:
        raise UsageError(f"the product of MXFP4 matrices cannot be {dtype}; ask for bfloat16 or float16")
    if weight.ndim != 2 or weight.shape[1] % (GROUP // 2) or not weight.numel():
        raise UsageError(f"weight is {list(weight.shape)}; expected packed values [N, K/2], K a multiple of {GROUP}")
    n, half = weight.shape
    groups = half * 2 // GROUP
    lead = tuple(x.shape[:-1])
    _check("weight", weight, (n, half), torch.uint8, weight.device)
    _check("scales", scales, (groups, n), torch.uint8, weight.device)
    _check("x", x, (*lead, half), torch.uint8, weight.device)
    _check("x_scales", x_scales, (*lead, groups), torch.uint8, weight.device)
    if bias is not None:
        _check("bias", bias, (n,), dtype, weight.device)
    return (*lead, n)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
        raise UsageError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}{strides}; "
            f"expected {dtype} [{', '.join(map(str, shape))}] on {device}, contiguous"
        )
