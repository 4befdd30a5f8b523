"""What only a Hopper card can show; `pytest -m cuda` there runs it."""

import dataclasses
import threading

import pytest
import torch

from halfbyte import FP4Experts, FP4Linear, Policy
from halfbyte.conformance import data, oracle
from halfbyte.kernels import Packed
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda import wide
from halfbyte_cuda_marlin.cuda.card_packing import pack_codes_on_card
from halfbyte_cuda_marlin.cuda.cards import card
from halfbyte_cuda_marlin.cuda.linear import MarlinCuda
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, empty_units, pack_codes, pack_scales

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


@pytest.mark.parametrize("kind", ["random", "outliers"])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (10_016, 1008), (4096, 14_336)])
def test_few_rows_are_right_and_repeat_where_warps_end_in_another_tile_or_x_comes_in_chunks(n: int, k: int, kind):
    kernel = MarlinCuda()
    weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], n, k, dtype=torch.bfloat16, bias=True)
    weights = dataclasses.replace(weights, matrix=weights.matrix.to("cuda"))
    problem, bias = weights.problem(torch.bfloat16), weights.matrix.bias
    packed = Packed(problem, kernel.prepare(weights, problem))
    for rows in (1, 5, 8, 9, 16, 24, 32):
        x = data.activations(rows, k, torch.bfloat16, kind=kind).cuda()
        expected, y = oracle.linear(x, weights, None).values, kernel.apply(x, packed, bias)
        assert (y - expected).norm() / expected.norm() < 2.5e-3
        assert all(torch.equal(kernel.apply(x, packed, bias), y) for _ in range(20))


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 256], ids=str)
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


@pytest.mark.parametrize(("n", "k"), [(33, 160), (1000, 1440), (4096, 4096)])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("nvfp4-w4a16", torch.bfloat16), ("mxfp4-w4a16", torch.bfloat16), ("nvfp4-w4a16", torch.float16)],
    ids=str,
)
def test_any_number_of_rows_is_right(scheme: str, dtype: torch.dtype, n: int, k: int):
    kernel, weights = MarlinCuda(), data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype, bias=True)
    weights = dataclasses.replace(weights, matrix=weights.matrix.to("cuda"))
    packed = Packed(weights.problem(dtype), kernel.prepare(weights, weights.problem(dtype)))
    x = data.activations(301, k, dtype, kind="outliers").cuda()
    expected = oracle.linear(x, weights, None).values.cuda()
    assert weights.matrix.bias is not None
    bias = weights.matrix.bias.to(dtype)
    for rows in range(1, 302):
        y = kernel.apply(x[:rows], packed, bias)
        error = (y.double() - expected[:rows]).norm() / expected[:rows].norm()
        assert error < 2.5e-3, rows
        assert torch.equal(kernel.apply(x[:rows], packed, bias), y), rows


@pytest.mark.parametrize("clusters", [1, 3, None], ids=lambda count: f"{count or 'all'}-clusters")
@pytest.mark.parametrize("cluster", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", wide.SHAPES, ids=str)
def test_every_division_of_many_rows_is_right(
    shape: tuple[int, int], cluster: int, clusters: int | None, monkeypatch: pytest.MonkeyPatch
):
    dtype, n, k, m = torch.bfloat16, 1000, 1440, 2 * shape[0] + 17
    weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], n, k, dtype=dtype)
    matrix = weights.matrix.to("cuda")
    units = empty_units(matrix)
    pack_codes_on_card(matrix, dtype, units, card(0).arch)
    rows = pack_scales(matrix, dtype, units)
    tiles, columns, unit_bytes = units.shape
    plan = wide.division(shape, cluster, m, tiles, unit_bytes, card(0).processors)
    if clusters is not None:
        plan = dataclasses.replace(plan, ctas=clusters * cluster)
    monkeypatch.setattr(wide, "plan", lambda *_: plan)
    launch = wide.launcher((m, n, k), (tiles, columns, unit_bytes), dtype, torch.device("cuda", 0), card(0))
    x, results = data.activations(m, k, dtype).cuda(), []
    for _ in range(2):
        results.append(torch.full((m, n), float("nan"), dtype=dtype, device="cuda"))
        launch(x, units, rows, None, results[-1])
    expected = oracle.linear(x, dataclasses.replace(weights, matrix=matrix), None).values.cuda()
    assert (results[0].double() - expected).norm() / expected.norm() < 2.5e-3
    assert torch.equal(*results)


@pytest.mark.parametrize("op", ["linear", "experts"])
def test_a_layer_can_be_called_from_a_thread_that_never_touched_the_card(op: str):
    dtype, policy = torch.bfloat16, Policy(require="marlin.cuda")
    x = data.activations(3, 256, dtype).cuda()
    layer: torch.nn.Module
    if op == "linear":
        layer = FP4Linear(
            data.linear_weights(SCHEMES["nvfp4-w4a16"], 64, 256, dtype=dtype), device="cuda", policy=policy
        )
        inputs: tuple[torch.Tensor, ...] = (x,)
    else:
        weights = data.experts_weights(SCHEMES["mxfp4-w4a16"], 4, 256, 64, dtype=dtype)
        layer = FP4Experts(weights, top_k=2, activation="silu", device="cuda", policy=policy)
        inputs = (x, *(tensor.cuda() for tensor in data.routing(3, 4, 2)))
    with torch.inference_mode():
        expected, found = layer(*inputs), []
    thread = threading.Thread(target=lambda: found.append(layer(*inputs)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
