"""marlin.humming: experts by humming's grouped products; sorting, activation and sum are torch's.

Its indexed products are not used: they want the rows in blocks of the tile's size, which differs by range of rows,
and save only the copy of x.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.activations import activate
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_marlin.humming.launching import load, run
from halfbyte_cuda_marlin.humming.packing import Gemm, pack


class MarlinHummingExperts:
    """Two products over rows sorted by expert, gate and up in one."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Rearrange the weights, and compile and load the kernels.

        The tensors are those of `packing.pack`, named "up_" (gate and up) and "down_". PluginError if humming cannot
        be imported or fails.
        """
        up, down = _gemms(problem)
        result: dict[str, Tensor] = {}
        for name, gemm, matrix in (("up_", up, weights.fused_gate_up("gate-up")), ("down_", down, weights.down)):
            packed = pack(matrix, gemm)
            load(gemm, packed)
            result |= {name + key: tensor for key, tensor in packed.items()}
        return result

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]; sums over the experts of a token in float32, in their order."""
        problem = cast(ExpertsProblem, packed.problem)
        up, down = _gemms(problem)
        slots = topk_ids.flatten() if expert_map is None else expert_map.index_select(0, topk_ids.flatten())
        order, starts = by_expert(slots, problem.experts)
        hidden = run(up, x.index_select(0, order // topk_ids.shape[1]), _named(packed, "up_"), starts)
        gate, value = hidden.chunk(2, dim=1) if problem.gated else (None, hidden)
        results = run(down, activate(problem.activation, gate, value), _named(packed, "down_"), starts)
        return _weighted_sum(results, order, topk_weights, None if expert_map is None else slots >= 0).to(x.dtype)


def by_expert(slots: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(slots in the order of their experts int64 [P], where each expert's begin int32 [E + 1]).

    `slots`: the expert of each slot, int32 [P]; negative ones come last, beyond every expert's. Nothing waits for the
    GPU.
    """
    ordered, order = torch.where(slots < 0, experts, slots).sort(stable=True)
    every = torch.arange(experts + 1, dtype=slots.dtype, device=slots.device)
    return order, torch.searchsorted(ordered, every, out_int32=True)


def _weighted_sum(results: Tensor, order: Tensor, weights: Tensor, here: Tensor | None) -> Tensor:
    """Float32 [T, H] of results [T*k, H] in `order`; slots that are not `here` add nothing, whatever their rows are."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    parts = results.index_select(0, place).view(*weights.shape, -1) * weights[..., None]
    if here is not None:
        parts = parts.masked_fill(~here.view(*weights.shape, 1), 0)
    return parts.sum(dim=1)


def _gemms(problem: ExpertsProblem) -> tuple[Gemm, Gemm]:
    """Gate and up as one product, and down."""
    fmt, hidden, inner = problem.scheme.weights, problem.hidden, problem.intermediate
    fused = 2 * inner if problem.gated else inner
    return (
        Gemm(fused, hidden, fmt, problem.dtype, problem.experts, problem.bias),
        Gemm(hidden, inner, fmt, problem.dtype, problem.experts, problem.bias),
    )


def _named(packed: Packed, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in packed.tensors.items() if name.startswith(prefix)}
