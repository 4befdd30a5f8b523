"""The kit's oracle agrees with the library's numerics, of which it uses nothing, and its measures miss nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from halfbyte import numerics
from halfbyte.conformance import data, oracle
from halfbyte.conformance.oracle import Expected
from halfbyte.conformance.tolerances import Errors, errors, tolerance
from halfbyte.problems import DTYPES
from halfbyte.schemes import MXFP4_W4A4, NVFP4_W4A4, SCHEMES, Scheme
from halfbyte.specs import Fidelity, KernelSpec, Rounding

BOTH = [NVFP4_W4A4, MXFP4_W4A4]


@pytest.mark.parametrize("scheme", BOTH, ids=str)
@pytest.mark.parametrize("kind", ["random", "zero-groups", "extreme-scales"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantized_weights_are_those_of_numerics(scheme: Scheme, kind: data.WeightKind, dtype: torch.dtype) -> None:
    parts = (16, 32) if scheme.weights.has_global_scale else ()
    matrix = data.linear_weights(scheme, 48, 128, dtype=dtype, kind=kind, part_rows=parts).matrix
    expected = torch.cat(
        [numerics.dequantize(p.packed, p.scales, p.format, global_scale=p.global_scale) for p in matrix.parts()]
    )
    torch.testing.assert_close(oracle.dequantize(matrix), expected.double(), rtol=2e-7, atol=0)
    assert expected.to(dtype).isfinite().all()


@pytest.mark.parametrize("scheme", BOTH, ids=str)
@pytest.mark.parametrize("kind", ["random", "outliers", "zeros"])
@pytest.mark.parametrize("scale", ["floor", "ceil", "even"])
@pytest.mark.parametrize("ties", ["even", "toward-zero"])
def test_quantized_activations_are_those_of_numerics(
    scheme: Scheme, kind: data.ActivationKind, scale: str, ties: str
) -> None:
    x = data.activations(129, 128, torch.bfloat16, kind=kind)
    calibrated = data.linear_weights(scheme, 16, 128, dtype=torch.bfloat16).matrix.input_global_scale
    global_scale = None if calibrated is None else calibrated.item()
    rounding = Rounding(scale=scale, ties=ties)  # type: ignore[arg-type]  # parametrized
    found = oracle.quantized(x, scheme.weights, global_scale, rounding)
    expected = numerics.fake_quantize(x.float(), scheme.weights, global_scale=global_scale, scale_rule=scale, ties=ties)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("calibrated", [None, 0.25])
def test_a_roundings_input_scale_takes_the_place_of_one_that_is_not_calibrated(calibrated: float | None) -> None:
    x = data.activations(129, 128, torch.bfloat16)
    found = oracle.quantized(x, NVFP4_W4A4.weights, calibrated, Rounding(input_scale=1.5))
    expected = numerics.fake_quantize(x.float(), NVFP4_W4A4.weights, global_scale=calibrated or 1.5)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_captured_data_belong_together(scheme: Scheme) -> None:
    weights, x = data.captured(scheme)
    assert x.shape[1] == weights.matrix.k
    # A trained layer: its outputs are of the size of its inputs, and no two rows of weights or inputs are alike.
    size = oracle.linear(x, weights, None).values.std().item()
    assert 0.05 < size < 5
    assert len({tuple(row) for row in x.tolist()}) == len(x)
    weights.matrix.packed.zero_()
    assert data.captured(scheme)[0].matrix.packed.any()


@pytest.mark.parametrize(
    ("scheme", "fidelity", "quantizes"),
    [
        ("nvfp4-w4a4", Fidelity.NATIVE, True),
        ("nvfp4-w4a4", Fidelity.EMULATED, True),
        ("nvfp4-w4a4", Fidelity.WEIGHT_ONLY, False),
        ("mxfp4-w4a16", Fidelity.EMULATED, False),
        ("mxfp4-w4a16", Fidelity.QUANTIZES_ACTIVATIONS, True),
    ],
)
def test_activations_are_quantized_where_the_fidelity_says_so(scheme: str, fidelity: Fidelity, quantizes: bool) -> None:
    spec = KernelSpec(
        id="some.kernel",
        op="linear",
        target="some.module:Kernel",
        devices=("any",),
        schemes={scheme: fidelity},
        activation_rounding=Rounding(scale="floor"),
        priority=1,
    )
    assert oracle.rounding_of(spec, scheme) == (Rounding(scale="floor") if quantizes else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "experts"])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("quantizes", [False, True])
def test_one_wrong_row_among_many_is_found(op: str, fmt: str, dtype: str, quantizes: bool) -> None:
    values = torch.randn(129, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = Expected(values, values.abs() + 1)
    wrong = values.clone()
    wrong[-1] = values[0]
    assert errors(values.clone(), expected).within(tolerance(op, fmt, dtype, quantizes=quantizes))
    assert not errors(wrong, expected).within(tolerance(op, fmt, dtype, quantizes=quantizes))


def test_a_result_that_should_be_zero_or_is_no_number_is_found() -> None:
    allowed = Errors(1.0, 1.0)
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    expected = Expected(zeros, zeros)
    assert errors(zeros.clone(), expected).within(allowed)
    assert not errors(torch.full((2, 2), 1e-30), expected).within(allowed)
    assert not errors(torch.full((2, 2), float("nan")), expected).within(allowed)
    assert errors(zeros[:0], Expected(zeros[:0], zeros[:0])).within(allowed)
    assert dataclasses.astuple(allowed) == (1.0, 1.0)
