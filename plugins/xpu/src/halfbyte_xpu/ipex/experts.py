"""xpu.ipex, experts: MXFP4 weights, bfloat16 activations.

Its own GatedMLPMOE rewrites the weights it is given, so the grouped product is called directly.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.activations import activate
from halfbyte.weights import ExpertsWeights
from halfbyte_xpu.ipex.library import EXPERTS, grouped_product, load
from halfbyte_xpu.ipex.packing import pack


class IpexExperts:
    """Sorts rows by expert without looking at the numbers; biases, activation and weighted sum by torch."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Return `w13` (gate rows first), `w2`, their scales and biases.

        PluginError if the installed build lacks the operator.
        """
        load(EXPERTS)
        tensors = {}
        for name, matrix in (("w13", weights.fused_gate_up("gate-up")), ("w2", weights.down)):
            tensors[name], tensors[f"{name}_scales"] = pack(matrix)
            if matrix.bias is not None:
                tensors[f"{name}_bias"] = matrix.bias.detach().to(getattr(torch, problem.dtype), copy=True)
        return tensors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]: the weighted outputs of each token's experts, summed in float32."""
        problem = cast("ExpertsProblem", packed.problem)
        local = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
        # Rows of experts elsewhere go last, behind all that the product is told of.
        expert = torch.where(local < 0, problem.experts, local).flatten()
        order = torch.argsort(expert, stable=True)
        rows = torch.zeros(problem.experts + 1, dtype=torch.int32, device=x.device)
        rows.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
        expert = expert[order]
        inputs = x[order // problem.top_k]
        first = _project(inputs, packed, "w13", rows[:-1], expert)
        gate, up = first.chunk(2, dim=-1) if problem.gated else (None, first)
        hidden = activate(problem.activation, gate, up)
        result = _project(hidden, packed, "w2", rows[:-1], expert).float()
        result = torch.where((expert < problem.experts)[:, None], result, 0.0)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        routed = result[back].view(*topk_ids.shape, -1)
        return (routed * topk_weights[..., None]).sum(1).to(x.dtype)


def _project(x: Tensor, packed: Packed, name: str, rows: Tensor, expert: Tensor) -> Tensor:
    y = grouped_product(x, packed[name], packed[f"{name}_scales"], rows)
    bias = packed.tensors.get(f"{name}_bias")
    return y if bias is None else y + bias[expert.clamp(max=bias.shape[0] - 1)]
