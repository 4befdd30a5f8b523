"""The contract of vllm-xpu-kernels' mixture of experts, on a CPU: its operators, and XpuFusedMoe over them.

Strict where the device would corrupt silently; see vllm_linear.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte_xpu.testing import numbers
from halfbyte_xpu.testing.vllm_linear import check

_TOP_K = (1, 2, 4, 6, 7, 8, 10, 16)
_HALVES = (torch.bfloat16, torch.float16)


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    d: Tensor,
    rows_per_expert: Tensor,
    n: int,
    k: int,
    num_experts: int,
) -> Tensor:
    """Write D: rows of A by expert, times weights rounded to A's dtype. What is not computed is NaN."""
    check(n % 8 == 0, "N must be a multiple of 8")
    if a_scale is not None or b_scale is None or b.dtype != torch.float4_e2m1fn_x2:
        raise RuntimeError("strict: not the MXFP4 recipe")
    check(all(t.is_contiguous() for t in (a, b, b_scale, d)), "tensors must be contiguous")
    check(tuple(b.shape) == (num_experts, n, k // 2), f"ptr_B is {list(b.shape)}")
    check(tuple(b_scale.shape) == (num_experts, n, k // 32), f"ptr_scales is {list(b_scale.shape)}")
    check(a.shape[1] == k and tuple(d.shape) == (a.shape[0], n), f"ptr_A is {list(a.shape)}, ptr_D {list(d.shape)}")
    check(a.dtype in _HALVES, f"strict: ptr_A is {a.dtype}, and nothing would be launched")
    check(d.dtype == a.dtype, f"strict: ptr_D is {d.dtype}")
    check(b_scale.element_size() == 1, f"strict: scales are {b_scale.dtype}")
    check(rows_per_expert.dtype == torch.int32, f"strict: rows_per_expert is {rows_per_expert.dtype}")
    check(tuple(rows_per_expert.shape) == (num_experts,), f"rows_per_expert is {list(rows_per_expert.shape)}")
    check(int(rows_per_expert.sum()) <= a.shape[0], "strict: more rows than there are")
    if bias is not None:
        check(tuple(bias.shape) == (num_experts, n), f"ptr_bias is {list(bias.shape)}")
        check(bias.dtype == a.dtype, f"strict: ptr_bias is {bias.dtype} beside {a.dtype}")
        check(bias.is_contiguous(), "strict: ptr_bias is not contiguous")
    d.fill_(float("nan"))
    start = 0
    for expert, rows in enumerate(rows_per_expert.tolist()):
        here = slice(start, start + rows)
        weight = _weight(b[expert], b_scale[expert], a.dtype)
        y = a[here].float() @ weight.t()
        d[here] = (y if bias is None else y + bias[expert].float()).to(d.dtype)
        start += rows
    return d


def _weight(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale is cast first, then the product; code 0 stands for zero."""
    codes = scales.view(torch.uint8)
    scale = torch.where(codes == 0, 0.0, numbers.e8m0(codes)).to(dtype).float()
    return numbers.scaled(numbers.decode(packed), scale).to(dtype).float()


def remap_hidden_states(
    hidden_states: Tensor,
    hidden_states_scales: Tensor | None,
    remapped: Tensor,
    remapped_scales: Tensor | None,
    expert_map: Tensor | None,
    rows_per_expert: Tensor,
    places: Tensor,
    topk_ids: Tensor,
    total_experts_num: int,
    local_experts_num: int,
) -> None:
    """Write rows in the order of their local experts, how many each has, and where each token's rows went (or -1)."""
    tokens, top_k = topk_ids.shape
    check(hidden_states.dtype == remapped.dtype, "hidden_states and remapped_hidden_states must have save dtype")
    check(hidden_states_scales is None and remapped_scales is None, "strict: activations are not quantized here")
    check(expert_map is None or expert_map.dtype == torch.int32, "expert_map must be int32")
    check(rows_per_expert.dtype == torch.int32, "rows_per_expert must be int32")
    check(topk_ids.dtype in (torch.int32, torch.int64), "topk_ids must be int64 or int32")
    shape = (hidden_states.shape[0] * top_k, hidden_states.shape[1])
    check(tuple(remapped.shape) == shape, "remapped_hidden_states must be [num_rows * TopK, hidden_size]")
    check(expert_map is None or expert_map.shape[0] == total_experts_num, "expert_map must be [total_experts_num]")
    check(rows_per_expert.shape[0] == local_experts_num, "rows_per_expert must be [local_experts_num]")
    check(tokens == hidden_states.shape[0], "topk_ids must be [num_rows, TopK]")
    check(top_k in _TOP_K, "Unsupported TopK value")
    check(local_experts_num <= 1024, "local_experts_num exceeds the maximum supported number")
    check(hidden_states.shape[1] % (16 // hidden_states.element_size()) == 0, "hidden_size must be divisible")
    inside = bool(((topk_ids >= 0) & (topk_ids < total_experts_num)).all())
    check(inside, "strict: an expert number is outside the map")
    check(not bool(rows_per_expert.any()), "strict: rows_per_expert is not zeroed")
    local = (topk_ids if expert_map is None else expert_map[topk_ids.long()]).flatten().tolist()
    check(all(-1 <= expert < local_experts_num for expert in local), "strict: a local number is out of range")
    remapped.fill_(float("nan"))
    flat, place = places.view(-1), 0
    flat.fill_(-1)
    for expert in range(local_experts_num):
        for slot in (slot for slot, own in enumerate(local) if own == expert):
            remapped[place] = hidden_states[slot // top_k]
            flat[slot] = place
            rows_per_expert[expert] += 1
            place += 1


def moe_gather(output: Tensor, rows: Tensor, topk_weights: Tensor, places: Tensor, num_experts: int) -> None:  # noqa: ARG001 - the vendor's signature
    """Write each token's weighted sum, in float32; -1 adds nothing."""
    check(topk_weights.dtype == torch.float32, "topk_weights must be float32")
    check(topk_weights.is_contiguous() and output.is_contiguous(), "strict: tensors are read by their addresses")
    local = places >= 0
    chosen = rows[places.clamp(min=0).long()].float() * topk_weights.unsqueeze(-1)
    output.copy_(torch.where(local.unsqueeze(-1), chosen, 0.0).sum(1))


def silu_and_mul(result: Tensor, x: Tensor) -> None:
    """[gate | up] halves."""
    gate, up = x.float().chunk(2, dim=-1)
    result.copy_(F.silu(gate) * up)


def gelu_tanh_and_mul(out: Tensor, x: Tensor) -> None:
    """[gate | up] halves."""
    gate, up = x.float().chunk(2, dim=-1)
    out.copy_(F.gelu(gate, approximate="tanh") * up)


def swigluoai_and_mul(out: Tensor, x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    """Gate and up alternate, gate first."""
    gate, up = x.float()[..., 0::2].clamp(max=limit), x.float()[..., 1::2].clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


def relu2_no_mul(out: Tensor, x: Tensor) -> None:
    """No gate."""
    out.copy_(F.relu(x.float()).square())


class XpuFusedMoe:
    """The class of vllm_xpu_kernels.fused_moe_interface, for MXFP4 weights without quantized activations."""

    def __init__(
        self,
        w13: Tensor,
        w13_scales: Tensor,
        w13_bias: Tensor | None,
        w2: Tensor,
        w2_scales: Tensor,
        w2_bias: Tensor | None,
        n_experts_per_token: int,
        activation: str,
        num_experts: int,
        *,
        expert_map: Tensor | None = None,
    ) -> None:
        check(w13.is_contiguous() and w2.is_contiguous(), "weights must be contiguous")
        check(w13.dtype != torch.uint8, "strict: uint8 means INT4 here, and would be rewritten in place")
        self.w13, self.w13_scales, self.w13_bias = w13, w13_scales, w13_bias
        self.w2, self.w2_scales, self.w2_bias = w2, w2_scales, w2_bias
        self.top_k, self.experts, self.expert_map = n_experts_per_token, num_experts, expert_map
        self.activate = {
            "silu": torch.ops._C.silu_and_mul,
            "gelu_tanh": torch.ops._C.gelu_tanh_and_mul,
            "swigluoai": torch.ops._C.swigluoai_and_mul,
            "relu2_no_mul": torch.ops._C.relu2_no_mul,
        }[activation]
        self.total = num_experts if expert_map is None else expert_map.shape[0]

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
    ) -> None:
        """Write the experts' weighted outputs [T, H] into `output`."""
        tokens, hidden = hidden_states.shape
        rows = tokens * self.top_k
        x = hidden_states.new_empty(rows, hidden)
        counts = torch.zeros(self.experts, dtype=torch.int32)
        places = torch.empty(tokens, self.top_k, dtype=torch.int32)
        torch.ops._moe_C.remap_hidden_states(
            hidden_states, None, x, None, expert_map, counts, places, topk_ids, self.total, self.experts
        )
        gemm = torch.ops._xpu_C.cutlass_grouped_gemm_interface
        first = x.new_empty(rows, self.w13.shape[1])
        gemm(x, None, self.w13, self.w13_scales, self.w13_bias, first, counts, first.shape[1], hidden, self.experts)
        inner = self.w2.shape[2] * 2
        middle = x.new_empty(rows, inner)
        self.activate(middle, first)
        second = x.new_empty(rows, hidden)
        gemm(middle, None, self.w2, self.w2_scales, self.w2_bias, second, counts, hidden, inner, self.experts)
        torch.ops._moe_C.moe_gather(output, second, topk_weights, places, self.experts)
