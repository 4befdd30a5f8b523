"""What the doubles share: constants of activations, scales in CuTe DSL's order."""

from __future__ import annotations

import torch
from flashinfer.tllm_enums import ActivationType
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.flashinfer_emulator import arithmetic, checks


def six_d(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Weights [E, R, K] of codes and scales in CuTe DSL's order, whose storage is read through its address."""
    experts, rows, half = codes.shape
    wanted = (32, 4, arithmetic.pad(rows, 128) // 128, 4, arithmetic.pad(2 * half // group, 4) // 4, experts)
    storage = scales.permute(5, 2, 4, 0, 1, 3)
    if tuple(scales.shape) != wanted or not storage.is_contiguous() or scales.element_size() != 1:
        raise RuntimeError(f"scales are {tuple(scales.shape)} with strides {scales.stride()}, expected a view {wanted}")
    return moe.swizzled(codes, storage.view(torch.uint8), group)


def activation_of(
    kind: ActivationType, alpha: float | None = None, beta: float | None = None, limit: float | None = None
) -> moe.Activation:
    names = {"Swiglu": "swiglu", "SwigluBias": "swiglu", "GegluTanh": "geglu_tanh", "Relu2": "relu2"}
    return moe.Activation(
        names[kind.name],
        1.0 if alpha is None else alpha,
        0.0 if beta is None else beta,
        float("inf") if limit is None else limit,
    )


def constant(values: Tensor | None, experts: int) -> float | None:
    """A constant of the activation as the kernels take it: float32 [E]."""
    if values is None:
        return None
    checks.dtype(torch.float32, values=values)
    if values.shape != (experts,) or len(values.unique()) != 1:
        raise RuntimeError(f"a constant of the activation is {values}")
    return values[0].item()
