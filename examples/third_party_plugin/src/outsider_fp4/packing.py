"""The kernel's own form of weights: packed values as they are, and one float32 scale for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import E2M1_VALUES
from halfbyte.matrix import Matrix


def pack(matrix: Matrix) -> dict[str, Tensor]:
    """Return `values` uint8 [N, K/2], `scales` float32 [N, K/group] with the global scale in them, and `pairs`."""
    scales = matrix.scales.float()
    if matrix.format.scale == "e8m0":  # stored as the exponents of powers of two
        scales = torch.exp2(scales - 127)
    rows = matrix.row_global_scales()
    if rows is not None:
        scales = (scales.double() * rows.to(scales.device)[:, None]).float()
    return {"values": matrix.packed.clone(), "scales": scales, "pairs": pair_table()}


def pair_table() -> Tensor:
    """Return the two numbers of every byte: float32 [256, 2], the low nibble first."""
    numbers = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    codes = torch.arange(256)
    return torch.stack((numbers[codes % 16], numbers[codes // 16]), dim=1)
