"""Experts of TensorRT-LLM through FlashInfer on SM10x: `trtllm_fp4_block_scale_routed_moe`.

NVFP4 W4A4 quantizes x once for all experts: core gives it those that share its calibrated scale. Serving engines take
the largest where they differ (flashinfer#2356, sglang#38563), which rounds otherwise. The hidden activations have each
expert's own. MXFP4 leaves activations in bfloat16. Source of the layout: flashinfer-python 0.7.2,
`fused_moe/prepare.py`, prepare_trtllm_fp4_weights.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
from halfbyte.problems import ExpertsProblem, round_up
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import ops
from halfbyte_cuda_blackwell.experts_packing import (
    SWIGLUOAI,
    beyond,
    filled,
    first_projection,
    input_multipliers,
    interleaved,
    local_numbers,
    product,
    second_projection,
)
from halfbyte_cuda_blackwell.packing import scale_bytes, shuffled_rows, swizzle_128x4

_CAPABILITIES: Final = (100, 103)
#: Its routing wants numbers of experts divisible by this.
_EXPERTS_MULTIPLE: Final = 4


class Trtllm:
    """NVFP4 W4A4 on SM100 and SM103; MXFP4 with bfloat16 activations on SM100."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Rows of up and gate in turn, then shuffled for the epilogue; scales the same way and swizzled after that.

        CheckpointError naming the matrix without a calibrated input scale; UsageError where gate and up, which
        swigluoai clamps at one number before they are scaled, cannot have one global scale.
        """
        if problem.activation == "swigluoai":
            weights = _with_one_scale(weights)
        first, second = first_projection(weights), second_projection(weights)
        device = first.packed.device
        ops.require_capability(device, _CAPABILITIES, "flashinfer.trtllm")
        tensors = {
            "w1": _first_rows(first.packed),
            "w1_scales": swizzle_128x4(_first_rows(scale_bytes(first))),
            "w2": shuffled_rows(second.packed),
            "w2_scales": swizzle_128x4(shuffled_rows(scale_bytes(second))),
        }
        if first.bias is not None and second.bias is not None:
            tensors["w1_bias"] = _first_rows(first.bias.float().unsqueeze(-1)).squeeze(-1)
            tensors["w2_bias"] = shuffled_rows(second.bias.float().unsqueeze(-1)).squeeze(-1)
        constants = SWIGLUOAI if problem.activation == "swigluoai" else {}
        tensors |= {name: filled(problem.experts, value, device) for name, value in constants.items()}
        if problem.scheme.weights.has_global_scale:
            tensors |= _scales(weights, problem, tensors)
        return tensors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]. Experts of another rank are numbers beyond the local ones to the kernel."""
        from flashinfer import SfLayout
        from flashinfer.fused_moe import trtllm_fp4_block_scale_routed_moe

        problem, tensors, x = cast("ExpertsProblem", packed.problem), packed.tensors, ops.aligned(x)
        ids, count = topk_ids, problem.experts
        if expert_map is not None:
            ids, count = beyond(local_numbers(topk_ids, expert_map), count), count + problem.top_k
        hidden_states, hidden_scales = x, None
        if problem.scheme.weights.has_global_scale:
            hidden_states, scales = ops.quantize(x, packed["x_divisor"], ops.LINEAR)
            hidden_scales = scales.view(torch.float8_e4m3fn)
        y = torch.empty_like(x)
        with ops.current(x.device):
            trtllm_fp4_block_scale_routed_moe(
                (ids, topk_weights),
                None,
                hidden_states,
                hidden_scales,
                packed["w1"],
                # That dtype for both formats: the library tells them apart by the shape.
                packed["w1_scales"].view(torch.float8_e4m3fn),
                tensors.get("w1_bias"),
                tensors.get("alpha"),
                tensors.get("beta"),
                tensors.get("limit"),
                packed["w2"],
                packed["w2_scales"].view(torch.float8_e4m3fn),
                tensors.get("w2_bias"),
                tensors.get("up_scale"),
                tensors.get("gate_scale"),
                tensors.get("down_scale"),
                num_experts=round_up(count, _EXPERTS_MULTIPLE),
                top_k=problem.top_k,
                n_group=None,
                topk_group=None,
                intermediate_size=problem.intermediate,
                local_expert_offset=0,
                local_num_experts=problem.experts,
                routed_scaling_factor=None,
                output=y,
                hidden_states_scale_layout=SfLayout.layout_linear,
            )
        return y


def _with_one_scale(weights: ExpertsWeights) -> ExpertsWeights:
    """A resolution that was made without the weights may not know that theirs differ."""
    shared = weights.with_shared_global_scale()
    if shared is None:
        raise UsageError(
            f"{weights.up.name}: kernel 'flashinfer.trtllm' clamps gate and up at one number, and their global scales "
            "cannot be made one exactly; deny the kernel for this layer, such as with HALFBYTE_DENY=flashinfer.trtllm"
        )
    return shared


def _first_rows(rows: Tensor) -> Tensor:
    """Rows [E, 2I, ...] of up over gate: one of up, one of gate, in turn, then shuffled."""
    return shuffled_rows(interleaved(rows, 1))


def _scales(weights: ExpertsWeights, problem: ExpertsProblem, constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVFP4's factors, one for gate and one for up.

    Clamps and additions come before products are scaled, so their constants are divided by the factor of both.
    """
    inputs, hidden = input_multipliers(weights, problem)
    gate = cast("Matrix", weights.gate)  # its activations all have one
    device = gate.packed.device
    gate_scale = product(gate, inputs)
    scaled: dict[str, Tensor] = {name: constants[name] / gate_scale for name in ("beta", "limit") if name in constants}
    return {
        "alpha": constants.get("alpha", filled(problem.experts, 1.0, device)),
        **scaled,
        "x_divisor": inputs[:1].reciprocal().to(torch.float32).to(device),
        "gate_scale": gate_scale,
        "up_scale": product(weights.up, inputs / hidden),
        "down_scale": product(weights.down, hidden),
    }
