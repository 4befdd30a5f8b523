"""Which kernels compute a layer's result for a number of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda import pair, small, wide
from halfbyte_cuda_marlin.cuda.cards import Card
from halfbyte_cuda_marlin.cuda.cards import card as card_of
from halfbyte_cuda_marlin.cuda.dense import Dense

#: Computes y [M, N] from x [M, K], units, rows, bias and memory for y, on the current device.
Path: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]

#: On Hopper: rows up to which pairs are always faster than the matrix units of warpgroups, where they can be had.
_FEW: Final = 16
#: Rows up to which one CTA for each block is, where pairs cannot be had.
_FEW_ALONE: Final = 8
#: Numbers of rows that between them need every kernel that a layer can need.
EVERY_KERNEL: Final = (1, 2, 8, 9, 16, 17, 24, 25, *wide.EVERY_KERNEL)
#: Without Hopper's matrix units: where 16 rows at a time read no fewer bytes than dequantizing first.
_MOST_IN_SLICES: Final = 64


@functools.lru_cache(maxsize=4096)
def path(
    shape: tuple[int, int, int],
    weights: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    arch: str | None,
) -> Path:
    """The way for (M, N, K) and units of the shape `weights`; on Hopper switched where one H200 measured faster.

    `arch`: what to compile for, by default the card's own.
    """
    m, (tiles, units, unit_bytes) = shape[0], weights
    card = card_of(device.index or 0, arch)
    if not card.warpgroups:
        if m <= small.MOST_ROWS:
            return small.launcher(shape, weights, dtype, device, card)
        if m <= _MOST_IN_SLICES:
            return _slices(shape, weights, dtype, device, card)
        return Dense(shape, weights, dtype, device, card)
    paired = pair.plan(m, tiles, units, unit_bytes, card.processors, card.shared) if m <= pair.MOST_ROWS else None
    if paired is not None and (m <= _FEW or _faster(paired, m, weights, card)):
        return pair.launcher(paired, shape, weights, dtype, device, card)
    if m <= _FEW_ALONE:
        return small.launcher(shape, weights, dtype, device, card)
    return wide.launcher(shape, weights, dtype, device, card)


def _faster(paired: pair.Plan, m: int, weights: tuple[int, int, int], card: Card) -> bool:
    """Whether pairs should take less time than warpgroups."""
    units = weights[1]
    return pair.microseconds(paired, m, units) < wide.microseconds(wide.plan(m, *weights, card.processors), units)


def _slices(
    shape: tuple[int, int, int], weights: tuple[int, int, int], dtype: torch.dtype, device: torch.device, card: Card
) -> Path:
    """The kernel for few rows, called for 16 after 16 of them."""
    m, n, k = shape
    starts = range(0, m, small.MOST_ROWS)
    parts = [
        (slice(start, start + rows), small.launcher((rows, n, k), weights, dtype, device, card))
        for start, rows in ((start, min(small.MOST_ROWS, m - start)) for start in starts)
    ]

    def run(x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor) -> None:
        for part, launch in parts:
            launch(x[part], units, rows, bias, y[part])

    return run
