"""The built-in linear kernels: dequantize, then an ordinary matrix product in x's dtype."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.reference.packing import KeepDequantized, KeepPacked, Store, keep_input_scale, quantize_input
from halfbyte.weights import LinearWeights


class Reference:
    """Keeps the weights packed and dequantizes them at each call. Parts keep their own global scales."""

    store: ClassVar[type[Store]] = KeepPacked

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Return the tensors of every run of rows with the same global scales: `part0`, `part1`, ...

        CheckpointError naming the layer if NVFP4 activations have no calibrated scale.
        """
        dtype: torch.dtype = getattr(torch, problem.dtype)
        tensors: dict[str, Tensor] = {}
        for index, part in enumerate(weights.matrix.parts()):
            name = f"part{index}"
            tensors |= self.store.keep(name, part, dtype) | keep_input_scale(name, part, problem.scheme)
        return tensors

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n] for x [M, k]; x is quantized once for each part if the scheme quantizes activations."""
        results: list[Tensor] = []
        start = 0
        while (name := f"part{len(results)}") in packed.tensors:
            weight = self.store.weight(packed, name, x.dtype)
            stop = start + weight.shape[0]
            part_bias = None if bias is None else bias[start:stop]
            results.append(F.linear(quantize_input(x, packed, name), weight, part_bias))
            start = stop
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


class Dequantized(Reference):
    """Keeps the weights in the compute dtype: the same numbers, more memory, less time."""

    store: ClassVar[type[Store]] = KeepDequantized
