"""Preparing weights has no side effects, gives the same each time, and costs the memory that was declared."""
# ruff: noqa: D103 - the name of a check says what it checks

from __future__ import annotations

import torch

from halfbyte.conformance.subject import Subject, matrices, on_device, same_bytes
from halfbyte.weights import ExpertsWeights, LinearWeights

#: What the declared bytes may lack: small tables, and copies of scales in a wider type.
_SLACK = 1.25
_SMALL = 64 * 1024


def test_prepare_changes_nothing_and_gives_the_same_twice(linear_scheme: Subject) -> None:
    _check_prepare(linear_scheme, _linear(linear_scheme))


def test_prepare_of_experts_changes_nothing_and_gives_the_same_twice(experts_scheme: Subject) -> None:
    _check_prepare(experts_scheme, _experts(experts_scheme))


def test_packed_weights_are_what_the_contract_asks_for(linear_scheme: Subject) -> None:
    _check_packed(linear_scheme, _linear(linear_scheme))


def test_packed_experts_are_what_the_contract_asks_for(experts_scheme: Subject) -> None:
    _check_packed(experts_scheme, _experts(experts_scheme))


def _linear(subject: Subject) -> LinearWeights:
    weights = subject.linear_weights(bias=True)
    return LinearWeights(scheme=weights.scheme, matrix=weights.matrix.to(subject.environment.device))


def _experts(subject: Subject) -> ExpertsWeights:
    weights = subject.experts_weights(bias=subject.case.spec.fuses_bias)
    return on_device(weights, subject.environment.device)


def _check_prepare(subject: Subject, weights: LinearWeights | ExpertsWeights) -> None:
    inputs = [tensor for matrix in matrices(weights) for tensor in matrix.tensors()]
    before = [tensor.clone() for tensor in inputs]
    first, second = subject.prepare(weights), subject.prepare(weights)
    assert all(same_bytes(now, then) for now, then in zip(inputs, before, strict=True)), "prepare changed its input"
    assert list(first) == list(second)
    assert all(same_bytes(first[name], second[name]) for name in first), "prepare gave something else the second time"
    owned = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    shared = [name for name, tensor in first.items() if tensor.untyped_storage().data_ptr() in owned]
    assert not shared, f"{shared} share memory with the weights"


def _check_packed(subject: Subject, weights: LinearWeights | ExpertsWeights) -> None:
    packed, case = subject.prepare(weights), subject.case
    for name, tensor in packed.items():
        assert tensor.device == subject.environment.device, name
        assert not tensor.requires_grad, name
        assert not (tensor.is_floating_point() and torch.finfo(tensor.dtype).bits <= 8), f"{name} is {tensor.dtype}"
    problem = (
        weights.problem(subject.dtype)
        if isinstance(weights, LinearWeights)
        else weights.problem(subject.dtype, top_k=subject.top_k, activation=case.activation)
    )
    declared = case.spec.resident_bytes(problem)
    found = sum(tensor.untyped_storage().nbytes() for tensor in packed.values())
    assert found <= _SLACK * declared + _SMALL, f"{found} bytes are packed, resident_bytes says {declared}"
