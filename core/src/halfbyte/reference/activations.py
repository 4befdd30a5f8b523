"""The activation functions of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import UsageError, nearest
from halfbyte.problems import ACTIVATIONS

#: gpt-oss's constants, as in its config.json and in transformers' GptOssExperts.
SWIGLUOAI_ALPHA = 1.702
SWIGLUOAI_LIMIT = 7.0


def activate(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of the down projection [T, I] in up's dtype; computed in float32. relu2 has no gate."""
    value = up.float()
    if gate is None:
        return F.relu(value).square().to(up.dtype)
    gate = gate.float()
    if activation == "silu":
        result = F.silu(gate) * value
    elif activation == "gelu_tanh":
        result = F.gelu(gate, approximate="tanh") * value
    elif activation == "swigluoai":
        gate = gate.clamp(max=SWIGLUOAI_LIMIT)
        value = value.clamp(-SWIGLUOAI_LIMIT, SWIGLUOAI_LIMIT)
        result = (value + 1) * (gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate))
    else:
        raise UsageError(f"{activation!r} is no gated activation{nearest(activation, ACTIVATIONS)}")
    return result.to(up.dtype)
