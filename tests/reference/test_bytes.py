"""The bytes that the built-in kernels declare are those that a module holds, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.policies import Policy
from halfbyte.schemes import NVFP4_W4A4, SCHEMES, Scheme
from support.weights import known_experts, known_linear

KERNELS = pytest.mark.parametrize("kernel", ["reference", "dequantized"])
ALL_SCHEMES = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def require(kernel: str) -> Policy:
    return Policy(require=(kernel,), origin="test")


def held(module: nn.Module) -> int:
    """Bytes of everything that the module keeps on its device."""
    tensors: list[Tensor] = [*module.buffers(), *module.parameters()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@KERNELS
@ALL_SCHEMES
@BIAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_module_holds_what_its_kernel_declares(
    kernel: str, scheme: Scheme, bias: bool, dtype: torch.dtype
) -> None:
    weights, _ = known_linear(scheme, (24,), 96, bias=bias)
    module = FP4Linear(weights, dtype=dtype, policy=require(kernel))
    assert held(module) == module.choice.spec.bytes_for(module.problem)


@KERNELS
@ALL_SCHEMES
@BIAS
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_an_experts_module_holds_what_its_kernel_declares(
    kernel: str, scheme: Scheme, bias: bool, activation: str
) -> None:
    known = known_experts(scheme, 3, 64, 96, gated=activation != "relu2", bias=bias)
    module = FP4Experts(known.weights, top_k=2, activation=activation, policy=require(kernel))
    assert held(module) == module.choice.spec.bytes_for(module.problem)


@KERNELS
def test_the_bytes_do_not_depend_on_whether_gate_and_up_agree_on_their_input(kernel: str) -> None:
    weights = known_experts(NVFP4_W4A4, 3, 64, 96).weights
    shared = weights.up.input_global_scale
    assert shared is not None
    other = replace(weights, up=replace(weights.up, input_global_scale=shared * 3))
    for each in (weights, other):
        module = FP4Experts(each, top_k=2, activation="silu", policy=require(kernel))
        assert held(module) == module.choice.spec.bytes_for(module.problem)
