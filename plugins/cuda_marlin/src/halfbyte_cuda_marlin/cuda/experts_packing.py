"""Experts' weights as stacks of the units of packing.py, one stack for gate and up together, one for down.

In each 16 rows of the first stack 8 are of gate and 8 of up, for the same 8 numbers of the intermediate size: a thread
that holds rows g and g + 8 of a result has both arguments of the activation function. Without a gate the order is up's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from halfbyte.matrix import Matrix
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_marlin.cuda.packing import UNIT_ROWS, empty_units, pack_scales

#: Rows of one projection that follow each other in the first stack.
RUN: Final = 8
#: Bytes of packed values that are rearranged at a time, unless those of one expert are more.
_SLICE_BYTES: Final = 1 << 26

#: Fills in the codes of units, as `packing.pack_codes` does.
PackCodes = Callable[[Matrix, torch.dtype, Tensor], None]


def pack_experts(weights: ExpertsWeights, dtype: torch.dtype, pack_codes: PackCodes) -> dict[str, Tensor]:
    """The packed tensors of a layer whose hidden and intermediate sizes are multiples of 32.

    `first` and `down`: uint8 [E, N/32, K/128, bytes], N = 2I (I without a gate) and H; `first_rows` and `down_rows`:
    float32 [E, N], what each row's result is multiplied by; with biases `first_bias` and `down_bias` [E, N] in `dtype`.
    """
    first = [weights.up] if weights.gate is None else [weights.gate, weights.up]
    tensors: dict[str, Tensor] = {}
    for name, projections in (("first", first), ("down", [weights.down])):
        tensors[name], tensors[f"{name}_rows"] = _pack_stack(projections, dtype, pack_codes)
        biases = [matrix.bias for matrix in projections if matrix.bias is not None]
        if biases:
            tensors[f"{name}_bias"] = interleaved(biases).to(dtype, copy=True)
    return tensors


def interleaved(stacks: list[Tensor]) -> Tensor:
    """Stacks [E, N, ...] as one [E, N * stacks, ...] that takes RUN rows of each in turn."""
    if len(stacks) == 1:
        return stacks[0]
    runs = [stack.unflatten(1, (-1, RUN)) for stack in stacks]
    return torch.stack(runs, dim=2).flatten(1, 3)


def _pack_stack(projections: list[Matrix], dtype: torch.dtype, pack_codes: PackCodes) -> tuple[Tensor, Tensor]:
    experts, n = projections[0].packed.shape[0], projections[0].n * len(projections)
    units: Tensor | None = None
    rows = torch.empty(experts, n, dtype=torch.float32, device=projections[0].packed.device)
    for part, matrix in _slices(projections):
        own = empty_units(matrix).unflatten(0, (-1, n // UNIT_ROWS))
        if units is None:
            units = own.new_empty(experts, *own.shape[1:])
        target = units[part].flatten(0, 1)
        pack_codes(matrix, dtype, target)
        rows[part] = pack_scales(matrix, dtype, target).view(-1, n)
    if units is None:
        raise ValueError("a layer without experts has nothing to pack")
    return units, rows


def _slices(projections: list[Matrix]) -> Iterator[tuple[slice, Matrix]]:
    """Some experts at a time, as one tall matrix of all their rows, in the order of the units."""
    one = projections[0]
    experts, each = one.packed.shape[0], one.packed[0].numel() * len(projections)
    step = max(1, _SLICE_BYTES // each)
    for start in range(0, experts, step):
        part = slice(start, min(start + step, experts))
        packed = interleaved([matrix.packed[part] for matrix in projections])
        scales = interleaved([matrix.scales[part].view(torch.uint8) for matrix in projections])
        run = one.n if len(projections) == 1 else RUN
        globals_ = [matrix.global_scale[part] for matrix in projections if matrix.global_scale is not None]
        multipliers = torch.stack(globals_, dim=1)[:, None].expand(-1, one.n // run, -1).flatten() if globals_ else None
        tall = Matrix(
            name=one.name,
            format=one.format,
            packed=packed.flatten(0, 1),
            scales=scales.flatten(0, 1).view(one.scales.dtype),
            global_scale=multipliers,
            part_rows=(run,) * (packed.shape[0] * packed.shape[1] // run),
        )
        yield part, tall
