"""marlin.vllm: weight-only experts by vLLM's Marlin, in the chain of operators that vLLM itself runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_marlin.vllm import locks
from halfbyte_cuda_marlin.vllm.activations import Activations, interleaves
from halfbyte_cuda_marlin.vllm.calls import call
from halfbyte_cuda_marlin.vllm.linear import ALIGNMENT, FIXED
from halfbyte_cuda_marlin.vllm.packing import Repack, pack_matrix, permuted_bias, scale_view
from halfbyte_cuda_marlin.vllm.routing import Router, Routing
from halfbyte_cuda_marlin.vllm.shapes import padded_intermediate

_GIVEN: Final = (
    *("a", "b_q_weight", "b_bias_or_none", "b_scales", "global_scale", "workspace"),
    *("sorted_token_ids", "expert_ids", "num_tokens_past_padded", "topk_weights"),
    *("moe_block_size", "top_k", "mul_topk_weights", "size_m", "size_n", "size_k"),
)
#: Its own choice of tiles.
_TILES: Final = {"thread_k": -1, "thread_n": -1, "blocks_per_sm": -1}
_FORMER: Final = {"g_idx_or_none": None, "perm_or_none": None, "is_full_k": True}


class MarlinVllmExperts:
    """vLLM's `_moe_C::moe_wna16_marlin_gemm` twice, with sorting before, the activation between and a sum after.

    PluginError where vllm is not there, does not load, or is of another kind.
    """

    def __init__(self) -> None:
        self._gemm = call("_moe_C::moe_wna16_marlin_gemm", _GIVEN, {**FIXED, **_TILES}, _FORMER)
        self._activate, self._router = Activations(), Router()

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Rearrange the weights on their device, expert by expert, the intermediate size padded as Marlin needs it.

        `up_codes`, `down_codes` and so on: what `packing.pack_matrix` makes, stacked; `up_bias`, `down_bias`; `locks`.
        """
        dtype, device = getattr(torch, problem.dtype), weights.up.packed.device
        repack, packed = Repack(device), {"locks": locks.make(device)}
        for expert, pair in enumerate(_matrices(weights, problem)):
            for name, matrix in zip(("up", "down"), pair, strict=True):
                tensors = pack_matrix(matrix, dtype, repack)
                if matrix.bias is not None:
                    bias = matrix.bias[0].to(dtype)
                    # Beside a global scale vLLM 0.26 multiplies the bias by it too, so it is added afterwards.
                    tensors["bias"] = bias if "global_scale" in tensors else permuted_bias(bias)
                for key, tensor in tensors.items():
                    stack = packed.get(f"{name}_{key}")
                    if stack is None:  # where only some experts have `rows`, those of the others are 1
                        stack = packed[f"{name}_{key}"] = tensor.new_ones(problem.experts, *tensor.shape)
                    stack[expert] = tensor
        return packed

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]; products sum in float32, in an order that depends on the routing alone."""
        if x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self.apply(x, packed, topk_ids, topk_weights, expert_map)
        problem: Any = packed.problem
        aligned = x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
        routing = self._router.route(topk_ids, problem.experts, expert_map)
        slots = _Slots(packed, topk_ids, expert_map)
        values = self._product("up", aligned, packed, routing, topk_weights)
        slots.finish("up", values, None)
        values = self._activate(problem.activation, values)
        values = self._product("down", values, packed, routing, topk_weights)
        slots.finish("down", values, topk_weights)
        return self._router.sum(values, topk_ids, expert_map)

    def _product(self, name: str, x: Tensor, packed: Packed, routing: Routing, topk_weights: Tensor) -> Tensor:
        """[slots, N]: rows of tokens with the experts of their slots, or rows of slots, times the routing weights."""
        tensors, codes = packed.tensors, packed[f"{name}_codes"]
        global_scale, last = tensors.get(f"{name}_global_scale"), name == "down"
        bias = tensors.get(f"{name}_bias") if global_scale is None else None
        result: Tensor = self._gemm(
            x,
            codes,
            bias,
            scale_view(packed[f"{name}_scales"], e8m0=global_scale is None),
            global_scale,
            locks.current(packed["locks"]),
            routing.slots,
            routing.experts,
            routing.count,
            topk_weights,
            routing.block,
            1 if last else topk_weights.shape[1],
            last,
            x.shape[0],
            codes.shape[2] // 2,
            x.shape[1],
        )
        return result


def _matrices(weights: ExpertsWeights, problem: ExpertsProblem) -> Iterator[tuple[Matrix, Matrix]]:
    """(gate and up as one matrix, down) of each expert, as stacks of one."""
    hidden, intermediate = problem.hidden, padded_intermediate(problem.hidden, problem.intermediate)
    order: Literal["interleaved", "gate-up"] = "interleaved" if interleaves(problem.activation) else "gate-up"
    for expert in range(problem.experts):
        one = ExpertsWeights(
            scheme=weights.scheme,
            gate=None if weights.gate is None else _one(weights.gate, expert).padded(intermediate, hidden),
            up=_one(weights.up, expert).padded(intermediate, hidden),
            down=_one(weights.down, expert).padded(hidden, intermediate),
        )
        yield one.fused_gate_up(order), one.down


def _one(matrix: Matrix, expert: int) -> Matrix:
    own = slice(expert, expert + 1)
    return replace(
        matrix,
        packed=matrix.packed[own],
        scales=matrix.scales[own],
        bias=None if matrix.bias is None else matrix.bias[own],
        global_scale=None if matrix.global_scale is None else matrix.global_scale[own],
        input_global_scale=None if matrix.input_global_scale is None else matrix.input_global_scale[own],
    )


@dataclass(slots=True)
class _Slots:
    """What the kernel leaves to be done with the results of every slot; nothing for most layers."""

    packed: Packed
    topk_ids: Tensor
    expert_map: Tensor | None

    def finish(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        """Multiply by `rows`, add biases, in place; `values` are those of the slots times their weights, if any."""
        tensors = self.packed.tensors
        rows, bias = tensors.get(f"{name}_rows"), tensors.get(f"{name}_bias")
        if rows is not None:
            values.mul_(rows.index_select(0, self._experts()))
        if bias is not None and f"{name}_global_scale" in tensors:
            own = bias.index_select(0, self._experts())
            values.add_(own if weights is None else own * weights.view(-1, 1).to(own.dtype))

    def _experts(self) -> Tensor:
        """The (local) expert of every slot; that of slots for other ranks does not matter."""
        ids = self.topk_ids.view(-1)
        return ids if self.expert_map is None else self.expert_map.index_select(0, ids).clamp_(min=0)
