"""marlin.cuda: weight-only linear layers by our own kernels. One packed layout serves every number of rows."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_marlin.cuda import paths
from halfbyte_cuda_marlin.cuda.card_packing import pack_codes_on_card
from halfbyte_cuda_marlin.cuda.cards import card
from halfbyte_cuda_marlin.cuda.packing import empty_units, pack_scales

#: The kernels load 16 bytes at a time.
_ALIGNMENT: Final = 16


class MarlinCuda:
    """Keeps codes and scales in units of 32 x 128; see packing.py. Needs SM80.

    `arch`: what to compile for instead of the card's own, such as "compute_80", the code of older cards on a newer one.
    """

    def __init__(self, arch: str | None = None) -> None:
        self._arch = arch

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Rearrange the weights on their device, and compile the kernels that the layer can need.

        `units`: uint8 [N/32, K/128, bytes]; `rows`: float32 [N], what each row's result is multiplied by.
        PluginError with NVRTC's log if a kernel does not compile.
        """
        matrix, dtype = weights.matrix, getattr(torch, problem.dtype)
        device = matrix.packed.device
        with torch.cuda.device(device):
            units = empty_units(matrix)
            pack_codes_on_card(matrix, dtype, units, card(device.index or 0, self._arch).arch)
            rows = pack_scales(matrix, dtype, units)
            _load_all(problem.n, problem.k, tuple(units.shape), dtype, device, self._arch)
        return {"units": units, "rows": rows}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n]; sums in float32, in an order that depends on the sizes alone."""
        units, rows = packed.tensors["units"], packed.tensors["rows"]
        shape, device = x.shape, x.device
        n = packed.problem.n  # type: ignore[union-attr]
        y = x.new_empty(shape[0], n)
        run = paths.path((shape[0], n, shape[1]), units.shape, x.dtype, device, self._arch)
        if x.data_ptr() % _ALIGNMENT:
            x = x.clone()
        if device.index == torch.cuda.current_device():
            run(x, units, rows, bias, y)
        else:
            with torch.cuda.device(device):
                run(x, units, rows, bias, y)
        return y


@functools.cache
def _load_all(
    n: int, k: int, units: tuple[int, int, int], dtype: torch.dtype, device: torch.device, arch: str | None
) -> None:
    """Compile and load every kernel that any call of layers of this size can need: it may be captured in a graph."""
    for m in paths.EVERY_KERNEL:
        paths.path((m, n, k), units, dtype, device, arch)
