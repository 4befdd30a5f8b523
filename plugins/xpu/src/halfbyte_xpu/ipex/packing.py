"""Weights as intel-extension-for-pytorch's XeTLA kernels take them.

Source: what its own test of mm_mxfp4_out_marlin (v2.9.10+xpu) does with weights: words of 8 codes along K, in an order
of their own.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from halfbyte.matrix import Matrix

#: The code of a word's 8 along K that each of its nibbles holds, the lowest first.
NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


def pack(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Return int32 [..., K/8, N] and E8M0 codes uint8 [..., K/32, N], contiguous, of a matrix or a stack of them."""
    words = matrix.packed.contiguous().view(torch.int32).transpose(-1, -2)
    shuffled = torch.zeros_like(words, memory_format=torch.contiguous_format)
    for place, source in enumerate(NIBBLES):
        shuffled |= (words >> (4 * source) & 0xF) << (4 * place)
    return shuffled, matrix.scales.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
