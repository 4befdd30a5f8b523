"""kernels/experts_wide.cu: experts with many rows each, on Hopper's warpgroup matrix units."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda import routing as routing_
from halfbyte_cuda_marlin.cuda.driver import function, launch, pointers, tensor_map
from halfbyte_cuda_marlin.cuda.nvrtc import Macros
from halfbyte_cuda_marlin.cuda.routing import Routing

#: Rows of x by which matrix instructions grow with a block.
STEP: Final = 16


@dataclass(frozen=True, slots=True)
class _Shape:
    """An item is up to a block's rows of x and `groups` x 64 rows of W; `stages` of 128 columns are on their way."""

    groups: int
    stages: int
    buffers: int = 2


#: What fits shared memory and registers, by rows of a block; what is best for most weights first.
SHAPES: Final = {
    64: (_Shape(4, 6), _Shape(2, 8)),
    96: (_Shape(4, 5, 1), _Shape(2, 6)),
    160: (_Shape(3, 4, 1), _Shape(2, 4)),
    192: (_Shape(3, 3), _Shape(2, 3)),
}
#: The most rows that an expert has on average, and the block that is then fastest on one H200.
_BLOCKS: Final = ((44, 64), (72, 96), (135, 160), (1 << 30, 192))
#: How much longer a warpgroup takes that shares x with only one other.
_FEW_GROUPS: Final = 1.08
#: Shared memory in which a warpgroup turns 16 tokens x 64 results.
_STAGING_BYTES: Final = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch divides the work; `parts` are of an expert's weights, `groups` x 64 rows each."""

    block: int
    groups: int
    stages: int
    buffers: int
    ctas: int
    parts: int
    shared: int


@functools.lru_cache(maxsize=4096)
def plan(slots: int, experts: int, block: int | None, tiles: int, units: int, unit_bytes: int, processors: int) -> Plan:
    """The division for `slots` rows of x that go to `experts`, whose weights are `tiles` x `units` each.

    Blocks have the size that these weights like best, or `block`, which another plan has chosen.
    """
    del units  # items are whole along K
    average = slots / experts
    rows = block or next(rows for most, rows in _BLOCKS if average <= most)
    blocks = min(slots, experts) * max(1, round(average / rows + 0.25))

    def rounds(shape: _Shape) -> float:
        """Time of the processor with the most items, in warpgroups."""
        items = blocks * -(-tiles // (2 * shape.groups))
        return -(-items // processors) * shape.groups * (_FEW_GROUPS if shape.groups == 2 else 1)

    shape = min(SHAPES[rows], key=rounds)
    parts = -(-tiles // (2 * shape.groups))
    ctas = min(processors, routing_.most_blocks(slots, experts, rows) * parts)
    stage = -(-(rows * 256 + shape.groups * 2 * unit_bytes) // 1024) * 1024
    shared = 1024 + shape.stages * (stage + 24) + shape.groups * shape.buffers * _STAGING_BYTES
    return Plan(rows, shape.groups, shape.stages, shape.buffers, ctas, parts, shared)


def macros(own: Plan, *, mxfp4: bool, bf16: bool, act: int) -> Macros:
    """What experts_wide.cu is compiled for."""
    values = {"FMT": mxfp4, "BF16": bf16, "ACT": act, "NTOK": own.block, "NSTEP": STEP, "WGS": own.groups}
    return (*((name, int(value)) for name, value in values.items()), ("STAGES", own.stages), ("BUFFERS", own.buffers))


def load(own: Plan, device: torch.device, *, mxfp4: bool, bf16: bool, act: int) -> ctypes.c_void_p:
    """The kernel for this plan on a device, compiled if need be. `act`: as in kernels/experts.cuh."""
    values = macros(own, mxfp4=mxfp4, bf16=bf16, act=act)
    return function("experts_wide", "fp4_experts_wide", device.index or 0, "sm_90a", values)


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "row_mult", "bias", "y", "count", "blocks", "ticket")),
        *((name, ctypes.c_int) for name in ("n", "units", "tiles", "parts")),
    )


def run(
    kernel: ctypes.c_void_p,
    own: Plan,
    x: Tensor,
    units: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    y: Tensor,
    routing: Routing,
    *,
    gather: bool,
) -> None:
    """Y [slots, N] = act(x @ W[expert].T * rows + bias) for each sorted row; rows beyond the last are not written.

    x: [tokens, K] if its rows are to be gathered first, else [slots, K] in sorted order, by the kernel right before.
    bias: [experts, N] in x's dtype. One routing serves one call with `gather` and one without.
    """
    tall = routing_.gather(x, routing) if gather else x
    arguments = _Args(
        *pointers(units, rows, bias, y, routing.count, routing.blocks, routing.tickets[0 if gather else 1 :]),
        *(y.shape[1], units.shape[2], units.shape[1], own.parts),
    )
    _memory, address = tensor_map(tall, STEP)
    launch(kernel, own.ctas, own.groups * 128 + 128, own.shared, arguments, address, early=True)
