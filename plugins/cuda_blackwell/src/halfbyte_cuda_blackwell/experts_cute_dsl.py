"""Experts of CuTe DSL through FlashInfer on SM10x: `cute_dsl_fused_moe`, NVFP4 weights with NVFP4 or bfloat16 inputs.

W4A4 quantizes x once for all experts, and the hidden activations with one scale: where the experts' calibrated scales
differ, the largest serves all of them (so it is blocked, see known_bad.py). Source of the layout:
flashinfer-python 0.7.2, `fused_moe/prepare.py`, prepare_cute_dsl_weights.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import ops
from halfbyte_cuda_blackwell.experts_packing import (
    SWIGLUOAI,
    beyond,
    first_projection,
    input_multipliers,
    interleaved,
    local_numbers,
    mma_view,
    multipliers,
    one_scale,
    product,
    second_projection,
)
from halfbyte_cuda_blackwell.packing import scale_bytes, swizzle_128x4

_CAPABILITIES: Final = (100, 103)
#: Rows of up, then as many of gate, in one tile of the first projection.
_RUN: Final = 64
_ACTIVATIONS: Final = {"silu": "Swiglu", "swigluoai": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}


class CuteDsl:
    """NVFP4 W4A4 and W4A16 on SM100 and SM103."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Up and gate in runs of 64 rows, scales swizzled after that; W4A4: one input scale for each projection.

        CheckpointError naming the matrix without a calibrated input scale.
        """
        first, second = first_projection(weights), second_projection(weights)
        codes, scales = first.packed, scale_bytes(first)
        ops.require_capability(codes.device, _CAPABILITIES, "flashinfer.cute-dsl")
        if problem.gated:
            codes, scales = interleaved(codes, _RUN), interleaved(scales, _RUN)
        tensors = {
            "w1": codes,
            "w1_scales": swizzle_128x4(scales),
            "w2": second.packed,
            "w2_scales": swizzle_128x4(scale_bytes(second)),
        }
        if problem.scheme.activations is None:
            return tensors | {"w1_alpha": multipliers(first), "w2_alpha": multipliers(second)}
        inputs, hidden = (one_scale(scale) for scale in input_multipliers(weights, problem))
        device = codes.device
        return tensors | {
            "w1_alpha": product(first, inputs),
            "w1_input": inputs[:1].reciprocal().to(torch.float32).to(device),
            "w2_alpha": product(second, hidden),
            "w2_input": hidden[:1].reciprocal().to(torch.float32).to(device),
        }

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are numbers beyond the local ones to the kernel."""
        from flashinfer.fused_moe import cute_dsl_fused_moe
        from flashinfer.tllm_enums import ActivationType

        problem, x = cast("ExpertsProblem", packed.problem), ops.aligned(x)
        ids, count = topk_ids, problem.experts
        if expert_map is not None:
            ids, count = beyond(local_numbers(topk_ids, expert_map), count), count + problem.top_k
        inputs: tuple[Tensor, Tensor | None] = (x, None)
        if problem.scheme.activations is not None:
            inputs = ops.quantize(x, packed["w1_input"], ops.LINEAR)
        constants: dict[str, Any] = {}
        if problem.activation == "swigluoai":
            constants = {f"swiglu_{name}": value for name, value in SWIGLUOAI.items()}
        y = torch.empty_like(x)
        with ops.current(x.device):
            cute_dsl_fused_moe(
                *inputs,
                ids,
                topk_weights,
                packed["w1"],
                mma_view(packed["w1_scales"]),
                packed["w1_alpha"],
                packed.tensors.get("w2_input"),
                packed["w2"],
                mma_view(packed["w2_scales"]),
                packed["w2_alpha"],
                count,
                problem.top_k,
                problem.experts,
                0,
                output_dtype=x.dtype,
                # The fused one adds up in any order: the same call would give other last bits.
                use_fused_finalize=False,
                moe_output=y,
                activation_type=ActivationType[_ACTIVATIONS[problem.activation]].value,
                quant_mode="w4a16" if problem.scheme.activations is None else "w4a4",
                **constants,
            )
        return y
