"""Experts of CuTe DSL through FlashInfer on SM10x: `cute_dsl_fused_moe`, NVFP4 weights with NVFP4 or bfloat16 inputs.

W4A4 quantizes x once for all experts, and the hidden activations with one scale: core gives it experts that share both.
Serving engines take the largest where they differ (sglang#38563), which rounds otherwise. Source of the layout:
flashinfer-python 0.7.2, `fused_moe/prepare.py`, prepare_cute_dsl_weights.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
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
    product,
    second_projection,
)
from halfbyte_cuda_blackwell.packing import scale_bytes, swizzle_128x4

_CAPABILITIES: Final = (100, 103)
#: Rows of up, then as many of gate, in one tile of the first projection.
_RUN: Final = 64
_ACTIVATIONS: Final = {"silu": "Swiglu", "swigluoai": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}


class CuteDsl:
    """NVFP4 W4A4 on SM100 and SM103."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Up and gate in runs of 64 rows, scales swizzled after that; one input scale for each projection.

        CheckpointError naming the matrix without a calibrated input scale.
        """
        first, second = first_projection(weights), second_projection(weights)
        device = first.packed.device
        ops.require_capability(device, _CAPABILITIES, "flashinfer.cute-dsl")
        inputs, hidden = input_multipliers(weights, problem)
        return _codes_and_scales(first, second, problem) | {
            "w1_alpha": product(first, inputs),
            "w1_input": inputs[:1].reciprocal().to(torch.float32).to(device),
            "w2_alpha": product(second, hidden),
            "w2_input": hidden[:1].reciprocal().to(torch.float32).to(device),
        }

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are numbers beyond the local ones to the kernel."""
        x = ops.aligned(x)
        inputs = ops.quantize(x, packed["w1_input"], ops.LINEAR)
        return _run(inputs, "w4a4", torch.empty_like(x), packed, topk_ids, topk_weights, expert_map)


class CuteDslA16:
    """NVFP4 W4A16 on SM100 and SM103."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Up and gate in runs of 64 rows, scales swizzled after that."""
        first, second = first_projection(weights), second_projection(weights)
        ops.require_capability(first.packed.device, _CAPABILITIES, "flashinfer.cute-dsl-a16")
        factors = {"w1_alpha": multipliers(first), "w2_alpha": multipliers(second)}
        return _codes_and_scales(first, second, problem) | factors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are numbers beyond the local ones to the kernel."""
        x = ops.aligned(x)
        return _run((x, None), "w4a16", torch.empty_like(x), packed, topk_ids, topk_weights, expert_map)


def _codes_and_scales(first: Matrix, second: Matrix, problem: ExpertsProblem) -> dict[str, Tensor]:
    codes, scales = first.packed, scale_bytes(first)
    if problem.gated:
        codes, scales = interleaved(codes, _RUN), interleaved(scales, _RUN)
    return {
        "w1": codes,
        "w1_scales": swizzle_128x4(scales),
        "w2": second.packed,
        "w2_scales": swizzle_128x4(scale_bytes(second)),
    }


def _run(
    inputs: tuple[Tensor, Tensor | None],
    mode: str,
    y: Tensor,
    packed: Packed,
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
) -> Tensor:
    """Fill in y [T, H] and return it; `inputs` are x and its scales, if it was quantized."""
    from flashinfer.fused_moe import cute_dsl_fused_moe
    from flashinfer.tllm_enums import ActivationType

    problem = cast("ExpertsProblem", packed.problem)
    ids, count = topk_ids, problem.experts
    if expert_map is not None:
        ids, count = beyond(local_numbers(topk_ids, expert_map), count), count + problem.top_k
    constants: dict[str, Any] = {}
    if problem.activation == "swigluoai":
        constants = {f"swiglu_{name}": value for name, value in SWIGLUOAI.items()}
    with ops.current(y.device):
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
            output_dtype=y.dtype,
            # The fused one adds up in any order: the same call would give other last bits.
            use_fused_finalize=False,
            moe_output=y,
            activation_type=ActivationType[_ACTIVATIONS[problem.activation]].value,
            quant_mode=mode,
            **constants,
        )
    return y
