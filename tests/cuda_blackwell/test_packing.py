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


def by_formula(linear: torch.Tensor) -> torch.Tensor:
    rows, columns = linear.shape
    wide, tall = -(-columns // 4) * 4, -(-rows // 128) * 128
    flat = torch.zeros(tall * wide, dtype=torch.uint8)
    for r, c in itertools.product(range(rows), range(columns)):
        offset = (r // 128 * (wide // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        flat[offset] = linear[r, c]
    return flat.view(tall, wide)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_swizzle_is_the_closed_formula(shape: tuple[int, int]):
    linear = scales(*shape)
    assert torch.equal(packing.swizzle_128x4(linear), by_formula(linear))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_of_padding_is_zero_and_the_shape_is_exact(shape: tuple[int, int]):
    swizzled = packing.swizzle_128x4(scales(*shape))
    assert tuple(swizzled.shape) == packing.padded_scale_shape(*shape)
    assert swizzled.is_contiguous()
    assert int((swizzled != 0).sum()) == shape[0] * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_flashinfer_reads_our_swizzle_back(shape: tuple[int, int]):
    library = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4", reason="flashinfer-python is not installed")
    linear = scales(*shape)
    assert torch.equal(library._unswizzle_sf_128x4(packing.swizzle_128x4(linear), *shape), linear)


def test_every_expert_of_a_stack_is_swizzled_and_padded_by_itself():
    stack = scales(3, 130, 5)
    expected = torch.stack([by_formula(one) for one in stack])
    assert torch.equal(packing.swizzle_128x4(stack), expected)


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
