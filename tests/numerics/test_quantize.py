from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte.errors import UsageError
from halfbyte.formats import MXFP4, NVFP4
from halfbyte.numerics import (
    SCALE_RULES,
    TIES,
    GlobalScale,
    dequantize,
    fake_quantize,
    global_scale_for,
    quantize,
    scale_codes,
)

FORMATS = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
FLOATS = st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100)


def scale_of(fmt, multiplier=0.01):
    return multiplier if fmt.has_global_scale else None


def special_rows() -> torch.Tensor:
    """[R, 64] float32: zeros of both signs, subnormals, the largest numbers, infinity and NaN, and random rows."""
    rows = [torch.zeros(64), -torch.zeros(64), torch.full((64,), 2.0**-149), torch.randn(64) * 2.0**-127]
    rows += [torch.randn(64).clamp(-1, 1) * 3e38, torch.full((64,), 3.4e38)]
    for value in (math.inf, -math.inf, math.nan):
        row = torch.randn(64)
        row[5] = value
        rows.append(row)
    rows += [torch.randn(64) * 2.0**exponent for exponent in range(-140, 120, 4)]
    return torch.stack(rows)


def oracle_rows(fmt) -> torch.Tensor:
    """Special rows; without NaN for MXFP4, where the oracle's answer depends on the tensor's size."""
    rows = special_rows()
    return rows if fmt is NVFP4 else rows[~rows.isnan().any(-1)]


@FORMATS
@pytest.mark.parametrize("divisor", [1.0, 2688 / 3.7, 31337.0, 1e-3])
def test_fake_quantization_is_that_of_compressed_tensors(fmt, divisor, oracle_fake_quantize, same_bits):
    stored = torch.tensor([divisor]) if fmt.has_global_scale else None
    multiplier = None if stored is None else stored.double().reciprocal()
    for x in (oracle_rows(fmt), torch.randn(4, 3, 128) * 2, torch.randn(64, 512)):
        same_bits(fake_quantize(x, fmt, global_scale=multiplier), oracle_fake_quantize(x, fmt, stored))


