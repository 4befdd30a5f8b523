"""Layouts, byte for byte: against the closed formula, and against the code that FlashInfer itself has for a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte_cuda_blackwell import packing

SHAPES = [(1, 1), (8, 4), (9, 5), (128, 4), (120, 4), (130, 7), (200, 16), (256, 8), (384, 12)]


def scales(*shape: int) -> torch.Tensor:
    """Random bytes, none of them zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


def by_formula(linear: torch.Tensor, tile: int) -> torch.Tensor:
    rows, columns = linear.shape
    wide, tall = -(-columns // 4) * 4, -(-rows // tile) * tile
    flat = torch.zeros(tall * wide, dtype=torch.uint8)
    for r, c in itertools.product(range(rows), range(columns)):
        if tile == 128:
            offset = (r // 128 * (wide // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        else:
            offset = r // 8 * (wide * 8) + c // 4 * 32 + r % 8 * 4 + c % 4
        flat[offset] = linear[r, c]
    return flat.view(tall, wide)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzles_are_the_closed_formulas(shape: tuple[int, int]):
    linear = scales(*shape)
    assert torch.equal(packing.swizzle_128x4(linear), by_formula(linear, 128))
    assert torch.equal(packing.swizzle_8x4(linear), by_formula(linear, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_of_padding_is_zero_and_the_shape_is_exact(shape: tuple[int, int]):
    for tile, swizzle in ((128, packing.swizzle_128x4), (8, packing.swizzle_8x4)):
        swizzled = swizzle(scales(*shape))
        assert tuple(swizzled.shape) == packing.padded_scale_shape(*shape, tile)
        assert swizzled.is_contiguous()
        assert int((swizzled != 0).sum()) == shape[0] * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_flashinfer_reads_our_swizzle_back(shape: tuple[int, int]):
    library = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4", reason="flashinfer-python is not installed")
    linear = scales(*shape)
    assert torch.equal(library._unswizzle_sf_128x4(packing.swizzle_128x4(linear), *shape), linear)


@pytest.mark.parametrize("shape", SHAPES)
def test_unswizzling_gives_the_linear_scales_back(shape: tuple[int, int]):
    linear = scales(*shape)
    assert torch.equal(packing.unswizzle_128x4(packing.swizzle_128x4(linear), *shape), linear)
    assert torch.equal(packing.unswizzle_8x4(packing.swizzle_8x4(linear), *shape), linear)


def test_every_expert_of_a_stack_is_swizzled_and_padded_by_itself():
    stack = scales(3, 130, 5)
    expected = torch.stack([by_formula(one, 128) for one in stack])
    assert torch.equal(packing.swizzle_128x4(stack), expected)
    assert torch.equal(packing.unswizzle_128x4(expected, 130, 5), stack)


@pytest.mark.parametrize("rows", [32, 128, 384])
def test_shuffled_rows_are_flashinfers(rows: int):
    library = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    matrix = scales(rows, 24)
    assert torch.equal(packing.shuffled_rows(matrix), library.shuffle_matrix_a(matrix, 128))
    assert torch.equal(packing.shuffled_rows(matrix[None])[0], packing.shuffled_rows(matrix))


def test_the_rows_of_a_block_are_shuffled_as_documented():
    order = packing.shuffled_rows(torch.arange(64)[:, None])[:, 0].tolist()
    block = [*range(0, 32, 4), *range(1, 32, 4), *range(2, 32, 4), *range(3, 32, 4)]
    assert order == [*block, *(32 + row for row in block)]


def test_rows_that_are_no_whole_block_are_refused():
    with pytest.raises(UsageError, match="blocks of 32"):
        packing.shuffled_rows(torch.zeros(33, 4))


def test_only_bytes_are_swizzled():
    with pytest.raises(UsageError, match="give their bytes"):
        packing.swizzle_128x4(torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
