"""What only a Hopper card can show; `pytest tests/cuda_marlin` there runs it."""

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda import linear
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, empty_units, pack_codes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
@pytest.mark.parametrize(("n", "k"), [(32, 128), (33, 160), (1000, 1440), (4096, 4096)])
def test_the_packing_kernel_packs_as_torch_does(scheme: str, dtype: torch.dtype, n: int, k: int):
    matrix = data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype).matrix.to("cuda")
    ours, torchs = empty_units(matrix), empty_units(matrix)
    linear._pack_codes(matrix, dtype, ours)
    pack_codes(matrix, dtype, torchs)
    assert torch.equal(ours[:, :, :CODE_BYTES], torchs[:, :, :CODE_BYTES])
