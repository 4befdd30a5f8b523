"""Sizes that Marlin takes; its tiles of threads need (N % 64, K % 128) or (N % 128, K % 64). Torch-free."""

from __future__ import annotations

from typing import Final

from halfbyte.problems import round_up

#: Of all ranks: moe_align_block_size counts them with one block of 1024 threads, in whole warps.
MAX_EXPERTS: Final = 992


def padded_rows(n: int, k: int) -> int:
    """Rows of a matrix whose n and k are multiples of 64, as Marlin takes it."""
    return round_up(n, 64 if k % 128 == 0 else 128)


def padded_intermediate(hidden: int, intermediate: int) -> int:
    """The intermediate size of experts, both sizes multiples of 64: it is K of the down projection, hidden its N."""
    return round_up(intermediate, 64 if hidden % 128 == 0 else 128)
