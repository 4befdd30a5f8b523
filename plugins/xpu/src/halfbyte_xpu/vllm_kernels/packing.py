"""Weights as vllm-xpu-kernels takes them: what vLLM makes of the same checkpoint tensors, byte for byte."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.matrix import Matrix
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights, dtype_name

#: E8M0 codes that do for float16: from the last whose product with 0.5 it has, 2**-23, to the last
#: whose product with 6 is finite, 2**13.
_FLOAT16_CODES = (127 - 23, 127 + 13)


def pack_linear(matrix: Matrix) -> dict[str, Tensor]:
    """`weight` uint8 [N, K/2] as stored, `scales` E8M0 as uint8 transposed to [K/32, N]: both contiguous copies."""
    return {
        "weight": matrix.packed.clone(memory_format=torch.contiguous_format),
        "scales": matrix.scales.t().clone(memory_format=torch.contiguous_format),
    }


def pack_experts(weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
    """`w13` uint8 [E, 2I, H/2] ([E, I, H/2] without gate), `w2` [E, H, I/2], with `_scales` and `_bias`; as stored.

    swigluoai takes alternating rows of gate and up, the others all rows of gate first. CheckpointError for float16
    activations and a scale that is too large or small for them: the kernel rounds scales and weights to that dtype.
    """
    dtype: torch.dtype = getattr(torch, problem.dtype)
    first = weights.fused_gate_up("interleaved" if problem.activation == "swigluoai" else "gate-up")
    tensors: dict[str, Tensor] = {}
    # Gate and up were copied where they were fused; what is the checkpoint's own must not be shared.
    for name, matrix, copied in (("w13", first, weights.gate is not None), ("w2", weights.down, False)):
        _check_scales(matrix, dtype)
        tensors[name] = _own(matrix.packed, copied)
        tensors[f"{name}_scales"] = _own(matrix.scales, copied)
        if matrix.bias is not None:
            tensors[f"{name}_bias"] = matrix.bias.detach().to(dtype, copy=True).contiguous()
    return tensors


def _own(tensor: Tensor, copied: bool) -> Tensor:
    return tensor.contiguous() if copied else tensor.clone(memory_format=torch.contiguous_format)


def _check_scales(matrix: Matrix, dtype: torch.dtype) -> None:
    if dtype != torch.float16:
        return
    low, high = _FLOAT16_CODES
    beside_values = matrix.packed.unflatten(-1, (-1, matrix.format.group_size // 2)).bitwise_and(0x77).ne(0).any(-1)
    bad = ((matrix.scales < low) | (matrix.scales > high)) & beside_values
    if bool(bad.any()):
        code = int(matrix.scales[bad][0])
        effect = "half of it becomes zero" if code < low else "six times it becomes infinite"
        raise CheckpointError(
            f"{matrix.name}: a block scale is 2**{code - 127}; the kernel xpu.fused-moe rounds scales and weights to "
            f"{dtype_name(dtype)}, where {effect}; run the model in bfloat16"
        )
