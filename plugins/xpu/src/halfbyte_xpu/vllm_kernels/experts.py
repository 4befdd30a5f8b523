"""xpu.fused-moe: MXFP4 experts with activations in 16 bits, by XpuFusedMoe of vllm-xpu-kernels."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, cast

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights, dtype_name
from halfbyte_xpu.vllm_kernels.library import check_device, check_environment, load
from halfbyte_xpu.vllm_kernels.packing import pack_experts
from halfbyte_xpu.vllm_kernels.schemas import EXPERTS_OPS, PACKAGE

#: Our names of activation functions to the library's.
_ACTIVATIONS: Final = {"silu": "silu", "gelu_tanh": "gelu_tanh", "swigluoai": "swigluoai", "relu2": "relu2_no_mul"}
_DTYPES: Final = (torch.bfloat16, torch.float16)


class FusedMoe:
    """Dequantizes weights inside the grouped product; sums in float32. PluginError if an operator is missing."""

    def __init__(self) -> None:
        load(EXPERTS_OPS)
        self._library: Any = import_module(f"{PACKAGE}.fused_moe_interface")

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Return `w13`, `w2`, their scales and biases; see packing.py.

        PluginError on a device for which the library has no MXFP4, UsageError where a variable of the library's makes
        it compute something else.
        """
        check_environment()
        check_device(weights.up.packed.device)
        return pack_experts(weights, problem)

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]; routing weights are applied in float32 to outputs rounded to x's dtype.

        UsageError for x in another dtype or with more elements than the library can count, and as in `prepare`.
        """
        check_environment()
        problem = cast("ExpertsProblem", packed.problem)
        if x.dtype not in _DTYPES:  # the library would launch nothing, and return what was in memory
            raise UsageError(f"x is {dtype_name(x.dtype)} {list(x.shape)}; xpu.fused-moe takes bfloat16 or float16")
        _check_size(x, problem.top_k)
        # It keeps the weights as they are, and takes the number of global experts from the map it is made with.
        experts = self._library.XpuFusedMoe(
            w13=_fp4(packed["w13"]),
            w13_scales=packed["w13_scales"],
            w13_bias=packed.tensors.get("w13_bias"),
            w2=_fp4(packed["w2"]),
            w2_scales=packed["w2_scales"],
            w2_bias=packed.tensors.get("w2_bias"),
            n_experts_per_token=problem.top_k,
            activation=_ACTIVATIONS[problem.activation],
            num_experts=problem.experts,
            expert_map=expert_map,
        )
        y = torch.empty_like(x)
        experts.apply(y, x, topk_weights, topk_ids, expert_map)
        return y


def _check_size(x: Tensor, top_k: int) -> None:
    """moe_gather computes offsets into the routed rows [T * top_k, H] in int32, and would read elsewhere."""
    tokens, hidden = x.shape
    if tokens * top_k * hidden >= 2**31:
        raise UsageError(
            f"x is {list(x.shape)}, with {top_k} experts for each token; xpu.fused-moe counts tokens x experts x "
            f"hidden size in 32 bits; run at most {(2**31 - 1) // (top_k * hidden)} tokens at once"
        )


def _fp4(packed: Tensor) -> Tensor:
    """The library takes uint8 for INT4, and rewrites it in place."""
    return packed.view(torch.float4_e2m1fn_x2)
