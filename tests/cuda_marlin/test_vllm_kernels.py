"""marlin.vllm over a double of vLLM's operators, under the schemas of both releases."""

from dataclasses import replace

import pytest
import torch

from halfbyte import FP4Experts, FP4Linear
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import errors, tolerance
from halfbyte.decisions import decide
from halfbyte.machines import describe
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.vllm import library, locks
from halfbyte_cuda_marlin.vllm.routing import block_size
from halfbyte_cuda_marlin.vllm.specs import SPECS
from support import vllm_double

LINEAR, EXPERTS = SPECS
DTYPES = (torch.bfloat16, torch.float16)
FORMATS = ("nvfp4-w4a16", "mxfp4-w4a16")


@pytest.fixture(params=sorted(vllm_double.SCHEMAS))
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The operators of a release, on a device that is no card."""
    monkeypatch.setattr(locks, "make", lambda device: torch.zeros(8, dtype=torch.int32, device=device))
    monkeypatch.setattr(locks, "current", lambda layers: layers)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    library.operator.cache_clear()
    with vllm_double.installed(request.param):
        yield request.param
    library.operator.cache_clear()


def here(spec, problem):
    """The resolution that chose the kernel on an H200, as if that were this device."""
    return replace(decide(problem, describe("sm_90"), [("cuda-marlin", spec)]), machine=describe("cpu"))


def check_linear(weights, dtype, rows=7):
    resolution = here(LINEAR, weights.problem(dtype))
    layer = FP4Linear(weights, dtype=dtype, device="cpu", resolution=resolution)
    x = data.activations(rows, weights.matrix.k, dtype, seed=rows)
    found = errors(layer(x), oracle.linear(x, weights, None))
    allowed = tolerance("linear", weights.scheme.weights.name, resolution.problem.dtype, quantizes=False)
    assert found.within(allowed), found
    return layer


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("kind", ["random", "zero-groups", "extreme-scales"])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (64, 64), (128, 192), (100, 96)])
def test_linear_layers_are_right(scheme: str, dtype: torch.dtype, kind: data.WeightKind, n: int, k: int):
    check_linear(data.linear_weights(SCHEMES[scheme], n, k, dtype=dtype, kind=kind, bias=True), dtype)


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", [0x01, 0x07, 0x08, 0x7E])
def test_scales_of_any_size_are_exact_where_a_matrix_has_one(dtype: torch.dtype, code: int):
    weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], 64, 128, dtype=dtype)
    weights.matrix.scales.view(torch.uint8).fill_(code)
    layer = check_linear(weights, dtype)
    assert not any(name.endswith("rows") for name, _ in layer.named_buffers())


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("activation", EXPERTS.activations)
@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_right(scheme: str, dtype: torch.dtype, activation: str, bias: bool):
    check_experts(experts_weights(scheme, dtype, 64, 64, activation=activation, bias=bias), dtype, activation)


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("activation", ["swigluoai", "relu2"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 192), (128, 64), (96, 32)])
def test_experts_of_any_size_are_right(
    scheme: str, dtype: torch.dtype, activation: str, hidden: int, intermediate: int
):
    weights = experts_weights(scheme, dtype, hidden, intermediate, activation=activation, bias=True)
    check_experts(weights, dtype, activation)


@pytest.mark.usefixtures("release")
def test_experts_with_small_rows_of_scales_are_right():
    weights = experts_weights("nvfp4-w4a16", torch.bfloat16, 64, 64, bias=True)
    # A row 18 powers of two below the others, in one expert alone: beyond what the kernel's scales reach.
    for matrix in (weights.up, weights.down):
        scales = matrix.scales.view(torch.uint8)
        scales[1] = 0x7E
        scales[1, 5] = 0x01
        matrix.bias[1, 5] *= 2.0**-17
    layer = check_experts(weights, torch.bfloat16)
    assert {name for name, _ in layer.named_buffers() if name.endswith("rows")} == {
        "packed.up_rows",
        "packed.down_rows",
    }


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_of_other_ranks_add_nothing(scheme: str, tokens: int):
    weights = experts_weights(scheme, torch.bfloat16, 64, 64, bias=True)
    expert_map = torch.full((10,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(5, dtype=torch.int32).flip(0)
    check_experts(weights, torch.bfloat16, tokens=tokens, expert_map=expert_map)


@pytest.mark.parametrize(("slots", "experts", "block"), [(1, 128, 8), (57, 8, 8), (58, 8, 16), (16_384, 8, 64)])
def test_blocks_are_as_large_as_experts_fill_them(slots: int, experts: int, block: int):
    assert block_size(slots, experts) == block


def experts_weights(scheme, dtype, hidden, intermediate, activation="silu", bias=False):
    gated = activation != "relu2"
    return data.experts_weights(
        SCHEMES[scheme], 5, hidden, intermediate, dtype=dtype, gated=gated, shared=True, bias=bias
    )


def check_experts(weights, dtype, activation="silu", tokens=9, expert_map=None):
    resolution = here(EXPERTS, weights.problem(dtype, top_k=3, activation=activation))
    layer = FP4Experts(weights, top_k=3, activation=activation, dtype=dtype, device="cpu", resolution=resolution)
    x = data.activations(tokens, weights.up.k, dtype, seed=tokens)
    count = weights.up.packed.shape[0] if expert_map is None else len(expert_map)
    ids, routing_weights = data.routing(tokens, count, 3, seed=tokens)
    expected = oracle.experts(
        x, weights, ids, routing_weights, activation=activation, rounding=None, expert_map=expert_map
    )
    found = errors(layer(x, ids, routing_weights, expert_map), expected)
    allowed = tolerance("experts", weights.scheme.weights.name, resolution.problem.dtype, quantizes=False)
    assert found.within(allowed), found
    return layer
