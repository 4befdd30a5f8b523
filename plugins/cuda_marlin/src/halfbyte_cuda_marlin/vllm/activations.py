"""The activation functions of experts between the two products, by vLLM's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.reference.activations import SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT
from halfbyte_cuda_marlin.vllm.calls import call


def interleaves(activation: str) -> bool:
    """Whether the operator wants rows of gate and up in turn; the others want all of gate before all of up."""
    return activation == "swigluoai"


class Activations:
    """Every activation that experts may have; results are in the dtype of what they are given."""

    def __init__(self) -> None:
        self._gated = {
            "silu": call("_C::silu_and_mul", ("result", "input"), {}),
            "gelu_tanh": call("_C::gelu_tanh_and_mul", ("out", "input"), {}),
            "swigluoai": call(
                "_C::swigluoai_and_mul", ("out", "input"), {"alpha": SWIGLUOAI_ALPHA, "limit": SWIGLUOAI_LIMIT}
            ),
        }

    def __call__(self, activation: str, values: Tensor) -> Tensor:
        """Return [slots, I] for gate and up [slots, 2I]; for relu2, which has no gate, `values` [slots, I] itself."""
        if activation == "relu2":
            return torch.relu_(values).square_()
        result = values.new_empty(values.shape[0], values.shape[1] // 2)
        self._gated[activation](result, values)
        return result
