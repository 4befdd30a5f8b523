"""The built-in experts kernels: against compressed-tensors' numbers in float64, and against transformers' modules."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from halfbyte.errors import CheckpointError
from halfbyte.kernels import Packed
from halfbyte.problems import ACTIVATIONS
from halfbyte.reference.experts import Dequantized, Reference
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A4, NVFP4_W4A16, SCHEMES, Scheme
from support.weights import KnownExperts, expected_experts, known_experts, routing

E, H, I, K = 5, 64, 96, 2  # noqa: E741 - the sizes' usual names
#: Relative to the largest |y|: three roundings to the compute dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
KERNELS = pytest.mark.parametrize("kernel", [Reference(), Dequantized()], ids=["reference", "dequantized"])


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def run(kernel: Reference, known: KnownExperts, x: Tensor, ids: Tensor, weights: Tensor, activation: str) -> Tensor:
    problem = known.weights.problem(x.dtype, top_k=K, activation=activation)
    packed = Packed(problem, kernel.prepare(known.weights, problem))
    return kernel.apply(x, packed, ids.int(), weights)


def agree(y: Tensor, expected: Tensor) -> None:
    assert (y.double() - expected.double()).abs().max() <= TOLERANCE[y.dtype] * expected.abs().max()


@KERNELS
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_result_is_the_routed_sum_over_dequantized_experts(
    kernel: Reference, scheme: Scheme, activation: str, bias: bool
) -> None:
    known = known_experts(scheme, E, H, I, gated=activation != "relu2", bias=bias)
    x, (ids, weights) = torch.randn(9, H), routing(9, E, K)
    agree(run(kernel, known, x, ids, weights, activation), expected_experts(known, x, ids, weights, activation))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_activations_lose_only_their_own_rounding(kernel: Reference, dtype: torch.dtype) -> None:
    known = known_experts(NVFP4_W4A16, E, H, I, bias=True)
    x, (ids, weights) = torch.randn(9, H).to(dtype), routing(9, E, K)
    agree(run(kernel, known, x, ids, weights, "silu"), expected_experts(known, x, ids, weights, "silu"))


def _transformers_swiglu(cls: Any, known: KnownExperts) -> Any:
    sizes = {"hidden_size": H, "hidden_act": "silu", "_experts_implementation": "eager"}
    sizes |= {"num_experts": E, "num_local_experts": E, "moe_intermediate_size": I, "intermediate_size": I}
    module = cls(SimpleNamespace(**sizes))
    assert known.gate is not None
    module.gate_up_proj.data = torch.cat((known.gate.weight, known.up.weight), dim=1).float()
    module.down_proj.data = known.down.weight.float()
    return module


@pytest.mark.parametrize("cls", [Qwen3MoeExperts, MixtralExperts])
@torch.no_grad()
def test_silu_experts_equal_those_of_transformers(cls: Any) -> None:
    known = known_experts(NVFP4_W4A16, E, H, I)
    x, (ids, weights) = torch.randn(9, H), routing(9, E, K)
    agree(run(Reference(), known, x, ids, weights, "silu"), _transformers_swiglu(cls, known)(x, ids, weights))


@torch.no_grad()
def test_swigluoai_experts_equal_those_of_gpt_oss_also_beyond_the_limit() -> None:
    known = known_experts(MXFP4_W4A16, E, H, I, bias=True)
    sizes = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "_experts_implementation": "eager"}
    module = GptOssExperts(SimpleNamespace(**sizes, swiglu_alpha=1.702, swiglu_limit=7.0))
    assert known.gate is not None
    gate_up = torch.stack((known.gate.weight, known.up.weight), dim=2).flatten(1, 2)
    module.gate_up_proj.data = gate_up.transpose(1, 2).float()
    module.gate_up_proj_bias.data = torch.stack((known.gate.bias, known.up.bias), dim=2).flatten(1, 2).float()
    module.down_proj.data = known.down.weight.transpose(1, 2).float()
    module.down_proj_bias.data = known.down.bias.float()
    x, (ids, weights) = 20 * torch.randn(9, H), routing(9, E, K)
    agree(run(Reference(), known, x, ids, weights, "swigluoai"), module(x, ids, weights))


@KERNELS
def test_experts_of_another_rank_add_nothing(kernel: Reference) -> None:
    known = known_experts(NVFP4_W4A4, E, H, I)
    local = [-1, 3, 0, -1, 4, 1, 2, -1]
    x, (ids, weights) = torch.randn(9, H), routing(9, len(local), K)
    problem = known.weights.problem(x.dtype, top_k=K, activation="silu")
    packed = Packed(problem, kernel.prepare(known.weights, problem))
    y = kernel.apply(x, packed, ids.int(), weights, torch.tensor(local, dtype=torch.int32))
    agree(y, expected_experts(known, x, ids, weights, "silu", local))


def test_a_token_may_name_one_expert_twice() -> None:
    known = known_experts(NVFP4_W4A16, E, H, I)
    x, ids, weights = torch.randn(1, H), torch.tensor([[3, 3]]), torch.tensor([[0.25, 0.5]])
    agree(run(Reference(), known, x, ids, weights, "silu"), expected_experts(known, x, ids, weights, "silu"))


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_nvfp4_activations_without_a_calibrated_scale_are_an_error_that_names_the_layer(projection: str) -> None:
    known = known_experts(NVFP4_W4A4, E, H, I)
    bare = replace(getattr(known.weights, projection), input_global_scale=None)
    weights = replace(known.weights, **{projection: bare})
    with pytest.raises(CheckpointError, match=rf"experts\.{projection}: nvfp4-w4a4 .* calibrate"):
        Reference().prepare(weights, weights.problem(torch.float32, top_k=K, activation="silu"))


def test_gate_and_up_with_one_input_scale_quantize_x_once_and_compute_the_same() -> None:
    known = known_experts(NVFP4_W4A4, E, H, I)
    assert known.gate is not None
    problem = known.weights.problem(torch.float32, top_k=K, activation="silu")
    assert "one_input" in Reference().prepare(known.weights, problem)
    shared = known.weights.up.input_global_scale
    assert shared is not None
    other = replace(known.weights.up, input_global_scale=shared * 3)
    known.up.matrix = other
    known.up.input_divisors = [d / 3 for d in known.up.input_divisors if d is not None]
    known.weights = replace(known.weights, up=other)
    assert "one_input" not in Reference().prepare(known.weights, problem)
    x, (ids, weights) = torch.randn(9, H), routing(9, E, K)
    agree(run(Reference(), known, x, ids, weights, "silu"), expected_experts(known, x, ids, weights, "silu"))


def test_in_a_cuda_graph_every_expert_computes_and_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_experts(NVFP4_W4A4, E, H, I, bias=True)
    x, (ids, weights) = torch.randn(9, H), routing(9, E, K)
    expected = run(Reference(), known, x, ids, weights, "silu")
    monkeypatch.setattr("halfbyte.reference.experts._capturing", lambda _: True)
    monkeypatch.setattr(Tensor, "nonzero", None)
    monkeypatch.setattr(Tensor, "tolist", None)
    monkeypatch.setattr(Tensor, "item", None)
    y = run(Reference(), known, x, ids, weights, "silu")
    monkeypatch.undo()
    agree(y, expected)
