"""The two operators: torch's own checks, and one validator for the operator, its fake and the eager path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.packing import PackedBuffers
from halfbyte.policies import Policy
from halfbyte.schemes import NVFP4_W4A4, NVFP4_W4A16, SCHEMES, Scheme
from support.kernels import chosen, picky
from support.weights import known_experts, known_linear, routing

E, H, I, K = 4, 64, 32, 2  # noqa: E741 - the sizes' usual names
POLICIES = pytest.mark.parametrize(
    "policy", [Policy(require="reference"), Policy(require="dequantized")], ids=["reference", "dequantized"]
)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def linear_part(scheme: Scheme = NVFP4_W4A16, policy: Policy | None = None) -> PackedBuffers:
    weights, _ = known_linear(scheme, (16, 24), 64)
    module = FP4Linear(weights, dtype=torch.float32, policy=policy).parts[0]
    assert isinstance(module, PackedBuffers)
    return module


def experts_part(scheme: Scheme = NVFP4_W4A16, policy: Policy | None = None) -> PackedBuffers:
    weights = known_experts(scheme, E, H, I, bias=True).weights
    return FP4Experts(weights, dtype=torch.float32, top_k=K, activation="silu", policy=policy).packed


@POLICIES
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_linear_passes_torchs_own_checks(scheme: Scheme, policy: Policy, rows: int) -> None:
    part = linear_part(scheme, policy)
    for bias in (None, torch.randn(40)):
        torch.library.opcheck(ops.linear, (torch.randn(rows, 64), part.tensors, bias, part.key))


@POLICIES
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_experts_passes_torchs_own_checks(scheme: Scheme, policy: Policy) -> None:
    part = experts_part(scheme, policy)
    ids, weights = routing(3, E, K)
    torch.library.opcheck(ops.experts, (torch.randn(3, H), part.tensors, ids.int(), weights, None, part.key))


def test_experts_passes_torchs_own_checks_with_a_map_and_without_tokens() -> None:
    part = experts_part(policy=Policy(require="reference"))
    ids, weights = routing(3, E, K)
    expert_map = torch.tensor([0, -1, 2, 3]).int()
    torch.library.opcheck(ops.experts, (torch.randn(3, H), part.tensors, ids.int(), weights, expert_map, part.key))
    none = torch.zeros(0, H), part.tensors, ids[:0].int(), weights[:0], None, part.key
    torch.library.opcheck(ops.experts, none)


def test_the_key_is_the_same_for_the_same_kernel_and_problem_and_no_other() -> None:
    assert linear_part().key == linear_part().key
    assert linear_part().key != linear_part(policy=Policy(require="reference")).key
    assert linear_part().key != linear_part(NVFP4_W4A4).key


X = torch.zeros(3, 64)
BAD_LINEAR: dict[str, tuple[Tensor, Tensor | None]] = {
    "rank": (torch.zeros(1, 3, 64), None),
    "columns": (torch.zeros(3, 32), None),
    "dtype": (X.bfloat16(), None),
    "strides": (torch.zeros(64, 3).t(), None),
    "bias-shape": (X, torch.zeros(41)),
    "bias-rank": (X, torch.zeros(1, 40)),
    "bias-dtype": (X, torch.zeros(40).half()),
    "bias-strides": (X, torch.zeros(80)[::2]),
}
IDS, WEIGHTS = torch.zeros(3, K).int(), torch.zeros(3, K)
BAD_EXPERTS: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {
    "rank": (torch.zeros(1, 3, H), IDS, WEIGHTS, None),
    "columns": (torch.zeros(3, 32), IDS, WEIGHTS, None),
    "dtype": (torch.zeros(3, H).half(), IDS, WEIGHTS, None),
    "ids-dtype": (X, IDS.long(), WEIGHTS, None),
    "ids-tokens": (X, IDS[:2], WEIGHTS, None),
    "ids-top-k": (X, torch.zeros(3, 3).int(), torch.zeros(3, 3), None),
    "ids-strides": (X, torch.zeros(K, 3).int().t(), WEIGHTS, None),
    "weights-dtype": (X, IDS, WEIGHTS.half(), None),
    "weights-tokens": (X, IDS, WEIGHTS[:2], None),
    "map-dtype": (X, IDS, WEIGHTS, torch.zeros(E).long()),
    "map-rank": (X, IDS, WEIGHTS, torch.zeros(1, E).int()),
}


def refusals(
    real: Callable[..., Any], operator: Callable[..., Any], part: PackedBuffers, inputs: tuple[Any, ...]
) -> set[str]:
    """What the eager path, the operator and its fake say to the same inputs."""
    messages = set()

    def note(call: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(UsageError) as error:
            call(*arguments)
        messages.add(str(error.value))

    x, *rest = inputs
    note(real, part.choice.kernel, x, part.packed, *rest)
    note(operator, x, part.tensors, *rest, part.key)
    with FakeTensorMode() as mode:
        fake = [None if tensor is None else mode.from_tensor(tensor) for tensor in inputs]
        note(operator, fake[0], [mode.from_tensor(tensor) for tensor in part.tensors], *fake[1:], part.key)
    return messages


@pytest.mark.parametrize("inputs", BAD_LINEAR.values(), ids=BAD_LINEAR)
def test_linears_fake_refuses_what_the_real_one_refuses_in_the_same_words(inputs: tuple[Any, ...]) -> None:
    (message,) = refusals(ops.run_linear, ops.linear, linear_part(), inputs)
    assert "linear nvfp4-w4a16 40x64 float32 takes float32 [" in message
    assert message.count(";") == 2  # found; expected; what to do


@pytest.mark.parametrize("inputs", BAD_EXPERTS.values(), ids=BAD_EXPERTS)
def test_experts_fake_refuses_what_the_real_one_refuses_in_the_same_words(inputs: tuple[Any, ...]) -> None:
    (message,) = refusals(ops.run_experts, ops.experts, experts_part(), inputs)
    assert "experts nvfp4-w4a16 E=4 top-2 H=64 I=32 silu float32 bias takes " in message


def test_another_device_is_refused_and_named() -> None:
    part = linear_part()
    with pytest.raises(UsageError, match=r"x is float32 \[3, 64\] on meta; .* on cpu.*move it with \.to\('cpu'\)"):
        ops.check_linear_inputs(X.to("meta"), part.packed, None)
    moe = experts_part()
    for name, inputs in {
        "topk_ids": (X, IDS.to("meta"), WEIGHTS, None),
        "topk_weights": (X, IDS, WEIGHTS.to("meta"), None),
        "expert_map": (X, IDS, WEIGHTS, torch.zeros(E, device="meta").int()),
    }.items():
        with pytest.raises(UsageError, match=f"{name} is .* on meta"):
            ops.check_experts_inputs(inputs[0], moe.packed, *inputs[1:])


def test_a_key_that_is_unknown_or_of_the_other_operator_is_an_error() -> None:
    part, moe = linear_part(), experts_part()
    with pytest.raises(UsageError, match="no kernel is registered as 'nothing'"):
        ops.linear(X, part.tensors, None, "nothing")
    with pytest.raises(UsageError, match="halfbyte::linear was given the weights of experts"):
        ops.linear(X, moe.tensors, None, moe.key)
    with pytest.raises(UsageError, match="halfbyte::experts was given the weights of linear"):
        ops.experts(X, part.tensors, IDS, WEIGHTS, None, part.key)
    reference = linear_part(policy=Policy(require="reference"))
    with pytest.raises(UsageError, match=r"1 packed tensors given, expected 8: \['part0'"):
        ops.linear(X, reference.tensors[:1], None, reference.key)


def test_fake_results_have_the_shape_dtype_and_strides_of_real_ones() -> None:
    part, moe = linear_part(), experts_part()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in part.tensors]
        y = ops.linear(mode.from_tensor(X), fake, None, part.key)
        fake = [mode.from_tensor(tensor) for tensor in moe.tensors]
        inputs = [mode.from_tensor(tensor) for tensor in (IDS, WEIGHTS)]
        z = ops.experts(mode.from_tensor(X), fake, *inputs, None, moe.key)
    for found, real in ((y, part.linear(X, None)), (z, moe.experts(X, IDS, WEIGHTS, None))):
        assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())


def test_modules_do_not_go_through_the_dispatcher_in_plain_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    part, moe = linear_part(), experts_part()
    monkeypatch.setattr(ops, "linear", None)
    monkeypatch.setattr(ops, "experts", None)
    assert part.linear(X, None).shape == (3, 40)
    assert moe.experts(X, IDS, WEIGHTS, None).shape == (3, H)


def test_a_padded_kernel_without_an_own_bias_passes_torchs_own_checks() -> None:
    weights, _ = known_linear(NVFP4_W4A16, (40,), 64)
    module = FP4Linear(weights, dtype=torch.float32, resolution=chosen(picky("linear"), weights.problem(torch.float32)))
    part = module.parts[0]
    assert isinstance(part, PackedBuffers)
    torch.library.opcheck(ops.linear, (torch.randn(3, 96), part.tensors, None, part.key))
