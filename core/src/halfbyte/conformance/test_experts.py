"""An experts kernel computes what its scheme says, wherever the tokens go."""
# ruff: noqa: D103 - the name of a check says what it checks

from __future__ import annotations

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.conformance.cases import EXPERTS, ROWS
from halfbyte.conformance.subject import Subject, same_bytes
from halfbyte.problems import INPUT_SCALES, InputScales


def test_it_is_right_for_every_number_of_tokens(experts_case: Subject) -> None:
    weights = experts_case.experts_weights()
    module = experts_case.experts(weights)
    for tokens in ROWS:
        experts_case.check_experts(module, experts_case.activations(tokens), weights, *experts_case.routing(tokens))


def test_it_adds_the_biases_of_the_experts(experts_case: Subject) -> None:
    if not experts_case.case.spec.fuses_bias:
        pytest.skip("it refuses experts with biases")
    weights = experts_case.experts_weights(bias=True)
    module = experts_case.experts(weights)
    experts_case.check_experts(module, experts_case.activations(7), weights, *experts_case.routing(7))


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_it_is_right_for_other_numbers_of_experts_per_token(experts_scheme: Subject, top_k: int) -> None:
    weights = experts_scheme.experts_weights()
    module = experts_scheme.experts(weights, top_k)
    routing = experts_scheme.routing(7, top_k)
    experts_scheme.check_experts(module, experts_scheme.activations(7), weights, *routing)


@pytest.mark.parametrize("kind", ["one-expert", "few-experts"])
def test_it_is_right_where_experts_have_no_token(experts_scheme: Subject, kind: data.Routing) -> None:
    weights = experts_scheme.experts_weights()
    module = experts_scheme.experts(weights, 1)
    routing = experts_scheme.routing(33, 1, kind=kind)
    experts_scheme.check_experts(module, experts_scheme.activations(33), weights, *routing)


def test_experts_elsewhere_add_nothing(experts_scheme: Subject) -> None:
    weights = experts_scheme.experts_weights()
    module = experts_scheme.experts(weights)
    expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
    # Neither the first ones nor in order: a kernel that takes global numbers for local ones is found out.
    expert_map[torch.arange(1, 2 * EXPERTS, 2)] = torch.arange(EXPERTS, dtype=torch.int32).flip(0)
    expert_map = expert_map.to(experts_scheme.environment.device)
    ids, routing_weights = experts_scheme.routing(33, experts=2 * EXPERTS)
    ids[0] = torch.tensor([0, 2])  # a token that has no expert here
    x = experts_scheme.activations(33)
    experts_scheme.check_experts(module, x, weights, ids, routing_weights, expert_map)
    assert not module(x, ids, routing_weights, expert_map)[0].any()


def test_gate_and_up_with_one_global_scale_are_right(experts_scheme: Subject) -> None:
    weights = experts_scheme.experts_weights(shared=True)
    module = experts_scheme.experts(weights)
    experts_scheme.check_experts(module, experts_scheme.activations(7), weights, *experts_scheme.routing(7))


@pytest.mark.parametrize("input_scales", INPUT_SCALES)
def test_it_is_right_for_all_input_scales_that_it_takes(experts_scheme: Subject, input_scales: InputScales) -> None:
    weights = experts_scheme.experts_weights(input_scales=input_scales)
    if weights.input_scales is None:
        pytest.skip("activations have no input scales")
    if INPUT_SCALES.index(input_scales) < INPUT_SCALES.index(experts_scheme.case.spec.input_scales):
        pytest.skip("it refuses experts with these input scales")
    module = experts_scheme.experts(weights)
    experts_scheme.check_experts(module, experts_scheme.activations(7), weights, *experts_scheme.routing(7))


def test_it_is_right_for_groups_of_zeros(experts_scheme: Subject) -> None:
    weights = experts_scheme.experts_weights("zero-groups")
    module = experts_scheme.experts(weights)
    x = experts_scheme.activations(7, "zeros")
    experts_scheme.check_experts(module, x, weights, *experts_scheme.routing(7))


def test_it_is_right_for_outliers(experts_scheme: Subject) -> None:
    weights = experts_scheme.experts_weights()
    module = experts_scheme.experts(weights)
    x = experts_scheme.activations(7, "outliers") / 16  # far enough apart, and relu2's squares stay finite in float16
    experts_scheme.check_experts(module, x, weights, *experts_scheme.routing(7))


def test_leading_dimensions_strides_and_integer_types_make_no_difference(experts_scheme: Subject) -> None:
    module = experts_scheme.experts(experts_scheme.experts_weights())
    x = experts_scheme.activations(6)
    ids, weights = experts_scheme.routing(6)
    y = module(x, ids, weights)
    assert same_bytes(module(x, ids.long(), weights), y)
    assert same_bytes(module(x.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T), y)
    shaped = (tensor.view(2, 3, -1) for tensor in (x, ids, weights))
    assert same_bytes(module(*shaped).view(6, -1), y)
