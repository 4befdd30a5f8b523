"""Experts of b12x through FlashInfer on SM12x, in CuTe DSL: NVFP4 and MXFP4 W4A4, and NVFP4 W4A16.

Its activation scales are multipliers, unlike those of the other libraries: x is about codes * block scales * scale.
What the library's public functions derive from the weights they cache by the tensors' identity and, with calibrated
inputs, anew at each call; so this hands it what is derived once. Source of the contract: flashinfer-python 0.7.2,
`fused_moe/cute_dsl/b12x_moe.py` and `blackwell_sm12x/moe_dispatch.py` beside it.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import library, ops
from halfbyte_cuda_blackwell.experts_packing import (
    SWIGLUOAI,
    first_projection,
    input_multipliers,
    local_numbers,
    mma_view,
    multipliers,
    product,
    second_projection,
)
from halfbyte_cuda_blackwell.packing import scale_bytes, swizzle_128x4

_CAPABILITIES: Final = (120, 121)
_ACTIVATIONS: Final = {
    "silu": "silu",
    "gelu_tanh": "gelu_tanh",
    "relu2": "relu2",
    "swigluoai": "swigluoai_uninterleave",
}
#: The tensors of FlashInfer's W4A16PackedWeights, and which of them are 8-bit floats.
_A16_TENSORS: Final = ("w13", "w13_scale", "w13_global_scale", "w2", "w2_scale", "w2_global_scale", "workspace")
_A16_SCALES: Final = ("w13_scale", "w2_scale")


class B12x:
    """W4A4: the kernel quantizes activations, each expert's with that expert's own scale."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Codes as they are, scales as CuTe DSL indexes them, and what activations and products are scaled by.

        Input scales are ones where the checkpoint leaves activations alone. CheckpointError naming the matrix without
        a calibrated scale otherwise; PluginError below CUDA 13.
        """
        first, second = first_projection(weights), second_projection(weights)
        _check_library(first.packed.device, "flashinfer.b12x")
        inputs, hidden = input_multipliers(weights, problem)
        device = first.packed.device
        return {
            "w1": first.packed,
            "w1_scales": mma_view(swizzle_128x4(scale_bytes(first))),
            "w1_alpha": product(first, inputs),
            "w1_input": inputs.to(torch.float32).to(device),
            "w2": second.packed,
            "w2_scales": mma_view(swizzle_128x4(scale_bytes(second))),
            "w2_alpha": product(second, hidden),
            "w2_input": hidden.to(torch.float32).to(device),
        }

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are slots without an expert (-1) to the kernel."""
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch import _get_weight_views

        problem = cast("ExpertsProblem", packed.problem)
        mode = problem.scheme.weights.name
        # Cached by the library for as long as these very tensors live.
        views = _get_weight_views(
            packed["w1"],
            packed["w1_scales"],
            packed["w2"],
            packed["w2_scales"],
            packed["w1_alpha"],
            packed["w2_alpha"],
            n=problem.intermediate,
            k=problem.hidden,
            quant_mode=mode,
        )
        return _launch(
            x,
            problem,
            local_numbers(topk_ids, expert_map),
            topk_weights,
            quant_mode=mode,
            w1_weight=packed["w1"],
            w1_weight_sf=packed["w1_scales"],
            w1_alpha=packed["w1_alpha"],
            input_global_scale=packed["w1_input"],
            fc2_input_scale=packed["w2_input"],
            w2_weight=packed["w2"],
            w2_weight_sf=packed["w2_scales"],
            w2_alpha=packed["w2_alpha"],
            _weight_views=views,
        )


class B12xA16:
    """NVFP4 W4A16."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """The library's own arrangement of codes and scales; PluginError below CUDA 13."""
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_prepare import prepare_w4a16_packed_weights

        first, second = first_projection(weights), second_projection(weights)
        _check_library(first.packed.device, "flashinfer.b12x-a16")
        prepared = prepare_w4a16_packed_weights(
            first.packed,
            swizzle_128x4(scale_bytes(first)),
            multipliers(first),
            second.packed,
            swizzle_128x4(scale_bytes(second)),
            multipliers(second),
            activation=_ACTIVATIONS[problem.activation],
            params_dtype=torch.bfloat16,
            source_format="modelopt",
        )
        tensors = {name: getattr(prepared, name) for name in _A16_TENSORS}
        return tensors | {name: tensors[name].view(torch.uint8) for name in _A16_SCALES}

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are slots without an expert (-1) to the kernel."""
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_prepare import W4A16PackedWeights

        problem, tensors = cast("ExpertsProblem", packed.problem), dict(packed.tensors)
        for name in _A16_SCALES:
            tensors[name] = tensors[name].view(torch.float8_e4m3fn)
        prepared = W4A16PackedWeights(
            **tensors,
            hidden_size=problem.hidden,
            intermediate_size=problem.intermediate,
            num_experts=problem.experts,
            is_gated=problem.gated,
            params_dtype=torch.bfloat16,
        )
        return _launch(
            x,
            problem,
            local_numbers(topk_ids, expert_map),
            topk_weights,
            quant_mode="w4a16",
            # These are not read where the prepared weights are given.
            w1_weight=prepared.w13,
            w1_weight_sf=prepared.w13_scale,
            w1_alpha=prepared.w13_global_scale,
            w2_weight=prepared.w2,
            w2_weight_sf=prepared.w2_scale,
            w2_alpha=prepared.w2_global_scale,
            _prepared_weights=prepared,
        )


def _launch(x: Tensor, problem: ExpertsProblem, topk_ids: Tensor, topk_weights: Tensor, **weights: Any) -> Tensor:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch import launch_sm120_moe

    x = ops.aligned(x)
    y = torch.empty_like(x)
    if problem.activation == "swigluoai":
        weights |= {f"swiglu_{name}": value for name, value in SWIGLUOAI.items()}
    with ops.current(x.device):
        launch_sm120_moe(
            a=x,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            num_experts=problem.experts,
            top_k=problem.top_k,
            num_local_experts=problem.experts,
            scatter_output=y,
            activation=_ACTIVATIONS[problem.activation],
            **weights,
        )
    return y


def _check_library(device: torch.device, kernel_id: str) -> None:
    ops.require_capability(device, _CAPABILITIES, kernel_id)
    library.require_cuda(13, 0, kernel_id)
