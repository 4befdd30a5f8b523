"""Linear layers with weights and activations in FP4, over FlashInfer's `mm_fp4`: one class for each back end."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.formats import E2M1_MAX, E4M3_MAX
from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_blackwell import library, ops
from halfbyte_cuda_blackwell.backends import BACKENDS, Backend
from halfbyte_cuda_blackwell.packing import float32_on, scale_bytes, shuffled_rows, swizzle_128x4

#: x / decode fills the range of E4M3 scales times E2M1 values.
_RANGE = E4M3_MAX * E2M1_MAX
#: Below this largest magnitude x counts as this small: the reciprocal stays finite.
_SMALLEST_AMAX = 2.0**-100


class _MmFp4:
    """What the back ends share. The back end is chosen once, with the kernel: each has a layout of its own."""

    backend: ClassVar[Backend]

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """`weight`: codes, uint8 [N, K/2]; `scales`: swizzled, uint8 [round_up(N, 128), round_up(K/group, 4)].

        `alpha`: float32 [1], what the product is multiplied by; `encode`: float32 [1], what x is multiplied by, where
        its scale is calibrated. Without that, both are completed by x's largest magnitude at each call.
        PluginError if the library around the back end is too old.
        """
        matrix, own = weights.matrix, self.backend
        device = matrix.packed.device
        capability = ops.require_capability(device, own.capabilities, self._id)
        self._check_library(problem, capability)
        codes, scales = matrix.packed, scale_bytes(matrix)
        if own.shuffles:
            codes, scales = shuffled_rows(codes), shuffled_rows(scales)
        else:
            codes = codes.clone(memory_format=torch.contiguous_format)
        return {"weight": codes, "scales": swizzle_128x4(scales), **_factors(matrix, device)}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - core adds the bias
        """Return y [M, n]; x is quantized here, in the scheme's format."""
        own, fmt = self.backend, packed.problem.scheme.weights
        tile, alpha, encode = own.tile(x.shape[0]), packed["alpha"], packed.tensors.get("encode")
        if encode is None and fmt.has_global_scale:
            amax = x.abs().amax().to(torch.float32).clamp(min=_SMALLEST_AMAX).reshape(1)
            # Quotients of tensors: with a Python number torch multiplies by a reciprocal, which moves scales off ties.
            whole = torch.full_like(amax, _RANGE)
            alpha, encode = alpha * (amax / whole), whole / amax
        codes, scales = ops.quantize(x, encode, tile)
        result: Tensor = ops.mm_fp4(
            codes, scales, packed["weight"], packed["scales"], alpha, own.name, fmt.group_size, tile, x.dtype
        )
        return result

    @property
    def _id(self) -> str:
        return f"flashinfer.{self.backend.name}"

    def _check_library(self, problem: LinearProblem, capability: int) -> None:
        """Raise PluginError if what is around the back end cannot run the problem."""


class Cutlass(_MmFp4):
    """CUTLASS, compiled by nvcc at first use."""

    backend = BACKENDS["cutlass"]


class Cudnn(_MmFp4):
    """cuDNN graphs, one for each number of rows."""

    backend = BACKENDS["cudnn"]

    def _check_library(self, problem: LinearProblem, capability: int) -> None:
        mxfp4_on_sm12x = capability >= 120 and not problem.scheme.weights.has_global_scale
        library.require_cudnn(library.CUDNN_MXFP4_SM12X if mxfp4_on_sm12x else library.CUDNN_FP4, self._id)


class Trtllm(_MmFp4):
    """TensorRT-LLM's kernels, fetched as binaries; rows shuffled for its epilogue, small tiles for few rows."""

    backend = BACKENDS["trtllm"]


class CuteDsl(_MmFp4):
    """Kernels in CuTe DSL, compiled in a second at first use."""

    backend = BACKENDS["cute-dsl"]


class B12x(_MmFp4):
    """Kernels in CuTe DSL for warp-level instructions."""

    backend = BACKENDS["b12x"]

    def _check_library(self, problem: LinearProblem, capability: int) -> None:  # noqa: ARG002
        library.require_cuda(*((12, 9) if problem.scheme.weights.has_global_scale else (13, 0)), self._id)


def _factors(matrix: Matrix, device: torch.device) -> dict[str, Tensor]:
    """`alpha`, and `encode` where activations are calibrated; made in float64, rounded once."""
    alpha = torch.ones(1, dtype=torch.float64) if matrix.global_scale is None else matrix.global_scale.to(torch.float64)
    if matrix.input_global_scale is None:
        return {"alpha": float32_on(device, alpha)}
    own = matrix.input_global_scale.to(torch.float64)
    return {"alpha": float32_on(device, alpha * own), "encode": float32_on(device, own.reciprocal())}
