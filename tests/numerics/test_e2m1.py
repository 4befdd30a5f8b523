from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.numerics import TIES, decode, decode_packed, encode, pack, unpack

GRID = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_code(value: float, ties: str) -> int:
    """By definition, in exact fractions."""
    magnitude = abs(Fraction(value))
    distances = [abs(magnitude - point) for point in GRID]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = best[0] if len(best) == 1 or ties == "toward-zero" else next(c for c in best if c % 2 == 0)
    return code | (8 if value < 0 else 0)


def around_every_boundary() -> list[float]:
    points = [float(p) for p in GRID] + [float((a + b) / 2) for a, b in pairwise(GRID)]
    exact = torch.tensor(points)
    both = torch.cat((exact, exact.nextafter(torch.tensor(9.0)), exact.nextafter(torch.tensor(-9.0))))
    return torch.cat((both, -both)).tolist()


@pytest.mark.parametrize("ties", TIES)
def test_encode_finds_the_nearest_number_at_and_beside_every_boundary(ties):
    values = around_every_boundary()
    assert encode(torch.tensor(values), ties).tolist() == [nearest_code(value, ties) for value in values]


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), ties=st.sampled_from(TIES)
)
def test_encode_finds_the_nearest_number_for_any_finite_float(values, ties):
    assert encode(torch.tensor(values), ties).tolist() == [nearest_code(value, ties) for value in values]


def test_special_values():
    inf, tiny = math.inf, 2.0**-149
    values = torch.tensor([inf, -inf, math.nan, -math.nan, 0.0, -0.0, tiny, -tiny, 1e30, -1e30])
    assert encode(values).tolist() == [7, 15, 7, 7, 0, 0, 0, 8, 7, 15]


def test_decode_knows_all_sixteen_numbers_and_negative_zero(same_bits):
    expected = torch.tensor([float(p) for p in GRID] + [-float(p) for p in GRID])
    same_bits(decode(BYTES[:16]), expected)


def test_encode_is_the_inverse_of_decode_but_for_negative_zero():
    expected = BYTES[:16].clone()
    expected[8] = 0
    for ties in TIES:
        assert torch.equal(encode(decode(BYTES[:16]), ties), expected)


def test_rounding_and_signs_are_those_of_compressed_tensors(same_bits):
    values = torch.cat((torch.tensor(around_every_boundary()), torch.randn(4096) * 3, torch.tensor([-0.0, 0.0])))
    same_bits(decode(encode(values)), cast_to_fp4(values.clamp(-6, 6)))


def test_pack_and_unpack_are_those_of_compressed_tensors(same_bits):
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    packed = pack(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(decode(codes)))
    assert torch.equal(unpack(packed), codes)
    same_bits(decode(unpack(packed)), unpack_fp4_from_uint8(packed, 8, 64, dtype=torch.float32))


def test_the_low_nibble_is_the_even_column():
    assert pack(torch.tensor([[3, 12]], dtype=torch.uint8)).tolist() == [[0xC3]]


def test_every_byte_unpacks_and_packs_to_itself_in_any_shape(same_bits):
    for shape in ((256,), (2, 128), (4, 8, 8)):
        packed = BYTES.reshape(shape)
        assert torch.equal(pack(unpack(packed)), packed)
        same_bits(decode_packed(packed), decode(unpack(packed)))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_tensors_stay_empty(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    assert unpack(pack(codes)).shape == shape
    assert decode_packed(pack(codes)).shape == shape


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: encode(torch.zeros(3, dtype=torch.bfloat16)), r"bfloat16 \[3\].*\.float\(\)"),
        (lambda: encode(torch.zeros(3), "evn"), "'evn'; did you mean 'even'"),
        (lambda: pack(torch.zeros(2, 5, dtype=torch.uint8)), r"\[2, 5\].*odd"),
        (lambda: pack(torch.zeros(2, 4)), "uint8"),
        (lambda: unpack(torch.zeros(2, 4)), "uint8"),
        (lambda: decode(torch.zeros(2, 4)), "uint8"),
        (lambda: decode_packed(torch.zeros((), dtype=torch.uint8)), "dimension"),
    ],
)
def test_wrong_input_is_refused_and_named(call, says):
    with pytest.raises(UsageError, match=says):
        call()
