"""marlin.vllm: weight-only linear layers by vLLM's Marlin."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_marlin.vllm import locks
from halfbyte_cuda_marlin.vllm.calls import FLOAT4_E2M1F, call
from halfbyte_cuda_marlin.vllm.packing import Repack, pack_matrix, scale_view
from halfbyte_cuda_marlin.vllm.shapes import padded_rows

_GIVEN: Final = ("a", "b_q_weight", "b_scales", "global_scale", "workspace", "size_m", "size_n", "size_k")
#: What every product has in common.
FIXED: Final = {
    "b_type_id": FLOAT4_E2M1F,
    "c_or_none": None,
    "b_bias_or_none": None,
    "a_scales": None,
    "b_zeros_or_none": None,
    # Sums of several blocks meet in float32 and in a fixed order.
    "use_atomic_add": False,
    "use_fp32_reduce": True,
    "is_zp_float": False,
}
_FORMER: Final = {"g_idx_or_none": None, "perm_or_none": None, "is_k_full": True}
#: The kernel loads 16 bytes at a time.
ALIGNMENT: Final = 16


class MarlinVllm:
    """vLLM's `_C::marlin_gemm`. PluginError where vllm is not there, does not load, or is of another kind."""

    def __init__(self) -> None:
        self._gemm = call("_C::marlin_gemm", _GIVEN, FIXED, _FORMER)

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Rearrange the weights on their device: what `packing.pack_matrix` makes, and `locks`."""
        matrix = weights.matrix.padded(padded_rows(problem.n, problem.k), problem.k)
        device = matrix.packed.device
        packed = pack_matrix(matrix, getattr(torch, problem.dtype), Repack(device))
        return {**packed, "locks": locks.make(device)}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n]; sums in float32, in an order that depends on the sizes alone."""
        if x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self.apply(x, packed, bias)
        tensors, codes = packed.tensors, packed["codes"]
        (m, k), n = x.shape, codes.shape[1] // 2
        aligned = x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
        global_scale, rows = tensors.get("global_scale"), tensors.get("rows")
        scales = scale_view(packed["scales"], e8m0=global_scale is None)
        y: Tensor = self._gemm(aligned, codes, scales, global_scale, locks.current(packed["locks"]), m, n, k)
        if rows is not None:
            y.mul_(rows)
        wanted = packed.problem.matrices[0][0]
        return y if wanted == n else y[:, :wanted].contiguous()
