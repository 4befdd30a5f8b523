"""marlin.humming: weight-only linear layers by humming's kernels."""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem, Problem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_marlin.humming.launching import load, run
from halfbyte_cuda_marlin.humming.packing import Gemm, pack


class MarlinHumming:
    """One kernel for each range of rows, chosen by schedule.py; see packing.py for the layout."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Rearrange the weights, and compile and load the kernels. The tensors are those of `packing.pack`.

        PluginError if humming cannot be imported or fails.
        """
        gemm = _gemm(problem)
        packed = pack(weights.matrix, gemm)
        load(gemm, packed)
        return packed

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - never given
        """Return y [M, n]; sums in float32, the same from run to run."""
        return run(_gemm(packed.problem), x, packed.tensors)


def _gemm(problem: Problem) -> Gemm:
    ((n, k),) = problem.matrices
    return Gemm(n, k, problem.scheme.weights, problem.dtype)
