"""A double of `cute_dsl_fused_moe` (fused_moe/cute_dsl/fused_moe.py), called with what the real one takes."""

from __future__ import annotations

import torch
from flashinfer.tllm_enums import ActivationType
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.experts_emulator.common import activation_of, six_d
from cuda_blackwell.flashinfer_emulator import arithmetic, checks


def cute_dsl(
    x,
    x_sf,
    token_selected_experts,
    token_final_scales,
    w1_weight,
    w1_weight_sf,
    w1_alpha,
    fc2_input_scale,
    w2_weight,
    w2_weight_sf,
    w2_alpha,
    num_experts,
    top_k,
    num_local_experts,
    local_expert_offset,
    *,
    output_dtype,
    use_fused_finalize,
    moe_output,
    activation_type,
    quant_mode,
    swiglu_alpha=1.0,
    swiglu_beta=0.0,
    swiglu_limit=float("inf"),
) -> Tensor:
    """fused_moe/cute_dsl/fused_moe.py, _moe_core_impl: up and gate in runs of 64 rows, 6-D scales."""
    kind, ids = ActivationType(activation_type), token_selected_experts
    experts, rows = w1_weight.shape[:2]
    if use_fused_finalize or local_expert_offset or num_local_experts != experts or ids.shape[1] != top_k:
        raise RuntimeError("finalize, offset, local experts or top_k")
    if ids.max() >= num_experts or top_k > num_experts:
        raise RuntimeError(f"expert {int(ids.max())} of {num_experts}")
    checks.dtype(torch.uint8, w1=w1_weight, w2=w2_weight)
    checks.dtype(torch.float32, w1_alpha=w1_alpha, w2_alpha=w2_alpha, weights=token_final_scales)
    checks.dtype(torch.int32, ids=ids)
    checks.dtype(output_dtype, moe_output=moe_output)
    checks.contiguous(x=x, w1=w1_weight, w2=w2_weight, ids=ids, weights=token_final_scales)
    checks.aligned(32, x=x, moe_output=moe_output)
    checks.contiguous(w1_alpha=w1_alpha, w2_alpha=w2_alpha)
    checks.multiple(128, rows=rows, hidden=w2_weight.shape[1])
    first, second = six_d(w1_weight, w1_weight_sf, 16), six_d(w2_weight, w2_weight_sf, 16)
    first = (moe.halves(first, 64) if kind.is_gated else first) * w1_alpha[:, None, None]
    activation = activation_of(kind, swiglu_alpha, swiglu_beta, swiglu_limit)
    hidden: moe.Rounding = moe.as_is
    if quant_mode == "w4a4":
        checks.dtype(torch.uint8, x=x, x_sf=x_sf)
        if tuple(x_sf.shape) != (len(x), x.shape[1] // 8) or not x_sf.is_contiguous():
            raise RuntimeError(f"input scales are {tuple(x_sf.shape)}")
        checks.scalar(fc2_input_scale)
        x = arithmetic.dequantize(x, arithmetic.decode_scales(x_sf, 16), 16)
        hidden = moe.nvfp4(fc2_input_scale)
    elif quant_mode != "w4a16" or x_sf is not None or fc2_input_scale is not None or x.dtype != torch.bfloat16:
        raise RuntimeError(f"{quant_mode} with {x.dtype}")
    y = moe.run(
        x,
        ids,
        token_final_scales,
        first,
        second * w2_alpha[:, None, None],
        lambda values, _: activation(values),
        hidden=hidden,
    )
    return moe_output.copy_(y)