def test_nvfp4_fake_quantization_is_that_of_compressed_tensors_where_scales_are_ties(oracle_fake_quantize, same_bits):
    numbers = torch.arange(1, 127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    for divisor in (torch.rand(64) * 1e4 + 1).unsqueeze(-1):
        at = 6 * ties / divisor
        amax = torch.cat((at, at.nextafter(torch.tensor(0.0)), at.nextafter(torch.tensor(1e9))))
        x = amax.unsqueeze(-1) * torch.linspace(-1, 1, 16)
        multiplier = divisor.double().reciprocal()
        same_bits(fake_quantize(x, NVFP4, global_scale=multiplier), oracle_fake_quantize(x, NVFP4, divisor))


def test_mxfp4_fake_quantization_is_that_of_compressed_tensors_in_bfloat16(oracle_fake_quantize, same_bits):
    for x in (oracle_rows(MXFP4).bfloat16(), torch.randn(64, 512, dtype=torch.bfloat16)):
        same_bits(fake_quantize(x, MXFP4), oracle_fake_quantize(x, MXFP4))


@FORMATS
def test_packed_values_and_scales_are_those_that_compressed_tensors_stores(fmt, oracle_quantize, same_bits):
    rows = special_rows()
    # Groups whose scale is NaN agree in that scale; their codes mean nothing and differ.
    rows = rows[(rows.abs() < 1.75 * 2.0**127).all(-1)]
    for weight in (torch.randn(64, 256), torch.randn(8, 64).bfloat16().float(), rows):
        divisor = global_scale_for(weight).reciprocal().float().reshape(1) if fmt.has_global_scale else None
        multiplier = None if divisor is None else divisor.double().reciprocal()
        packed, scales = quantize(weight, fmt, global_scale=multiplier)
        expected_packed, expected_scales = oracle_quantize(weight, fmt, divisor)
        same_bits(packed, expected_packed)
        same_bits(scales, expected_scales)


@FORMATS
def test_dequantization_is_that_of_compressed_tensors_for_every_byte_and_scale(fmt, oracle_dequantize, same_bits):
    packed = torch.randint(0, 256, (256, 256), dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).unsqueeze(-1).expand(256, 512 // fmt.group_size)
    for divisor in (torch.rand(8) * 1e5).tolist():
        stored = torch.tensor([divisor]) if fmt.has_global_scale else None
        multiplier = None if stored is None else stored.double().reciprocal()
        actual = dequantize(packed, codes.contiguous(), fmt, global_scale=multiplier)
        same_bits(actual, oracle_dequantize(packed, codes, fmt, stored))


def test_dequantization_of_a_checkpoint_is_that_of_compressed_tensors(checkpoint, oracle_dequantize, same_bits):
    tensors = load_file(checkpoint / "model.safetensors")
    layers = [name.removesuffix("weight_packed") for name in tensors if name.endswith("weight_packed")]
    assert layers
    for layer in layers:
        packed, scales = tensors[f"{layer}weight_packed"], tensors[f"{layer}weight_scale"]
        stored = tensors.get(f"{layer}weight_global_scale")
        fmt, multiplier = (MXFP4, None) if stored is None else (NVFP4, stored.double().reciprocal())
        expected = oracle_dequantize(packed, scale_codes(scales, fmt), fmt, stored)
        same_bits(dequantize(packed, scales, fmt, global_scale=multiplier), expected)


@FORMATS
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_then_dequantize_is_fake_quantize(fmt, rule, ties, dtype, same_bits):
    x = torch.cat((special_rows(), torch.randn(16, 64))).to(dtype)
    options = {"global_scale": scale_of(fmt), "scale_rule": rule, "ties": ties}
    packed, scales = quantize(x, fmt, **options)
    assert packed.dtype == torch.uint8
    assert scales.dtype == (torch.float8_e4m3fn if fmt is NVFP4 else torch.uint8)
    back = dequantize(packed, scales, fmt, global_scale=scale_of(fmt), dtype=dtype)
    same_bits(back, fake_quantize(x, fmt, **options))


@FORMATS
@given(values=st.lists(FLOATS, min_size=32, max_size=32))
@example(values=[2.0**-126] + [0.0] * 31)
def test_quantized_values_lie_on_the_grid_near_their_origin(fmt, values):
    x = torch.tensor(values)
    scale = global_scale_for(x) if fmt.has_global_scale else None
    packed, scales = quantize(x, fmt, global_scale=scale, scale_rule="ceil")
    back = dequantize(packed, scales, fmt, global_scale=scale).double()
    amax = x.double().abs().reshape(-1, fmt.group_size).amax(-1).repeat_interleave(fmt.group_size)
    # The widest gap of E2M1 is 2 of 6, an E8M0 scale is at most twice too large, an E4M3 scale at most 1/16 off; below
    # the least scale (2**-9 of the 448 that the largest magnitude has) everything is lost, and so it is where the
    # divisor 2688 / amax is beyond float32.
    largest = float(x.abs().max())
    lost = fmt is NVFP4 and largest * torch.finfo(torch.float32).max < 2688
    least = largest if lost else largest / 448 * 2.0**-9 + 2.0**-127
    assert ((back - x.double()).abs() <= amax * (1 / 3 if fmt is MXFP4 else 1 / 4) + least).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(values=st.lists(FLOATS, min_size=32, max_size=32))
def test_mxfp4_numbers_are_their_own_quantization_under_every_rule(rule, values):
    x = fake_quantize(torch.tensor(values), MXFP4, scale_rule=rule)
    assert torch.equal(fake_quantize(x, MXFP4, scale_rule=rule), x)


@FORMATS
@given(values=st.lists(FLOATS, min_size=32, max_size=32))
def test_quantization_is_symmetric_about_zero(fmt, values):
    x = torch.tensor(values)
    of_negated, of_x = (fake_quantize(t, fmt, global_scale=scale_of(fmt)) for t in (-x, x))
    assert torch.equal(of_negated, -of_x)


@FORMATS
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_groups_of_zeros_stay_zeros_beside_others(fmt, zero):
    x = torch.cat((torch.full((1, 32), zero), torch.randn(1, 32)), dim=-1)
    assert torch.equal(fake_quantize(x, fmt, global_scale=scale_of(fmt))[:, :32], torch.zeros(1, 32))


@FORMATS
def test_groups_of_zeros_stay_zeros_where_subnormal_numbers_are_flushed(fmt):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        packed, _ = quantize(torch.zeros(64), fmt, global_scale=scale_of(fmt))
        assert not packed.any()
    finally:
        torch.set_flush_denormal(False)


@FORMATS
def test_nan_spoils_its_own_group_only(fmt):
    x = torch.randn(64)
    x[3] = math.nan
    is_nan = fake_quantize(x, fmt, global_scale=scale_of(fmt)).isnan()
    assert is_nan[: fmt.group_size].all()
    assert not is_nan[fmt.group_size :].any()


def test_infinity_saturates_in_nvfp4_and_is_nan_in_mxfp4():
    x = torch.full((32,), -math.inf)
    assert fake_quantize(x, NVFP4, global_scale=0.5).tolist() == [-6 * 448 * 0.5] * 32
    assert fake_quantize(x, MXFP4).isnan().all()


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1,), ()])
def test_global_scales_of_rows_act_row_by_row(shape, same_bits):
    scales = torch.rand(shape, dtype=torch.float64) + 0.1
    lead = (6, 5) if shape == (6, 1) else (6,)
    x = torch.randn(*lead, 32)
    each = scales.expand(lead).flatten()
    expected = [
        fake_quantize(row, NVFP4, global_scale=s.item()) for row, s in zip(x.reshape(-1, 32), each, strict=True)
    ]
    packed, codes = quantize(x, NVFP4, global_scale=scales)
    for ready in (scales, GlobalScale.of(scales)):
        back = dequantize(packed, codes, NVFP4, global_scale=ready)
        same_bits(back, torch.stack(expected).reshape(x.shape))


