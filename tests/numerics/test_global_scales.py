from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.numerics import GlobalScale, global_scale_for, scale_table

E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()


def random_divisors(count: int) -> torch.Tensor:
    """float32 numbers of every significand and of exponents -100 to 100."""
    significands = torch.randint(1 << 23, 1 << 24, (count,)).float()
    return torch.ldexp(significands, torch.randint(-124, 77, (count,)))


def test_the_reciprocal_in_float64_divides_exactly_for_every_e4m3_code(same_bits):
    for divisors in random_divisors(1 << 14).split(1 << 12):
        table = scale_table(divisors.double().reciprocal())
        same_bits(table, E4M3 / divisors.unsqueeze(-1))


def test_a_float32_reciprocal_would_not_do():
    divisors = random_divisors(1 << 10)
    assert not torch.equal(E4M3[1:126] * divisors.reciprocal().unsqueeze(-1), E4M3[1:126] / divisors.unsqueeze(-1))


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_the_divisor_comes_back_from_its_reciprocal(divisor):
    assert GlobalScale.of(1 / divisor).divisor.item() == divisor


def test_a_float32_multiplier_multiplies_exactly(same_bits):
    multipliers = random_divisors(1 << 10)
    same_bits(scale_table(multipliers.double()), E4M3 * multipliers.unsqueeze(-1))


def test_rows_take_the_global_scale_of_their_part(same_bits):
    scales = torch.tensor([0.5, 0.25], dtype=torch.float64)
    part = torch.tensor([0, 0, 1])
    by_part, by_row = GlobalScale.of(scales).rows(part), GlobalScale.of(scales[part])
    same_bits(by_part.table, by_row.table)
    same_bits(by_part.divisor, by_row.divisor)


def test_the_scale_for_a_tensor_is_the_reciprocal_of_compressed_tensors_divisor():
    for tensor in (torch.randn(64), torch.randn(64, dtype=torch.bfloat16) * 1e-3, torch.zeros(4)):
        oracle = generate_gparam(tensor.float().min(), tensor.float().max())
        scale = global_scale_for(tensor)
        assert scale.dtype == torch.float64
        assert scale.item() == 1 / oracle.double().item()


@pytest.mark.parametrize("tensor", [torch.zeros(0, 4), torch.tensor([math.nan]), torch.tensor([math.inf])])
def test_the_scale_for_a_tensor_without_a_largest_magnitude_is_one(tensor):
    assert global_scale_for(tensor).item() == 1


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_number_that_is_no_scale_is_refused(scale):
    with pytest.raises(UsageError, match="positive and finite"):
        GlobalScale.of(scale)


def test_integers_are_no_scales():
    with pytest.raises(UsageError, match=r"int64 \[2\]"):
        scale_table(torch.tensor([1, 2]))
