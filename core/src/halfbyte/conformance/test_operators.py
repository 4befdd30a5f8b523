"""A kernel behaves as an operator: repeatable, without side effects, traceable, and the same in a graph."""
# ruff: noqa: D103 - the name of a check says what it checks

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.conformance.subject import Subject, same_bytes
from halfbyte.errors import HalfbyteError
from halfbyte.modules import FP4Experts, FP4Linear

_OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_a_result_is_repeatable_and_stays(linear_setting: Subject) -> None:
    module = linear_setting.linear(linear_setting.linear_weights(bias=True))
    _check_repeatable(module, [(linear_setting.activations(rows),) for rows in (7, 129)])


def test_a_result_of_experts_is_repeatable_and_stays(experts_scheme: Subject) -> None:
    module = experts_scheme.experts(experts_scheme.experts_weights())
    calls = [(experts_scheme.activations(tokens), *experts_scheme.routing(tokens)) for tokens in (33, 129)]
    _check_repeatable(module, calls)


def test_the_linear_operator_passes_opcheck(linear_scheme: Subject) -> None:
    operator, arguments = _linear_call(linear_scheme)
    torch.library.opcheck(operator, arguments, test_utils=_OPCHECKS)


def test_the_experts_operator_passes_opcheck(experts_scheme: Subject) -> None:
    operator, arguments = _experts_call(experts_scheme)
    torch.library.opcheck(operator, arguments, test_utils=_OPCHECKS)


def test_the_linear_operator_refuses_the_same_when_traced(linear_scheme: Subject) -> None:
    operator, (x, packed, bias, key) = _linear_call(linear_scheme)
    other = torch.float32 if x.dtype != torch.float32 else torch.bfloat16
    for wrong in (x.to(other), x[:, 1:].contiguous(), x[None], x[0], x.T.contiguous().T, x.to("meta")):
        _check_same_refusal(operator, (wrong, packed, bias, key))
    _check_same_refusal(operator, (x, packed, x.new_zeros(linear_scheme.case.n + 1), key))
    _check_same_refusal(operator, (x, packed, bias, "unknown"))
    _check_same_refusal(operator, (x, packed[1:], bias, key))


def test_the_experts_operator_refuses_the_same_when_traced(experts_scheme: Subject) -> None:
    operator, (x, packed, ids, weights, expert_map, key) = _experts_call(experts_scheme)
    other = torch.float32 if x.dtype != torch.float32 else torch.bfloat16
    for wrong in (x.to(other), x[:, 1:].contiguous(), x[None], x.T.contiguous().T, x.to("meta")):
        _check_same_refusal(operator, (wrong, packed, ids, weights, expert_map, key))
    for wrong in (ids.long(), ids[:, :1], ids[1:], ids.to("meta")):
        _check_same_refusal(operator, (x, packed, wrong, weights, expert_map, key))
    for wrong in (weights.double(), weights[:, :1].contiguous()):
        _check_same_refusal(operator, (x, packed, ids, wrong, expert_map, key))
    _check_same_refusal(operator, (x, packed, ids, weights, ids[0].long(), key))
    _check_same_refusal(operator, (x, packed, ids, weights, expert_map, "unknown"))


def test_a_linear_module_compiles_whole(linear_scheme: Subject) -> None:
    module = linear_scheme.linear(linear_scheme.linear_weights(bias=True))
    _check_compiled(module, [(linear_scheme.activations(rows),) for rows in (7, 3)])


def test_an_experts_module_compiles_whole(experts_scheme: Subject) -> None:
    module = experts_scheme.experts(experts_scheme.experts_weights())
    _check_compiled(module, [(experts_scheme.activations(rows), *experts_scheme.routing(rows)) for rows in (7, 3)])


def test_a_linear_module_runs_in_a_cuda_graph(linear_setting: Subject) -> None:
    _needs_cuda(linear_setting)
    module = linear_setting.linear(linear_setting.linear_weights(bias=True))
    _check_graph(module, (linear_setting.activations(7),), (linear_setting.activations(7, "outliers"),))


def test_an_experts_module_runs_in_a_cuda_graph(experts_scheme: Subject) -> None:
    _needs_cuda(experts_scheme)
    module = experts_scheme.experts(experts_scheme.experts_weights())
    x, other = experts_scheme.activations(33), experts_scheme.activations(33, "zeros")
    _check_graph(module, (x, *experts_scheme.routing(33)), (other, *experts_scheme.routing(33, kind="few-experts")))


def _linear_call(subject: Subject) -> tuple[Any, tuple[Any, ...]]:
    """The operator and the arguments that the module calls it with."""
    module = subject.linear(subject.linear_weights())
    part: Any = module.parts[0]
    return torch.ops.halfbyte.linear.default, (subject.activations(3), part.tensors, None, part.key)


def _experts_call(subject: Subject) -> tuple[Any, tuple[Any, ...]]:
    packed = subject.experts(subject.experts_weights()).packed
    arguments = (subject.activations(3), packed.tensors, *subject.routing(3), None, packed.key)
    return torch.ops.halfbyte.experts.default, arguments


def _check_repeatable(module: FP4Linear | FP4Experts, calls: Sequence[tuple[Tensor, ...]]) -> None:
    before = [[tensor.clone() for tensor in call] for call in calls]
    results = []
    for call in calls:
        y = module(*call)
        results.append((y, y.clone()))
    again = [module(*call) for call in calls]
    for (y, copy), second in zip(results, again, strict=True):
        assert same_bytes(y, copy), "a later call changed an earlier result"
        assert same_bytes(copy, second), "the same call gave another result"
    for call, copies in zip(calls, before, strict=True):
        assert all(map(same_bytes, call, copies)), "the call changed its inputs"


def _check_same_refusal(operator: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
    real = _refusal(operator, arguments)
    with FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        fake = _refusal(operator, faked)
    assert isinstance(real, HalfbyteError)
    assert (type(fake), str(fake)) == (type(real), str(real))


def _refusal(operator: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Exception | None:
    try:
        operator(*arguments)
    except Exception as error:
        return error
    return None


def _check_compiled(module: FP4Linear | FP4Experts, calls: Sequence[tuple[Tensor, ...]]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for call in calls:
            assert same_bytes(compiled(*call), module(*call))


def _needs_cuda(subject: Subject) -> None:
    if subject.environment.device.type != "cuda":
        pytest.skip(f"{subject.environment.device.type} has no CUDA graphs")


def _check_graph(module: FP4Linear | FP4Experts, call: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Capture one call, replay it with the numbers of another."""
    inputs = tuple(tensor.clone() for tensor in call)
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = module(*inputs)
    for numbers in (call, other):
        for tensor, number in zip(inputs, numbers, strict=True):
            tensor.copy_(number)
        graph.replay()
        torch.cuda.synchronize()
        expected = module(*numbers)
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
