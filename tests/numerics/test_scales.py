from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.formats import MXFP4, NVFP4
from halfbyte.numerics import SCALE_RULES, GlobalScale, decode_e8m0, encode_e4m3, mxfp4_scale, nvfp4_scale, scale_codes

BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
POSITIVE = st.floats(min_value=0, width=32, allow_infinity=False, exclude_min=True)


def every_bfloat16() -> torch.Tensor:
    """All positive finite bfloat16 numbers, as float32."""
    return torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def exact_exponent(amax: float, rule: str) -> int:
    """The scale's exponent by its formula, in exact fractions."""
    target = Fraction(amax) / 6 if rule == "ceil" else Fraction(amax)
    exponent = math.frexp(float(amax))[1] - 1
    floor = next(e for e in range(exponent + 3, exponent - 6, -1) if Fraction(2) ** e <= target)
    if rule == "ceil":
        return floor if target == Fraction(2) ** floor else floor + 1
    if rule == "even" and target / Fraction(2) ** floor >= Fraction(7, 4):
        floor += 1
    return floor - 2


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(amax=POSITIVE)
def test_mxfp4_scale_follows_its_formula(rule, amax):
    rounds_to_infinity = rule == "even" and amax >= 1.75 * 2.0**127
    expected = 255 if rounds_to_infinity else max(exact_exponent(amax, rule) + 127, 0)
    assert mxfp4_scale(torch.tensor([amax]), rule).item() == expected


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_mxfp4_scale_follows_its_formula_at_and_beside_every_threshold(rule):
    at = torch.tensor(
        [m * 2.0**e for e in (-126, -125, -124, -3, 0, 7, 127) for m in (1.0, 1.5, 1.75) if m * 2.0**e < 2.9e38]
    )
    values = torch.cat((at, at.nextafter(torch.tensor(0.0)), at.nextafter(torch.tensor(math.inf)))).tolist()
    expected = [max(exact_exponent(value, rule) + 127, 0) for value in values]
    assert mxfp4_scale(torch.tensor(values), rule).tolist() == expected


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_mxfp4_scale_of_zero_is_the_smallest_and_of_no_number_is_nan(rule):
    amax = torch.tensor([0.0, 2.0**-149, math.inf, math.nan, -math.nan])
    assert mxfp4_scale(amax, rule).tolist() == [0, 0, 255, 255, 255]


def test_even_is_the_rule_of_compressed_tensors():
    for amax in (every_bfloat16(), torch.rand(4096) * 8):
        oracle = generate_mx_scales(amax).clamp(0, 255).to(torch.uint8)
        assert torch.equal(mxfp4_scale(amax, "even"), oracle)


def test_ceil_with_the_least_scale_is_intels_quantizer_for_every_bfloat16():
    amax = every_bfloat16()
    mantissa, exponent = torch.frexp((amax / 6).clamp(min=1e-10))
    intel = torch.where(mantissa == 0.5, exponent - 1, exponent) + 127
    assert torch.equal(mxfp4_scale(amax, "ceil").clamp(min=94), intel.to(torch.uint8))


def test_under_ceil_nothing_saturates_and_half_the_scale_would():
    amax = every_bfloat16()
    amax = amax[amax > 1e-30]
    ratio = amax.double() / decode_e8m0(mxfp4_scale(amax, "ceil")).double()
    assert ratio.max() <= 6
    assert ratio.min() > 3


def test_e8m0_is_torchs_own_for_every_code(same_bits):
    same_bits(decode_e8m0(BYTES), BYTES.view(torch.float8_e8m0fnu).float())
    assert decode_e8m0(BYTES)[0].item() == 2.0**-127


def test_e4m3_is_torchs_own_at_and_beside_every_boundary():
    numbers = BYTES[:127].view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat((numbers, middles))
    values = torch.cat((exact, exact.nextafter(torch.tensor(500.0)), exact[1:].nextafter(torch.tensor(0.0))))
    values = torch.cat((values, torch.rand(4096) * 448, torch.rand(4096) * 2.0**-5, torch.tensor([math.nan])))
    expected = values.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(encode_e4m3(values), expected)


@given(POSITIVE)
def test_e4m3_is_torchs_own_for_any_positive_float(value):
    tensor = torch.tensor([value])
    assert torch.equal(encode_e4m3(tensor), tensor.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_nvfp4_scale_is_that_of_compressed_tensors_beside_every_tie(oracle_args):
    numbers = BYTES[:127].view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    for multiplier in (torch.rand(64, dtype=torch.float64) * 1e-3 + 1e-5).tolist():
        divisor = GlobalScale.of(multiplier).divisor
        amax = 6 * ties / divisor
        for _ in range(3):
            amax = torch.cat((amax, amax.nextafter(torch.tensor(0.0)), amax.nextafter(torch.tensor(1e9)))).unique()
        oracle, _ = calculate_qparams(-amax, amax, oracle_args(NVFP4), global_scale=divisor.reshape(1))
        assert torch.equal(nvfp4_scale(amax, divisor).view(torch.float8_e4m3fn).float(), oracle)


def test_nvfp4_scale_is_an_eighth_where_it_would_be_zero_and_keeps_nan():
    amax = torch.tensor([0.0, 1e-30, 6.0, math.inf, math.nan])
    scale = nvfp4_scale(amax, torch.tensor(1.0)).view(torch.float8_e4m3fn).float()
    assert scale[:4].tolist() == [0.125, 0.125, 1.0, 448.0]
    assert scale[4].isnan()


def test_scales_are_taken_as_bytes_or_as_the_formats_own_dtype():
    for fmt, own in ((NVFP4, torch.float8_e4m3fn), (MXFP4, torch.float8_e8m0fnu)):
        assert torch.equal(scale_codes(BYTES, fmt), BYTES)
        assert torch.equal(scale_codes(BYTES.view(own), fmt), BYTES)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mxfp4_scale(torch.ones(2), "flor"), "'flor'; did you mean 'floor'"),
        (lambda: mxfp4_scale(torch.ones(2, dtype=torch.bfloat16)), r"float32, got torch.bfloat16 \[2\]"),
        (lambda: scale_codes(torch.ones(2, 4), NVFP4), r"nvfp4 scales \[2, 4\] are torch.float32"),
        (lambda: scale_codes(BYTES.view(torch.float8_e4m3fn), MXFP4), "float8_e8m0fnu or torch.uint8"),
    ],
)
def test_wrong_input_is_refused_and_named(call, says):
    with pytest.raises(UsageError, match=says):
        call()
