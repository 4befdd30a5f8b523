"""A linear kernel computes what its scheme says, for every size and kind of input."""
# ruff: noqa: D103 - the name of a check says what it checks

from __future__ import annotations

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.conformance.cases import ROWS
from halfbyte.conformance.subject import Subject, same_bytes


def test_it_is_right_for_every_number_of_rows(linear_case: Subject) -> None:
    weights = linear_case.linear_weights()
    module = linear_case.linear(weights)
    for rows in ROWS:
        linear_case.check_linear(module, linear_case.activations(rows), weights)


def test_it_adds_the_bias(linear_case: Subject) -> None:
    weights = linear_case.linear_weights(bias=True)
    module = linear_case.linear(weights)
    for rows in (0, 1, 7):
        linear_case.check_linear(module, linear_case.activations(rows), weights)


@pytest.mark.parametrize("kind", ["zero-groups", "extreme-scales"])
def test_it_is_right_for_special_weights(linear_setting: Subject, kind: data.WeightKind) -> None:
    weights = linear_setting.linear_weights(kind)
    linear_setting.check_linear(linear_setting.linear(weights), linear_setting.activations(7), weights)


@pytest.mark.parametrize("kind", ["outliers", "zeros"])
def test_it_is_right_for_special_activations(linear_setting: Subject, kind: data.ActivationKind) -> None:
    weights = linear_setting.linear_weights()
    linear_setting.check_linear(linear_setting.linear(weights), linear_setting.activations(7, kind), weights)


def test_it_is_right_for_a_trained_layer_and_its_inputs(linear_setting: Subject) -> None:
    weights, x = data.captured(linear_setting.case.scheme)
    module = linear_setting.linear(weights)
    linear_setting.check_linear(module, x.to(linear_setting.environment.device, linear_setting.dtype), weights)


def test_shards_keep_their_own_global_scales(linear_setting: Subject) -> None:
    fmt = linear_setting.case.scheme.weights
    if not fmt.has_global_scale:
        pytest.skip(f"{fmt} has no global scale")
    n = linear_setting.case.n
    weights = linear_setting.linear_weights(part_rows=(n // 4, n // 2 + 1, n - n // 4 - n // 2 - 1), bias=True)
    linear_setting.check_linear(linear_setting.linear(weights), linear_setting.activations(7), weights)


def test_leading_dimensions_and_strides_make_no_difference(linear_scheme: Subject) -> None:
    module = linear_scheme.linear(linear_scheme.linear_weights())
    k = linear_scheme.case.k
    x = linear_scheme.activations(6)
    y = module(x)
    assert same_bytes(module(x.view(2, 3, k)).reshape(6, -1), y)
    assert same_bytes(module(x.view(3, 2, k).transpose(0, 1)), y.view(3, 2, -1).transpose(0, 1))
    wide = torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)
    assert same_bytes(module(wide[..., 0]), y)
    assert same_bytes(module(x.T.contiguous().T), y)
    assert same_bytes(module(x[:1].expand(6, k)), module(x[:1].repeat(6, 1)))
    assert module(x[:0].view(0, 5, k)).shape == (0, 5, linear_scheme.case.n)
    assert same_bytes(module(x[0]), module(x[:1])[0])
