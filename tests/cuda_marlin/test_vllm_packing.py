"""Scales and biases in Marlin's order, against the formats' definitions."""

import pytest
import torch

from halfbyte.conformance import data, oracle
from halfbyte.errors import CheckpointError
from halfbyte.formats import FORMATS
from halfbyte_cuda_marlin.vllm.packing import pack_scales, permuted_bias
from support import vllm_double

DTYPES = (torch.bfloat16, torch.float16)
#: What the kernel multiplies codes by besides: it reads them without their exponent's bias.
CODES = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


def effective(matrix, dtype: torch.dtype) -> torch.Tensor:
    """What every code of [N, K] is multiplied by in the end: scale, global scale, row."""
    scales = pack_scales(matrix, dtype)
    if scales.factor is None:
        numbers = torch.exp2(scales.codes.double() - 127)
    else:
        numbers = vllm_double._in_registers(scales.codes, dtype) * scales.factor * CODES[dtype]
    numbers = numbers[:, vllm_double._scale_places(matrix.n)].T
    if scales.rows is not None:
        numbers = numbers * scales.rows.double()[:, None]
    return numbers.repeat_interleave(matrix.k // numbers.shape[1], dim=1)


def expected(matrix) -> torch.Tensor:
    numbers = oracle.decode_scales(matrix.scales.view(torch.uint8), matrix.format)
    factor = 1.0 if matrix.global_scale is None else matrix.global_scale.item()
    return (numbers * factor).repeat_interleave(matrix.format.group_size, dim=1)


def nvfp4(codes: torch.Tensor, dtype: torch.dtype):
    matrix = data.matrix(FORMATS["nvfp4"], codes.shape[0], codes.shape[1] * 16, seed=0, dtype=dtype)
    matrix.scales.view(torch.uint8).copy_(codes)
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("kind", ["random", "zero-groups"])
def test_every_scale_is_where_the_kernel_reads_it(name: str, dtype: torch.dtype, kind: data.WeightKind):
    matrix = data.matrix(FORMATS[name], 192, 256, seed=1, dtype=dtype, kind=kind)
    torch.testing.assert_close(effective(matrix, dtype), expected(matrix), rtol=1e-12, atol=0)


def test_every_e4m3_scale_is_exact_in_float16():
    matrix = nvfp4(torch.arange(0x7F).repeat(64, 1)[:, :0x7C], torch.float16)
    torch.testing.assert_close(effective(matrix, torch.float16), expected(matrix), rtol=1e-12, atol=0)


@pytest.mark.parametrize("low", [0x01, 0x10, 0x20])
def test_sixteen_powers_of_two_are_exact_in_bfloat16_wherever_they_are(low: int):
    """Subnormal scales among them, which have no use in a checkpoint that was normalized and are found elsewhere."""
    codes = torch.arange(low, min(low + 16 * 8 - 24, 0x7F)) if low == 0x01 else torch.arange(low, 0x7F)
    codes = codes[: len(codes) // 4 * 4].repeat(64, 1)
    matrix = nvfp4(codes, torch.bfloat16)
    assert pack_scales(matrix, torch.bfloat16).rows is None
    torch.testing.assert_close(effective(matrix, torch.bfloat16), expected(matrix), rtol=1e-12, atol=0)


def test_rows_of_the_smallest_scales_beside_the_largest_are_exact_in_bfloat16():
    codes = torch.full((64, 8), 0x7E)
    codes[3], codes[40], codes[41] = 0x01, 0x07, 0
    matrix = nvfp4(codes, torch.bfloat16)
    rows = pack_scales(matrix, torch.bfloat16).rows
    assert rows is not None
    torch.testing.assert_close(effective(matrix, torch.bfloat16), expected(matrix), rtol=1e-12, atol=0)


def test_what_vanishes_within_a_row_is_a_hundred_thousandth_of_its_largest_scale():
    matrix = nvfp4(torch.arange(1, 0x7D).repeat(64, 1), torch.bfloat16)
    lost = (effective(matrix, torch.bfloat16) - expected(matrix)).abs().max() / expected(matrix).max()
    assert lost < 1.1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_is_zero(dtype: torch.dtype):
    codes = torch.full((64, 4), 0x38)
    codes[5, 1] = 0x80
    assert not effective(nvfp4(codes, dtype), dtype)[5, 16:32].any()


def test_mxfp4_scales_reach_24_powers_of_two_down_in_float16():
    matrix = data.matrix(FORMATS["mxfp4"], 64, 32 * 25, seed=0, dtype=torch.float16)
    matrix.scales.copy_(torch.arange(100, 125).repeat(64, 1))
    torch.testing.assert_close(effective(matrix, torch.float16), expected(matrix), rtol=1e-12, atol=0)
    # The kernel multiplies codes by scales in float16: the smallest code, 0.5, must not vanish beside any of them.
    numbers = vllm_double._in_registers(pack_scales(matrix, torch.float16).codes, torch.float16)
    products = numbers * 0.5 * CODES[torch.float16]
    assert torch.equal(products.to(torch.float16).double(), products)


def test_a_global_scale_beyond_the_kernel_is_an_error_that_names_the_matrix():
    codes = torch.full((64, 4), 0x7E)
    matrix = nvfp4(codes, torch.bfloat16)
    matrix.global_scale.fill_(2.0**20)
    with pytest.raises(CheckpointError, match=r"conformance.random: global scale 1.04858e\+06 .*HALFBYTE_DENY"):
        pack_scales(matrix, torch.bfloat16)


def test_biases_are_where_the_kernel_reads_them():
    bias = torch.randn(3, 192)
    assert torch.equal(permuted_bias(bias)[:, vllm_double._bias_places(192)], bias)
