"""y = x @ W.T, with W dequantized by table look-up, a block of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from outsider_fp4.packing import pack

#: Rows of W that are dequantized at once: small enough for a cache, large enough for a matrix product.
BLOCK = 256


class LookUpTable:
    """The kernel `outsider.lut`. Core pads N and K, adds the bias, and handles all other shapes of x."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:  # noqa: ARG002 - not needed
        """Return the tensors that `apply` is given again; copies, so that the weights may be freed."""
        return pack(weights.matrix)

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - core adds it
        """Return y [M, N] for x [M, K]."""
        values, scales, pairs = packed["values"], packed["scales"], packed["pairs"]
        y = x.new_empty(x.shape[0], values.shape[0])
        for start in range(0, values.shape[0], BLOCK):
            block = slice(start, start + BLOCK)
            weight = F.embedding(values[block].int(), pairs).reshape(*scales[block].shape, -1)
            weight = (weight * scales[block, :, None]).flatten(1).to(x.dtype)
            torch.matmul(x, weight.T, out=y[:, block])
        return y
