"""humming's kernels of one product, compiled and loaded before they are needed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.humming import schedule
from halfbyte_cuda_marlin.humming.library import library, told
from halfbyte_cuda_marlin.humming.packing import Gemm, arguments

_HOPPER: Final = (9, 0)
#: More tokens for each expert than this change nothing.
_ROWS_OF_AN_EXPERT: Final = 256
#: TMA and 16-byte loads.
_ALIGNMENT: Final = 16


def run(gemm: Gemm, x: Tensor, packed: Mapping[str, Tensor], starts: Tensor | None = None) -> Tensor:
    """Return y [M, n] for x [M, k], contiguous.

    Of a stack of experts, rows from `starts`[e] on are multiplied by matrix e; int32 [E + 1]. Rows from the last one
    of `starts` on stay as they were allocated.
    """
    aligned = x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
    return _launch(gemm, aligned, packed, starts, 0)


def load(gemm: Gemm, packed: Mapping[str, Tensor]) -> None:
    """Compile every kernel that the product can need, and run each once on one row: a graph must not be captured first.

    PluginError with humming's words if one does not compile.
    """
    weight = packed["weight"]
    x = torch.zeros(1, gemm.k, dtype=getattr(torch, gemm.dtype), device=weight.device)
    starts = torch.ones(gemm.experts + 1, dtype=torch.int32, device=weight.device) if gemm.experts else None
    with told(f"run its kernels for {gemm}"):
        for above, *_ in _kernels(gemm, weight.device).view(-1, 4).tolist():
            _launch(gemm, x, packed, starts, above + 1)


def _launch(gemm: Gemm, x: Tensor, packed: Mapping[str, Tensor], starts: Tensor | None, as_rows: int) -> Tensor:
    return library().launch(
        configs=_kernels(gemm, x.device),
        inputs=x,
        **arguments(packed, gemm.format),
        expert_layout=starts,
        valid_shape_m=as_rows,
    )


@functools.cache
def _kernels(gemm: Gemm, device: torch.device) -> Tensor:
    """Ranges of rows with the kernel that serves each, as humming's launcher takes them: int64 [4 * ranges], CPU."""
    compute: dict[str, Any] = {"gemm_type": "grouped_contiguous" if gemm.experts else "dense"}
    with torch.cuda.device(device), told(f"compile its kernels for {gemm}"):
        layer = gemm.layer()
        if gemm.experts or torch.cuda.get_device_capability(device) != _HOPPER:
            tuning = _chosen_by_humming(gemm, layer, compute)
        else:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            tuning = schedule.dense(*gemm.padded, processors)
        return library().prepare_kernels(layer.to_str(), json.dumps(compute), json.dumps(tuning), device)


def _chosen_by_humming(gemm: Gemm, layer: Any, compute: dict[str, Any]) -> list[list[Any]]:
    def choose(rows: int) -> dict[str, Any]:
        return library().heuristics(layer, shape_m=rows, **compute)

    if not gemm.experts:
        return schedule.ranges(schedule.ROWS, choose)
    last = (gemm.experts * _ROWS_OF_AN_EXPERT).bit_length()
    return schedule.ranges(tuple(1 << power for power in range(3, last)), choose)
