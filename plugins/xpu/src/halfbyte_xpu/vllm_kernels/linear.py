"""xpu.fp4-gemm: MXFP4 weights and activations, by oneDNN through vllm-xpu-kernels."""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_xpu.vllm_kernels import ops
from halfbyte_xpu.vllm_kernels.library import load
from halfbyte_xpu.vllm_kernels.packing import pack_linear
from halfbyte_xpu.vllm_kernels.schemas import LINEAR_OPS


class Fp4Gemm:
    """Quantizes activations to MXFP4 at each call. PluginError if the installed library lacks an operator."""

    def __init__(self) -> None:
        load(LINEAR_OPS)

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:  # noqa: ARG002 - a kernel
        """Return `weight` and `scales`; see packing.py."""
        return pack_linear(weights.matrix)

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n] in x's dtype; bias is added in float32, before the one rounding."""
        values, scales = ops.quantize_mxfp4(x)
        y: Tensor = ops.fp4_gemm(values, scales, packed["weight"], packed["scales"], bias, x.dtype)
        return y
