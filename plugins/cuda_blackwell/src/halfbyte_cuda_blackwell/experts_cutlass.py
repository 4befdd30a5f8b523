"""Experts of CUTLASS through FlashInfer: `cutlass_fused_moe`, NVFP4 weights and activations.

The kernel quantizes activations itself, each expert's with that expert's own global scale. Source of the layout:
flashinfer-python 0.7.2, `csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu`, getQuantParams.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import ops
from halfbyte_cuda_blackwell.experts_packing import (
    SWIGLUOAI,
    beyond,
    filled,
    first_projection,
    input_multipliers,
    local_numbers,
    product,
    second_projection,
)
from halfbyte_cuda_blackwell.packing import scale_bytes, swizzle_128x4

_CAPABILITIES: Final = (100, 103, 120, 121)
_ACTIVATIONS: Final = {"silu": "Swiglu", "swigluoai": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}


class Cutlass:
    """NVFP4 W4A4 on SM10x and SM12x."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Codes as they are, scales swizzled, and for both projections what activations and products are scaled by.

        CheckpointError naming the matrix without a calibrated input scale.
        """
        first, second = first_projection(weights), second_projection(weights)
        inputs, hidden = input_multipliers(weights, problem)
        device = first.packed.device
        ops.require_capability(device, _CAPABILITIES, "flashinfer.cutlass")
        tensors = {
            "w1": first.packed,
            "w1_scales": swizzle_128x4(scale_bytes(first)),
            "w1_alpha": product(first, inputs),
            "w1_input": inputs.reciprocal().to(torch.float32).to(device),
            "w2": second.packed,
            "w2_scales": swizzle_128x4(scale_bytes(second)),
            "w2_alpha": product(second, hidden),
            "w2_input": hidden.reciprocal().to(torch.float32).to(device),
        }
        if problem.activation == "swigluoai":
            tensors |= {name: filled(problem.experts, value, device) for name, value in SWIGLUOAI.items()}
        return tensors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are numbers of further, absent ranks to the kernel."""
        from flashinfer.fused_moe import cutlass_fused_moe
        from flashinfer.tllm_enums import ActivationType

        problem, tensors, x = cast("ExpertsProblem", packed.problem), packed.tensors, ops.aligned(x)
        ids, ranks = topk_ids, 1
        if expert_map is not None:
            ids = beyond(local_numbers(topk_ids, expert_map), problem.experts)
            # As many absent ranks as give each slot of a token a number of its own.
            ranks += -(-problem.top_k // problem.experts)
        y = torch.empty_like(x)
        cutlass_fused_moe(
            x,
            ids,
            topk_weights,
            # The dtype is what selects NVFP4 there.
            packed["w1"].view(torch.int64),
            packed["w2"].view(torch.int64),
            x.dtype,
            [
                packed["w1_input"],
                packed["w1_scales"].view(torch.int32),
                packed["w1_alpha"],
                packed["w2_input"],
                packed["w2_scales"].view(torch.int32),
                packed["w2_alpha"],
            ],
            swiglu_alpha=tensors.get("alpha"),
            swiglu_beta=tensors.get("beta"),
            swiglu_limit=tensors.get("limit"),
            ep_size=ranks,
            ep_rank=0,
            output=y,
            activation_type=ActivationType[_ACTIVATIONS[problem.activation]],
            # The fused one adds up in any order: the same call would give other last bits.
            use_fused_finalize=False,
        )
        return y
