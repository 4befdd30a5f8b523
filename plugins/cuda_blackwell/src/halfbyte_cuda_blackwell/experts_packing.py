"""What FlashInfer's experts kernels want of the weights: orders of rows, global scales, numbers of local experts.

Every function works on any device. "Up" comes before "gate" everywhere: FlashInfer's canonical order of the fused
first projection, the other way round than in most checkpoints. Layouts of scales are in `packing`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, cast

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.matrix import Matrix
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.activations import SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT
from halfbyte.weights import ExpertsWeights

#: gpt-oss's activation as FlashInfer's arguments: gate * sigmoid(alpha * gate) * (up + beta), clamped at the limit.
SWIGLUOAI: Final = {"alpha": SWIGLUOAI_ALPHA, "beta": 1.0, "limit": SWIGLUOAI_LIMIT}


def first_projection(weights: ExpertsWeights) -> Matrix:
    """Up over gate, [E, 2I, H], in memory of its own; up alone, [E, I, H], where there is no gate."""
    fused = weights.fused_gate_up("up-gate")
    return fused if weights.gate is not None else _copied(fused)


def second_projection(weights: ExpertsWeights) -> Matrix:
    """Down [E, H, I] in memory of its own."""
    return _copied(weights.down)


def interleaved(rows: Tensor, size: int) -> Tensor:
    """Rows [E, 2I, ...] of up over gate in runs of `size`: the first run of up, the first of gate, the second of up."""
    experts, count, *rest = rows.shape
    runs = rows.reshape(experts, 2, count // (2 * size), size, *rest)
    return runs.transpose(1, 2).reshape(rows.shape)


def multipliers(matrix: Matrix) -> Tensor:
    """The global scales of a stack, of a format that has them: float32 [E] on its device."""
    return cast("Tensor", matrix.global_scale).to(torch.float32).to(matrix.packed.device)


def input_multipliers(weights: ExpertsWeights, problem: ExpertsProblem) -> tuple[Tensor, Tensor]:
    """The global scales of the inputs of both projections, float64 [E] on the CPU.

    Ones where the scheme leaves activations alone and the kernel quantizes them all the same, and where the format has
    none. CheckpointError naming the matrix where the scheme needs a calibrated scale that is not there.
    """
    if problem.scheme.activations is None or not problem.scheme.weights.has_global_scale:
        ones = torch.ones(problem.experts, dtype=torch.float64)
        return ones, ones.clone()
    if weights.gate is not None:
        _calibrated(weights.gate, problem)
    return _calibrated(weights.up, problem), _calibrated(weights.down, problem)


def product(matrix: Matrix, inputs: Tensor) -> Tensor:
    """The factor of each expert's products, float32 [E] on the device: its global scale times that of its inputs.

    Multiplied in float64 and rounded once.
    """
    scale = torch.ones_like(inputs) if matrix.global_scale is None else matrix.global_scale
    return (scale * inputs).to(torch.float32).to(matrix.packed.device)


def mma_view(swizzled: Tensor) -> Tensor:
    """Swizzled scales uint8 [E, R, C] as CuTe DSL's kernels index them: (32, 4, R / 128, 4, C / 4, E), a view."""
    experts, rows, columns = swizzled.shape
    return swizzled.view(experts, rows // 128, columns // 4, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


def local_numbers(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The local numbers int32 [T, k] of each token's experts, -1 for those of another rank; no synchronisation."""
    return topk_ids if expert_map is None else expert_map[topk_ids.long()]


def beyond(local: Tensor, experts: int) -> Tensor:
    """`local_numbers` with those of another rank counted from `experts` on, different within a token."""
    slots = torch.arange(local.shape[1], dtype=local.dtype, device=local.device)
    return torch.where(local < 0, slots + experts, local)


def filled(experts: int, value: float, device: torch.device) -> Tensor:
    """float32 [E], all `value`."""
    return torch.full((experts,), value, dtype=torch.float32, device=device)


def _calibrated(matrix: Matrix, problem: ExpertsProblem) -> Tensor:
    if matrix.input_global_scale is None:
        raise CheckpointError(
            f"{matrix.name}: {problem.scheme} quantizes activations with a calibrated input global scale, and "
            "there is none; calibrate the checkpoint anew, or run it weight-only: set input_activations to null "
            "in the quantization_config of its config.json"
        )
    return matrix.input_global_scale


def _copied(matrix: Matrix) -> Matrix:
    return replace(matrix, packed=matrix.packed.clone(), scales=matrix.scales.clone())