@FORMATS
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (64,), (2, 3, 64)])
def test_any_shape_is_kept(fmt, shape):
    x = torch.randn(shape)
    packed, scales = quantize(x, fmt, global_scale=scale_of(fmt))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert scales.shape == (*shape[:-1], shape[-1] // fmt.group_size)
    assert dequantize(packed, scales, fmt, global_scale=scale_of(fmt)).shape == shape
    assert fake_quantize(x, fmt, global_scale=scale_of(fmt)).shape == shape


@FORMATS
def test_inputs_may_be_strided_and_are_not_changed(fmt, same_bits):
    x = torch.randn(64, 8).t()
    before = x.clone()
    same_bits(fake_quantize(x, fmt, global_scale=scale_of(fmt)), fake_quantize(before, fmt, global_scale=scale_of(fmt)))
    same_bits(x, before)


@FORMATS
def test_compiled_as_one_graph_and_with_fake_tensors_it_does_the_same(fmt, same_bits):
    ready = GlobalScale.of(0.01) if fmt.has_global_scale else None

    def both(x):
        packed, scales = quantize(x, fmt, global_scale=ready)
        return dequantize(packed, scales, fmt, global_scale=ready), fake_quantize(x, fmt, global_scale=scale_of(fmt))

    x = torch.randn(4, 64)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), both(x), strict=True):
        same_bits(actual, expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [tuple(t.shape) for t in both(mode.from_tensor(x))] == [(4, 64), (4, 64)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize(torch.zeros(2, 40), MXFP4), r"\[2, 40\] is not a multiple of mxfp4's group of 32; pad"),
        (lambda: quantize(torch.zeros(2, 32).int(), MXFP4), r"int32 \[2, 32\]; convert"),
        (lambda: quantize(torch.zeros(2, 32), MXFP4, scale_rule="up"), "unknown MXFP4 scale rule 'up'"),
        (lambda: fake_quantize(torch.zeros(2, 32), MXFP4, ties="odd"), "unknown tie rule 'odd'"),
        (lambda: quantize(torch.zeros(2, 32), NVFP4), "nvfp4 needs a global scale"),
        (lambda: quantize(torch.zeros(2, 32), MXFP4, global_scale=1.0), "mxfp4 has no global scale"),
        (lambda: quantize(torch.zeros(2, 32), NVFP4, global_scale=torch.ones(3)), r"\[3\] does not broadcast.*\[2\]"),
        (lambda: quantize(torch.zeros(()), MXFP4), r"\[\] is not a multiple"),
        (
            lambda: dequantize(torch.zeros(2, 16).byte(), torch.zeros(2, 2).byte(), MXFP4),
            r"\[2, 16\] \(K=32\) and scales \[2, 2\]",
        ),
        (lambda: dequantize(torch.zeros(2, 16), torch.zeros(2, 1).byte(), MXFP4), "must be uint8"),
        (
            lambda: dequantize(torch.zeros(2, 16).byte(), torch.zeros(2, 1).byte(), MXFP4, dtype=torch.float64),
            "float64; choose one of float32",
        ),
    ],
)
def test_wrong_input_is_refused_and_named(call, says):
    with pytest.raises(UsageError, match=says):
        call()
