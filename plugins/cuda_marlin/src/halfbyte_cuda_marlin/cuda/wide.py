"""kernels/wide.cu: many rows of x, on Hopper's warpgroup matrix units."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from halfbyte_cuda_marlin.cuda.cards import Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher, XMap
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: Units of 128 columns on their way, by (tokens of a tile, warpgroups): what fits into shared memory.
_STAGES: Final = {(32, 4): 6, (32, 2): 8, (64, 4): 6, (64, 2): 8, (128, 4): 4, (128, 3): 4, (128, 2): 5, (256, 2): 3}
#: Microseconds of one such unit, measured on one H200.
_UNIT: Final = {
    (32, 4): 0.92,
    (32, 2): 0.54,
    (64, 4): 1.06,
    (64, 2): 0.60,
    (128, 4): 1.53,
    (128, 3): 1.16,
    (128, 2): 0.77,
    (256, 2): 1.36,
}
#: Tokens from which the largest tile is always the best.
_MANY: Final = 2048
_CTAS: Final = 128


class _Args(ctypes.Structure):
    _fields_ = (
        *POINTERS,
        *((name, ctypes.c_int) for name in ("m", "n", "k", "units", "tiles", "blocks", "ttiles")),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work: tiles of `tokens` rows of x and `groups` x 64 rows of W."""

    tokens: int
    groups: int
    stages: int
    ctas: int
    blocks: int
    token_tiles: int
    shared: int


@functools.lru_cache(maxsize=4096)
def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int) -> Plan:
    """The division for m rows that should take the least time."""
    shapes = [(256, 2)] if m > _MANY else list(_STAGES)
    options = (option for shape in shapes for option in _options(m, tiles, units, processors, *shape))
    _, tokens, groups, ctas = min(options)
    stages, stage = _STAGES[tokens, groups], -(-(tokens * 256 + groups * 2 * unit_bytes) // 1024) * 1024
    blocks, token_tiles = -(-tiles // (2 * groups)), -(-m // tokens)
    return Plan(tokens, groups, stages, ctas, blocks, token_tiles, 1024 + stages * (stage + 16))


def _options(
    m: int, tiles: int, units: int, processors: int, tokens: int, groups: int
) -> Iterator[tuple[float, int, int, int]]:
    """(microseconds, tokens, groups, CTAs) of whole items, if they are few enough, and of even shares.

    An item that is cut costs its partial sums, the more CTAs share it; where shares and items begin at different units,
    a CTA has two of them.
    """
    items = -(-tiles // (2 * groups)) * -(-m // tokens)
    even = min(_CTAS, processors, items * units)
    for ctas in (even, items) if items <= processors else (even,):
        share = -(-items * units // ctas)
        cut = 0.0
        if items % ctas:
            cut = 2 + max(2, -(-units // share)) * tokens * groups / 340
            uneven = items * units % ctas or (units % share and share % units)
            cut += 3.5 if uneven else 0
        yield share * _UNIT[tokens, groups] + cut, tokens, groups, ctas


def macros(own: Plan, *, mxfp4: bool, bf16: bool) -> Macros:
    """What wide.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "NTOK": own.tokens, "WGS": own.groups, "STAGES": own.stages}
    return tuple((name, int(value)) for name, value in values.items())


def launcher(
    shape: tuple[int, int, int], weights: tuple[int, int, int], dtype: torch.dtype, device: torch.device, card: Card
) -> Launcher:
    """What computes Y [M, N] = x [M, K] @ W.T * rows + bias for (M, N, K) and units of the shape `weights`."""
    (m, n, k), (tiles, units, unit_bytes), bf16 = shape, weights, dtype == torch.bfloat16
    own = plan(m, tiles, units, unit_bytes, card.processors)
    options = macros(own, mxfp4=is_mxfp4(unit_bytes), bf16=bf16)
    kernel = function("wide", "fp4_wide", device.index or 0, card.arch, options)
    return Launcher(
        kernel,
        device,
        (own.ctas, own.groups * 128 + 128, own.shared),
        _Args(*(None,) * len(POINTERS), m, n, k, units, tiles, own.blocks, own.token_tiles),
        x_map=XMap((m, k), own.tokens, bf16),
        sums=(2 * own.ctas * 64 * own.groups * own.tokens, own.blocks * own.token_tiles),
        early=True,
    )
