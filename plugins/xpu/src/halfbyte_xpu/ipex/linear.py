"""xpu.ipex, linear: MXFP4 weights, bfloat16 activations."""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_xpu.ipex.library import LINEAR, load, product
from halfbyte_xpu.ipex.packing import pack


class IpexLinear:
    """The only weight-only MXFP4 product for Intel GPUs in a library; of an archived one."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:  # noqa: ARG002 - a kernel
        """Return `weight` and `scales`; see packing.py. PluginError if the installed build lacks the operator."""
        load(LINEAR)
        weight, scales = pack(weights.matrix)
        return {"weight": weight, "scales": scales}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - core adds the bias
        """Return y [M, n]."""
        return product(x, packed["weight"], packed["scales"])
