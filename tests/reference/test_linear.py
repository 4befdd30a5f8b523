"""The built-in linear kernels against compressed-tensors' numbers in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from halfbyte.errors import CheckpointError
from halfbyte.kernels import Packed
from halfbyte.reference.linear import Dequantized, Reference
from halfbyte.schemes import NVFP4_W4A4, SCHEMES, Scheme
from support.weights import expected_linear, known_linear

#: Relative to the largest |y|: accumulation, and one rounding of y.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
KERNELS = pytest.mark.parametrize("kernel", [Reference(), Dequantized()], ids=["reference", "dequantized"])


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@KERNELS
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [(24,), (16, 8, 24)], ids=["whole", "parts"])
def test_result_is_the_product_with_the_dequantized_weight(
    kernel: Reference, scheme: Scheme, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    weights, known = known_linear(scheme, rows, 96, bias=True)
    problem = weights.problem(dtype)
    packed = Packed(problem, kernel.prepare(weights, problem))
    x = torch.randn(5, 96).to(dtype)
    assert weights.matrix.bias is not None
    y = kernel.apply(x, packed, weights.matrix.bias.to(dtype))
    expected = expected_linear(known, scheme, x)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_both_kernels_compute_the_same_bits(scheme: Scheme) -> None:
    weights, _ = known_linear(scheme, (16, 32), 64)
    problem = weights.problem(torch.bfloat16)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    first, second = (
        kernel.apply(x, Packed(problem, kernel.prepare(weights, problem)), None)
        for kernel in (Reference(), Dequantized())
    )
    assert torch.equal(first, second)


@KERNELS
def test_prepare_shares_no_memory_with_the_weights_and_can_be_repeated(kernel: Reference) -> None:
    weights, _ = known_linear(NVFP4_W4A4, (16,), 64)
    problem = weights.problem(torch.float32)
    own = {tensor.data_ptr() for tensor in weights.matrix.tensors()}
    first, second = kernel.prepare(weights, problem), kernel.prepare(weights, problem)
    for name, tensor in first.items():
        assert tensor.data_ptr() not in own
        assert tensor.data_ptr() != second[name].data_ptr()
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))  # NaN equals NaN


@KERNELS
def test_nvfp4_activations_without_a_calibrated_scale_are_an_error_that_names_the_layer(kernel: Reference) -> None:
    weights, _ = known_linear(NVFP4_W4A4, (16,), 64)
    bare = replace(weights, matrix=replace(weights.matrix, name="model.q_proj", input_global_scale=None))
    with pytest.raises(CheckpointError, match=r"model\.q_proj: nvfp4-w4a4 .* calibrate"):
        kernel.prepare(bare, bare.problem(torch.float32))
