"""What cards before Hopper run, on a Hopper card: code for SM80 that the driver compiles for it."""

import dataclasses

import pytest
import torch

from halfbyte.conformance import data, oracle
from halfbyte.kernels import Packed
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda import paths
from halfbyte_cuda_marlin.cuda.dense import Dense
from halfbyte_cuda_marlin.cuda.linear import MarlinCuda

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an SM80 card"
    ),
]

#: Numbers of rows on both sides of every switch, then one of many.
ROWS = (1, 3, 8, 9, 16, 17, 40, 64, 65, 200)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("n", "k"), [(33, 160), (1000, 1440)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
def test_any_number_of_rows_is_right(scheme: str, dtype: torch.dtype, n: int, k: int, bias: bool):
    kernel, weights = MarlinCuda(arch="compute_80"), data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype, bias=bias)
    weights = dataclasses.replace(weights, matrix=weights.matrix.to("cuda"))
    packed = Packed(weights.problem(dtype), kernel.prepare(weights, weights.problem(dtype)))
    added = None if weights.matrix.bias is None else weights.matrix.bias.to(dtype)
    for rows in ROWS:
        x = data.activations(rows, k, dtype).cuda()
        expected = oracle.linear(x, weights, None).values.cuda()
        error = (kernel.apply(x, packed, added).double() - expected).norm() / expected.norm()
        assert error < 2.5e-3, rows


def test_many_rows_of_a_large_matrix_are_computed_in_parts():
    kernel, weights = (
        MarlinCuda(arch="compute_80"),
        data.linear_weights(SCHEMES["nvfp4-w4a16"], 9000, 4096, dtype=torch.bfloat16),
    )
    weights = dataclasses.replace(weights, matrix=weights.matrix.to("cuda"))
    packed = Packed(weights.problem(torch.bfloat16), kernel.prepare(weights, weights.problem(torch.bfloat16)))
    x = data.activations(100, 4096, torch.bfloat16).cuda()
    path = paths.path((100, 9000, 4096), packed["units"].shape, x.dtype, x.device, "compute_80")
    assert isinstance(path, Dense)
    expected = oracle.linear(x, weights, None).values.cuda()
    error = (kernel.apply(x, packed, None).double() - expected).norm() / expected.norm()
    assert error < 2.5e-3
