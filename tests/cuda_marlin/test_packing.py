"""The packed layout, read back as the kernels' threads read it: an emulation of mma.m16n8k16's A fragments."""

import itertools

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.formats import FORMATS
from halfbyte.numerics import dequantize
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, empty_units, pack_codes, pack_scales


def bits_of(words: list[int], dtype: torch.dtype) -> list[int]:
    """The eight 32-bit fragment registers that `decode` in kernels/fp4.cuh makes of a couple."""

    def rotated(word: int, by: int) -> int:
        return (word << by | word >> (32 - by)) & 0xFFFFFFFF

    def chosen(a: int, b: int, mask: int) -> int:
        return a & mask | b & ~mask & 0xFFFFFFFF

    w0, w1 = words
    if dtype == torch.bfloat16:
        merged, mask = chosen(w0, w1 << 2, 0x06030603), 0x81C081C0
        registers = [w0, w0 << 4, rotated(w0, 10), merged << 6, w1, w1 << 4, rotated(w1, 10), rotated(merged, 12)]
        return [register & mask for register in registers]
    mask, low = 0x8E008E00, 0x0E000E00
    return [
        register & mask
        for word in (w0, w1)
        for register in (word, word << 3, chosen(word << 6, word << 1, low), chosen(word << 9, word << 2, low))
    ]


def value_of(bits: int, dtype: torch.dtype) -> float:
    """A 16-bit pattern as the code's value: without the exponent bias that the kernels fold into the end."""
    number = torch.tensor([bits - (1 << 16) if bits >> 15 else bits], dtype=torch.int16).view(dtype)
    return float(number.double()) * (2.0**126 if dtype == torch.bfloat16 else 2.0**14)


def read_back(units: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The E2M1 values [N, K] that the threads of all warps see."""
    tiles, columns, _ = units.shape
    result = torch.full((tiles * 32, columns * 128), float("nan"), dtype=torch.float64)
    codes = units[:, :, :CODE_BYTES].contiguous().view(torch.int32).view(tiles, columns, 2, 2, 32, 2, 2)
    for tile, unit, part, half, lane, couple in itertools.product(
        range(tiles), range(columns), range(2), range(2), range(32), range(2)
    ):
        words = [int(word) & 0xFFFFFFFF for word in codes[tile, unit, part, half, lane, couple]]
        group, thread = divmod(lane, 4)
        for place, register in enumerate(bits_of(words, dtype)):
            step, own = divmod(place, 4)
            row = tile * 32 + part * 16 + group + own % 2 * 8
            column = unit * 128 + half * 64 + couple * 32 + step * 16 + own // 2 * 8 + thread * 2
            result[row, column] = value_of(register & 0xFFFF, dtype)
            result[row, column + 1] = value_of(register >> 16, dtype)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
@pytest.mark.parametrize(("n", "k"), [(32, 128), (33, 160)])
def test_every_thread_finds_the_codes_of_its_fragments(scheme: str, dtype: torch.dtype, n: int, k: int):
    matrix = data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype).matrix
    units = empty_units(matrix)
    pack_codes(matrix, dtype, units)
    fmt = matrix.format
    ones = torch.ones_like(matrix.scales.float()).to(torch.float8_e4m3fn) if fmt.scale == "e4m3" else None
    plain = torch.full_like(matrix.scales, 127) if ones is None else ones
    expected = dequantize(matrix.packed, plain, fmt, global_scale=None if ones is None else 1.0).double()
    if fmt.scale == "e4m3":  # groups whose scale is zero have zero codes
        expected[(matrix.scales.view(torch.uint8) & 0x7F == 0).repeat_interleave(fmt.group_size, dim=1)] = 0
    found = read_back(units, dtype)
    assert torch.equal(found[:n, :k], expected)
    assert not found[n:].any()
    assert not found[:, k:].any()


def scale_value(code: int, fmt: str, dtype: torch.dtype) -> float:
    """What a scale byte stands for in the kernels' multiplication, without the factor of the row."""
    bits = code << 4 | 0x6000 if (dtype, fmt) == (torch.bfloat16, "nvfp4") else code << 7
    number = torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(dtype)
    return float(number.double()) / (2.0**126 if dtype == torch.bfloat16 else 2.0**14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_and_row_factors_multiply_to_the_checkpoint_scale(fmt: str, dtype: torch.dtype):
    matrix = data.linear_weights(SCHEMES[f"{fmt}-w4a16"], 32, 128, dtype=dtype).matrix
    units = empty_units(matrix)
    rows = pack_scales(matrix, dtype, units).double()
    raw = matrix.scales.double() if fmt == "nvfp4" else torch.exp2(matrix.scales.double() - 127)
    wanted = raw if matrix.global_scale is None else raw * matrix.global_scale
    stored = units[0, 0, CODE_BYTES:]
    for row, group in itertools.product(range(32), range(raw.shape[1])):
        part, half, g = row // 16, row % 16 // 8, row % 8
        if fmt == "nvfp4":  # [part][g][word][half][parity]
            place = part * 128 + g * 16 + group // 2 * 4 + half * 2 + group % 2
        else:  # [g][part][pair][half][parity]
            place = g * 16 + part * 8 + group // 2 * 4 + half * 2 + group % 2
        if raw[row, group] == 0:
            continue
        found = scale_value(int(stored[place]), fmt, dtype) * rows[row]
        assert found == pytest.approx(float(wanted[row, group]), rel=1e-6)
