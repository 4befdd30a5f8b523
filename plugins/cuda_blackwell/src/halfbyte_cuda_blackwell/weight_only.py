"""flashinfer.bf16-fp4: linear layers with NVFP4 weights and bfloat16 activations, over `mm_bf16_fp4`."""

from __future__ import annotations

from typing import cast

import flashinfer
import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_blackwell import library, ops
from halfbyte_cuda_blackwell.backends import WEIGHT_ONLY
from halfbyte_cuda_blackwell.packing import float32_on, scale_bytes, swizzle_128x4

_ID = "flashinfer.bf16-fp4"


class Bf16Fp4:
    """The back end follows from the card, and the layout from the back end."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:  # noqa: ARG002
        """`weight` and `scales` as the card's back end wants them, `alpha`: float32 [1], the global scale.

        cudnn keeps codes and linear scales; CuTe DSL on SM12x repacks both, on SM10x it takes codes as they are and a
        6-D view of the swizzled scales, which is kept here in the order of its storage so that it can be saved.
        """
        matrix = weights.matrix
        device = matrix.packed.device
        backend = WEIGHT_ONLY[ops.require_capability(device, WEIGHT_ONLY, _ID)]
        if backend == "cudnn":
            library.require_cudnn(library.CUDNN_WEIGHT_ONLY, _ID)
        weight, scales, alpha = flashinfer.prepare_bf16_fp4_weights(
            matrix.packed.clone(memory_format=torch.contiguous_format),
            swizzle_128x4(scale_bytes(matrix)),
            float32_on(device, cast("Tensor", matrix.global_scale)),
            backend=backend,
            block_size=matrix.format.group_size,
        )
        if scales.element_size() == 1:
            scales = scales.view(torch.uint8)
        if scales.ndim == 6:
            scales = scales.permute(5, 2, 4, 0, 1, 3)
        return {"weight": weight, "scales": scales.contiguous(), "alpha": alpha}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - core adds the bias
        """Return y [M, n]."""
        ((n, _),) = packed.problem.matrices
        result: Tensor = ops.mm_bf16_fp4(x, packed["weight"], packed["scales"], packed["alpha"], n)
        return result
