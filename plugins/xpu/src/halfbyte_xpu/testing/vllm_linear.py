"""The contract of vllm-xpu-kernels' quantizer and matrix product, on a CPU.

Checks come in the vendor's order with its texts, as they were seen when its own host code ran. Those marked strict are
ours: there the vendor checks nothing and the device would read or write out of bounds, or compute nonsense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte_xpu.testing import numbers

_HALVES = (torch.bfloat16, torch.float16)


def check(fine: bool, text: str) -> None:
    """RuntimeError with the vendor's text, or ours with "strict:" before it."""
    if not fine:
        raise RuntimeError(text)


def per_token_group_quant_mxfp4(x: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float) -> None:
    """Write E2M1 codes and scales, powers of two in float32, honouring the strides of the scales."""
    check(x.is_contiguous(), "input must be contiguous")
    check(output_q.is_contiguous(), "output_q must be contiguous")
    check(group_size == 32, f"MXFP4 requires group_size == 32, got {group_size}")
    check(x.numel() % group_size == 0, "input numel must be divisible by group_size")
    check(output_s.dim() == 2, "output_s must be 2-D")
    check(output_q.dtype == torch.uint8, "output_q must be uint8")
    check(x.numel() > 0 or output_q.numel() == 0, "output_q must be empty when input is empty")
    check(x.numel() > 0 or output_s.numel() == 0, "output_s must be empty when input is empty")
    if not x.numel():
        return
    k = x.shape[-1]
    rows = x.numel() // k
    check(x.dtype in (*_HALVES, torch.float32), f"strict: input is {x.dtype}")
    check(k % group_size == 0, f"strict: groups straddle rows of {k}")
    check(tuple(output_q.shape) == (*x.shape[:-1], k // 2), f"strict: output_q is {list(output_q.shape)}")
    check(tuple(output_s.shape) == (rows, k // group_size), f"strict: output_s is {list(output_s.shape)}")
    check(output_s.dtype == torch.float32, f"strict: output_s is {output_s.dtype}")
    groups = x.float().reshape(rows, -1, group_size)
    scales = torch.exp2(numbers.exponents(groups.abs().amax(-1), eps).float())
    packed = numbers.pack(numbers.codes(groups / scales.unsqueeze(-1)).flatten(-2))
    output_q.copy_(packed.view(output_q.shape))
    output_s.copy_(scales)


def fp4_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype | None, bias: Tensor | None
) -> Tensor:
    """The product in float32, bias added there, rounded once."""
    check(a_scale.is_contiguous(), "A_scale must be contiguous for fp4 matmul")
    check(b_scale.is_contiguous(), "B_scale must be contiguous for fp4 matmul")
    check(a.dim() in (2, 3), "OneDNN Matmul only support 2D and 3D inputs!")
    check(b.dim() in (2, 3), "OneDNN Matmul only support 2D and 3D weights!")
    check(b.dim() == 2 or a.dim() == 3, "OneDNN Matmul expects 3D input when using batched weights!")
    check(
        {a.dtype, b.dtype} == {torch.float4_e2m1fn_x2}, "input and weight must be f4_e2m1x2 or f4_e2m1x2 for fp4 matmul"
    )
    dtype = torch.float16 if out_dtype is None else out_dtype
    check(dtype in _HALVES, "output must be float16 or bfloat16 for fp4 matmul")
    check(a_scale.dtype == torch.float8_e8m0fnu, f"Unsupported scale type for fp4 matmul: {a_scale.dtype}")
    check(a_scale.dtype == b_scale.dtype, "Mismatched scale data types in mxfp4 matmul")
    n, half = b.shape[-1], a.shape[-1]
    if bias is not None:
        rows = a.numel() // half
        check(bias.numel() in (1, n, rows, rows * n), f"unsupported bias dim in matmul {list(bias.shape)}")
        check(bias.dtype in (*_HALVES, torch.float32), f"Unsupported data type for bias in int4 matmul: {bias.dtype}")
        check(bias.is_contiguous(), "strict: bias is not contiguous")
    check(b.dim() == 2, "strict: batched weights are not used")
    check(b.shape[0] == half, f"strict: A has {half} bytes a row, B {b.shape[0]}")
    check(b.stride(0) == 1, f"strict: B is packed along N, with strides {b.stride()}")
    check(tuple(a_scale.shape) == (*a.shape[:-1], half // 16), f"strict: A_scale is {list(a_scale.shape)}")
    check(tuple(b_scale.shape) == (half // 16, n), f"strict: B_scale is {list(b_scale.shape)}")
    x = numbers.scaled(numbers.decode(a), numbers.e8m0(a_scale))
    weight = numbers.scaled(numbers.decode(b.t()), numbers.e8m0(b_scale).t())
    y = x @ weight.t()
    return (y if bias is None else y + bias.float()).to(dtype)
