"""Weights as torch's scaled_mm takes them on an Intel GPU: not swizzled, not padded."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.matrix import Matrix
from halfbyte.reference.packing import keep_input_scale
from halfbyte.schemes import Scheme


def pack_linear(matrix: Matrix, scheme: Scheme) -> dict[str, Tensor]:
    """`weight` uint8 [N, K/2] and `scales` uint8 [N, K/group] as stored; for NVFP4 the global scales in float32 [1].

    CheckpointError naming the layer if NVFP4 activations have no calibrated scale.
    """
    tensors = {
        "weight": matrix.packed.clone(memory_format=torch.contiguous_format),
        "scales": matrix.scales.view(torch.uint8).clone(memory_format=torch.contiguous_format),
    }
    tensors |= keep_input_scale("x", matrix, scheme)
    for name, scale in (("global_scale", matrix.global_scale), ("x_global_scale", matrix.input_global_scale)):
        if scale is not None:
            tensors[name] = scale.to(torch.float32).to(matrix.packed.device)
    return tensors
