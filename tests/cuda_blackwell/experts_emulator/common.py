"""What the doubles share: the quantizer of x, constants of activations, scales in CuTe DSL's order."""

from __future__ import annotations

import torch
from flashinfer.tllm_enums import ActivationType
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.flashinfer_emulator import arithmetic, checks


class Quantization:
    """csrc/nv_internal/tensorrt_llm/thop/fp4Quantize.cpp, linear scales."""

    def fp4_quantize(self, x, encode, codes, scales, group, ue8m0, swizzled, tile_8x4, inversed, _pdl, recipe) -> None:
        checks.contiguous(x=x)
        if swizzled or tile_8x4 or inversed or ue8m0 or group != 16 or recipe != 0:
            raise RuntimeError("experts take linear NVFP4 scales, without a recipe")
        checks.multiple(16, K=x.shape[1])
        checks.scalar(encode)
        columns = x.shape[1] // 16
        buffer = torch.empty(arithmetic.pad(len(x), 128) * arithmetic.pad(columns, 4), dtype=torch.uint8)
        arithmetic.quantize(x, encode, codes, buffer, 128)
        scales.fill_(255)  # what comes after the rows is never written
        scales[: len(x) * columns] = buffer[arithmetic.offsets(len(x), columns, 128)].view(-1)


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
