"""What only a Hopper card can show; `pytest -m cuda` there runs it."""

import dataclasses

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.kernels import Packed
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda.card_packing import pack_codes_on_card
from halfbyte_cuda_marlin.cuda.cards import card
from halfbyte_cuda_marlin.cuda.linear import MarlinCuda
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, empty_units, pack_codes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
@pytest.mark.parametrize(("n", "k"), [(32, 128), (33, 160), (1000, 1440), (4096, 4096)])
def test_the_packing_kernel_packs_as_torch_does(scheme: str, dtype: torch.dtype, n: int, k: int):
    matrix = data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype).matrix.to("cuda")
    ours, torchs = empty_units(matrix), empty_units(matrix)
    pack_codes_on_card(matrix, dtype, ours, card(0).arch)
    pack_codes(matrix, dtype, torchs)
    assert torch.equal(ours[:, :, :CODE_BYTES], torchs[:, :, :CODE_BYTES])


@pytest.mark.parametrize("rows", [1, 8, 16, 64], ids=str)
def test_weights_that_were_written_right_before_a_call_are_used(rows: int):
    kernel, packed = MarlinCuda(), []
    for seed in range(2):
        weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], 4096, 4096, dtype=torch.bfloat16, seed=seed)
        weights = dataclasses.replace(weights, matrix=weights.matrix.to("cuda"))
        problem = weights.problem(torch.bfloat16)
        packed.append(Packed(problem, kernel.prepare(weights, problem)))
    x, busy = data.activations(rows, 4096, torch.bfloat16).cuda(), torch.randn(2048, 2048, device="cuda")
    expected = [kernel.apply(x, one, None) for one in packed]
    assert not torch.equal(*expected)
    changing = Packed(packed[0].problem, {name: tensor.clone() for name, tensor in packed[0].tensors.items()})
    for turn in range(50):
        busy @ busy
        kernel.apply(x, changing, None)  # lets the next kernel start early
        for name, tensor in changing.tensors.items():
            tensor.copy_(packed[turn % 2][name])
        assert torch.equal(kernel.apply(x, changing, None), expected[turn % 2])
