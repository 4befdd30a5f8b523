"""kernels/wide.cu: many rows of x, on Hopper's warpgroup matrix units."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Final

import torch

from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card
from halfbyte_cuda_marlin.cuda.driver import POINTERS, function
from halfbyte_cuda_marlin.cuda.launcher import Launcher, XMap
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.packing import is_mxfp4

#: Items by (tokens, warpgroups): microseconds of a unit of 128 columns, and of what comes before and after all units,
#: fitted to 680 launches on one H200.
_TIMES: Final = {
    (16, 2): (0.35, 0.4),
    (16, 4): (0.63, 1.2),
    (32, 2): (0.39, 0.6),
    (32, 4): (0.70, 1.4),
    (64, 2): (0.48, 1.0),
    (64, 4): (0.88, 2.2),
    (128, 2): (0.67, 1.9),
    (128, 3): (0.95, 3.9),
    (128, 4): (1.29, 4.0),
    (256, 2): (1.28, 4.7),
}
SHAPES: Final = tuple(_TIMES)
#: Microseconds of exchanging an item's sums.
_EXCHANGE: Final = 2.4
#: How many clusters of each size run at the same time on one H200; some processors have no neighbours left.
_CLUSTERS: Final = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22}
#: Tokens, and units of K, beyond which the large items differ too little for the model.
_MANY: Final = 2048
_LONG: Final = 64
#: All tokens are divided among at most so many items, or into items of 128 and more.
_MOST_TOKEN_TILES: Final = 16
#: Numbers of rows that between them need every kernel: in between, every shape has as many items.
EVERY_KERNEL: Final = (*range(16, 256, 16), *range(256, 512, 32), *range(512, 1024, 64), *range(1024, 2049, 128), 4096)
_MOST_STAGES: Final = 8
#: Rows of x that a CTA of a cluster finishes together, as SLICE in wide.cu.
_SLICE: Final = 16
#: What barriers, and a warp's results on their way out, need of shared memory; and its start that is lost to alignment.
_BARRIERS: Final = 256
_STAGING: Final = 512
_ALIGNMENT: Final = 1024


class _Args(ctypes.Structure):
    _fields_ = (*POINTERS, *((name, ctypes.c_int) for name in ("m", "n", "units", "tiles", "items", "ttiles")))


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work.

    An item is `tokens` rows of x and `groups` x 64 rows of W, cut along K among the CTAs of a `cluster`. A cluster has
    up to `rounds` items, one after the other; `stages` of 128 columns are on their way.
    """

    tokens: int
    groups: int
    cluster: int
    ctas: int
    rounds: int
    stages: int
    items: int
    token_tiles: int
    shared: int


@functools.lru_cache(maxsize=4096)
def plan(m: int, tiles: int, units: int, unit_bytes: int, processors: int) -> Plan:
    """The division for m rows that should take the least time."""
    if m > _MANY:
        return division((256, 2) if units > _LONG else (128, 4), 1, m, tiles, unit_bytes, processors)
    plans = [
        division(shape, cluster, m, tiles, unit_bytes, processors)
        for shape in shapes(m)
        for cluster in _CLUSTERS
        if cluster <= units and _at_once(cluster, processors)
    ]
    return min((plan for plan in plans if _in_step(plan, m)), key=lambda plan: microseconds(plan, units))


def shapes(m: int) -> list[tuple[int, int]]:
    """The shapes (tokens, warpgroups) of items that m rows may be divided into."""
    return [shape for shape in SHAPES if shape[0] >= min(128, m / _MOST_TOKEN_TILES)]


def _in_step(own: Plan, m: int) -> bool:
    """Whether the CTAs of a cluster keep in step: one that finishes no part of an item waits for nobody there.

    Where another item follows, it could arrive at a barrier for that one while another CTA still waits for this one.
    """
    last = m - (own.token_tiles - 1) * own.tokens
    return own.rounds == 1 or -(-last // _SLICE) >= own.cluster


def _at_once(cluster: int, processors: int) -> int:
    """How many clusters run at the same time. If fewer do, the others follow: they do not wait for each other."""
    return _CLUSTERS[cluster] * processors // _CLUSTERS[1]


def division(shape: tuple[int, int], cluster: int, m: int, tiles: int, unit_bytes: int, processors: int) -> Plan:
    """The plan with items of this shape (tokens, warpgroups) and clusters of this size."""
    tokens, groups = shape
    stage = -(-(tokens * 256 + groups * 2 * unit_bytes) // 1024) * 1024
    rest = _ALIGNMENT + _BARRIERS + groups * 4 * _STAGING
    stages = min(_MOST_STAGES, (SHARED_MEMORY - rest) // stage)
    token_tiles = -(-m // tokens)
    items = -(-tiles // (2 * groups)) * token_tiles
    rounds = -(-items // _at_once(cluster, processors))
    ctas = -(-items // rounds) * cluster
    return Plan(tokens, groups, cluster, ctas, rounds, stages, items, token_tiles, rest + stages * stage)


def microseconds(own: Plan, units: int) -> float:
    """What a launch takes, beside what any launch takes."""
    unit, item = _TIMES[own.tokens, own.groups]
    return own.rounds * (-(-units // own.cluster) * unit + item + (_EXCHANGE if own.cluster > 1 else 0))


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
        _Args(*(None,) * len(POINTERS), m, n, units, tiles, own.items, own.token_tiles),
        x_map=XMap((m, k), own.tokens, bf16),
        early=True,
        cluster=own.cluster,
    )
