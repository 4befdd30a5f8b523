"""The built-in experts kernels: one expert after the other, each projection with its own scales."""

from __future__ import annotations

from typing import ClassVar, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.matrix import same_scale
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.activations import activate
from halfbyte.reference.packing import (
    KeepDequantized,
    KeepPacked,
    Store,
    keep_input_scale,
    quantize_input,
)
from halfbyte.weights import ExpertsWeights

#: Present where gate and up have the same input scale: gate's quantized input serves both.
_ONE_INPUT: Final = "one_input"


class Reference:
    """Keeps the weights packed and dequantizes those of one expert at a time."""

    store: ClassVar[type[Store]] = KeepPacked

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Return the tensors of `gate` (if there is one), `up` and `down`, biases in the problem's dtype.

        CheckpointError naming the layer if NVFP4 activations have no calibrated scale.
        """
        dtype: torch.dtype = getattr(torch, problem.dtype)
        gate, up = weights.gate, weights.up
        named = {**({} if gate is None else {"gate": gate}), "up": up, "down": weights.down}
        tensors: dict[str, Tensor] = {}
        for name, matrix in named.items():
            tensors |= self.store.keep(name, matrix, dtype)
            if matrix.bias is not None:
                tensors[f"{name}_bias"] = matrix.bias.detach().to(dtype, copy=True)
            tensors |= keep_input_scale(name, matrix, problem.scheme)
        if gate is not None and same_scale(gate.input_global_scale, up.input_global_scale):
            # A mark without bytes. Up's own scale is kept all the same: what is resident never depends on numbers.
            tensors[_ONE_INPUT] = torch.empty(0, device=up.packed.device)
        return tensors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]: the weighted outputs of each token's experts, summed in float32."""
        local = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        # In a CUDA graph nothing may depend on where tokens go: every expert then computes all of them.
        capturing = _capturing(x)
        count = packed["up"].shape[0]
        hit = range(count) if capturing else [e for e in torch.unique(local).tolist() if 0 <= e < count]
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in hit:
            routed = local == expert
            weight = torch.where(routed, topk_weights, 0.0).sum(1, keepdim=True)
            chosen = routed.any(1)
            if capturing:
                y += torch.where(chosen[:, None], weight * self._expert(x, packed, expert).float(), 0.0)
            else:
                rows = chosen.nonzero().squeeze(1)
                y[rows] += weight[rows] * self._expert(x[rows], packed, expert).float()
        return y.to(x.dtype)

    def _expert(self, x: Tensor, packed: Packed, expert: int) -> Tensor:
        """The output [rows, H] of one expert for all of x [rows, H]."""
        problem = cast("ExpertsProblem", packed.problem)
        first = quantize_input(x, packed, "gate" if problem.gated else "up", expert)
        gate = self._project(first, packed, "gate", expert) if problem.gated else None
        if problem.gated and _ONE_INPUT not in packed.tensors:
            first = quantize_input(x, packed, "up", expert)
        up = self._project(first, packed, "up", expert)
        hidden = activate(problem.activation, gate, up)
        return self._project(quantize_input(hidden, packed, "down", expert), packed, "down", expert)

    def _project(self, x: Tensor, packed: Packed, name: str, expert: int) -> Tensor:
        bias = packed.tensors.get(f"{name}_bias")
        weight = self.store.weight(packed, name, x.dtype, expert)
        return F.linear(x, weight, None if bias is None else bias[expert])


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Dequantized(Reference):
    """Keeps the weights in the compute dtype: the same numbers, more memory, less time."""

    store: ClassVar[type[Store]] = KeepDequantized
