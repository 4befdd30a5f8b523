"""Faults that the conformance kit has to find over the doubles: `pytest -p xpu_mutants` with XPU_MUTANT=NAME."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from halfbyte_xpu.ipex import packing as ipex_packing
from halfbyte_xpu.testing import double_environment, numbers, vllm_experts, vllm_linear
from halfbyte_xpu.torch_xpu import linear as scaled_mm
from halfbyte_xpu.torch_xpu import packing as scaled_packing
from halfbyte_xpu.vllm_kernels import experts, linear, packing

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from halfbyte.conformance.environment import Environment


@pytest.fixture(scope="session")
def kernel_environment() -> Environment:
    environment = double_environment()
    MUTANTS[os.environ["XPU_MUTANT"]]()
    return environment


def put(module: ModuleType, **own: Any) -> None:
    """Put functions or values into a module in the place of its own."""
    vars(module).update(own)


def zeros() -> None:
    """What the vendor's own test of fp4_gemm cannot tell from a product."""
    right, grouped = vllm_linear.fp4_gemm, vllm_experts.grouped_gemm
    put(vllm_linear, fp4_gemm=lambda *arguments: torch.zeros_like(right(*arguments)))
    put(vllm_experts, grouped_gemm=lambda *arguments: grouped(*arguments).zero_())


def untransposed_scales() -> None:
    """The right shape, the wrong order: no check of sizes can find it."""
    right = packing.pack_linear

    def pack(matrix):
        tensors = right(matrix)
        return tensors | {"scales": matrix.scales.reshape(tensors["scales"].shape).clone()}

    put(linear, pack_linear=pack)


def untransposed_shape() -> None:
    """As the vendor's own test passes them: [N, K/32]."""
    right = packing.pack_linear
    put(linear, pack_linear=lambda matrix: right(matrix) | {"scales": matrix.scales.clone()})


def swapped_nibbles() -> None:
    def swapped(tensors):
        return {
            name: tensor >> 4 | tensor << 4 if name in ("weight", "w13", "w2") else tensor
            for name, tensor in tensors.items()
        }

    right, right_experts, right_scaled = packing.pack_linear, packing.pack_experts, scaled_packing.pack_linear
    put(linear, pack_linear=lambda matrix: swapped(right(matrix)))
    put(scaled_mm, pack_linear=lambda matrix, scheme: swapped(right_scaled(matrix, scheme)))
    put(experts, pack_experts=lambda weights, problem: swapped(right_experts(weights, problem)))


def exponents_off_by_one() -> None:
    """Of activations, as a quantizer by the OCP rule has them for most groups."""
    right = numbers.exponents
    put(numbers, exponents=lambda amax, epsilon: right(amax, epsilon) - 1)


def weight_exponents_off_by_one() -> None:
    """Of weights: decoded with another bias, 128."""
    right = numbers.e8m0
    put(numbers, e8m0=lambda codes: right(codes) / 2)


def round_half_even() -> None:
    """As the comment in the vendor's kernel says, and its code does not."""

    def codes(ratio):
        size = ratio.abs().clamp(max=6.0).unsqueeze(-1)
        below = size > torch.tensor([0.25, 1.25, 2.5, 5.0])
        up = size >= torch.tensor([0.75, 1.75, 3.5])
        return (below.sum(-1) + up.sum(-1) + 8 * (ratio < 0)).to(torch.uint8)

    put(numbers, codes=codes)


def uint8_experts() -> None:
    put(experts, _fp4=lambda packed: packed)


def up_gate() -> None:
    """Rows of up before those of gate; the matrix has the same shape."""
    right = packing.pack_experts

    def pack(weights, problem):
        return right(weights if weights.gate is None else replace(weights, gate=weights.up, up=weights.gate), problem)

    put(experts, pack_experts=pack)


def experts_scales_transposed() -> None:
    """Each expert's scales in the order that fp4_gemm takes; the shape stays."""
    right = packing.pack_experts

    def transposed(name, tensor):
        return tensor.transpose(-1, -2).reshape(tensor.shape) if name.endswith("_scales") else tensor

    def pack(weights, problem):
        return {name: transposed(name, tensor) for name, tensor in right(weights, problem).items()}

    put(experts, pack_experts=pack)


def change_scaled_mm(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one of the tensors that xpu.scaled-mm prepares, where it has it."""
    right = scaled_packing.pack_linear

    def pack(matrix, scheme):
        tensors = right(matrix, scheme)
        return tensors | {own: change(tensors[own]) for own in tensors if own == name}

    put(scaled_mm, pack_linear=pack)


def dropped_global_scale() -> None:
    """Of the weights."""
    change_scaled_mm("global_scale", torch.ones_like)


def input_global_scale() -> None:
    """Five percent too much: as large as a wrong rounding of a scale."""
    change_scaled_mm("x_global_scale", lambda scale: scale * 1.05)


def unshuffled_nibbles() -> None:
    put(ipex_packing, NIBBLES=tuple(range(8)))


MUTANTS = {
    "none": lambda: None,
    "zeros": zeros,
    "untransposed-scales": untransposed_scales,
    "untransposed-shape": untransposed_shape,
    "swapped-nibbles": swapped_nibbles,
    "exponents-off-by-one": exponents_off_by_one,
    "weight-exponents-off-by-one": weight_exponents_off_by_one,
    "round-half-even": round_half_even,
    "uint8-experts": uint8_experts,
    "up-gate": up_gate,
    "experts-scales-transposed": experts_scales_transposed,
    "dropped-global-scale": dropped_global_scale,
    "input-global-scale": input_global_scale,
    "unshuffled-nibbles": unshuffled_nibbles,
}
