"""Prepared weights are those of clients that are known to work, byte for byte on the same checkpoint tensors.

The oracles do what those clients document, in operations of their own: vLLM's post-load step of XPUMxFp4LinearKernel
and its XPUExpertsMxFp4, and the test of mm_mxfp4_out_marlin in intel-extension-for-pytorch.
"""

from dataclasses import replace

import pytest
import torch

from halfbyte.conformance import data
from halfbyte.errors import CheckpointError, PluginError, UsageError
from halfbyte.formats import NVFP4
from halfbyte.kernels import Packed
from halfbyte.numerics import GlobalScale
from halfbyte.schemes import MXFP4_W4A4, MXFP4_W4A16, NVFP4_W4A4
from halfbyte_xpu.ipex import packing as ipex
from halfbyte_xpu.torch_xpu import packing as torch_xpu
from halfbyte_xpu.vllm_kernels import experts, library, schemas
from halfbyte_xpu.vllm_kernels import packing as vllm

F4, E8 = torch.float4_e2m1fn_x2, torch.float8_e8m0fnu


def raw(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bytes]:
    """Shape, strides and the bytes in the order in which they lie in memory."""
    storage = tensor.untyped_storage()
    return tuple(tensor.shape), tensor.stride(), bytes(storage.tolist())


@pytest.mark.parametrize(("n", "k"), [(16, 64), (33, 96), (64, 64)])
def test_linear_weights_are_what_vllm_gives_to_fp4_gemm(n: int, k: int):
    weights = data.linear_weights(MXFP4_W4A4, n, k, dtype=torch.bfloat16)
    checkpoint_weight, checkpoint_scale = weights.matrix.packed.clone(), weights.matrix.scales.clone()
    # process_weights_after_loading: uint8 [N, K/2] viewed as FP4 and transposed; uint8 [N, K/32] viewed as E8M0,
    # transposed, made contiguous.
    client_weight = checkpoint_weight.view(F4).t()
    client_scale = checkpoint_scale.view(E8).t().contiguous()
    ours = vllm.pack_linear(weights.matrix)
    assert raw(ours["weight"].view(F4).t().view(torch.uint8)) == raw(client_weight.view(torch.uint8))
    assert raw(ours["scales"].view(E8).view(torch.uint8)) == raw(client_scale.view(torch.uint8))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_weights_are_what_vllm_gives_to_xpu_fused_moe(activation: str, bias: bool):
    weights = data.experts_weights(MXFP4_W4A16, 4, 64, 96, dtype=torch.bfloat16, bias=bias)
    gate, up, down = weights.gate, weights.up, weights.down
    assert gate is not None
    # vLLM loads gate and up into one tensor [E, 2I, ...]: w1 above w3, or as gpt-oss stores them, alternating. It
    # passes that on as it is.
    pieces = {}
    for name in ("packed", "scales", *(("bias",) if bias else ())):
        fused = torch.empty(4, 2 * 96, *getattr(gate, name).shape[2:], dtype=getattr(gate, name).dtype)
        if activation == "swigluoai":
            fused[:, 0::2], fused[:, 1::2] = getattr(gate, name), getattr(up, name)
        else:
            fused[:, :96], fused[:, 96:] = getattr(gate, name), getattr(up, name)
        pieces[name] = fused
    problem = weights.problem(torch.bfloat16, top_k=2, activation=activation)
    ours = vllm.pack_experts(weights, problem)
    expected = {"w13": pieces["packed"], "w13_scales": pieces["scales"], "w2": down.packed, "w2_scales": down.scales}
    if down.bias is not None:
        expected |= {"w13_bias": pieces["bias"], "w2_bias": down.bias}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
        assert ours[name].is_contiguous()


def test_experts_without_a_gate_are_one_matrix():
    weights = data.experts_weights(MXFP4_W4A16, 4, 64, 96, dtype=torch.bfloat16, gated=False)
    ours = vllm.pack_experts(weights, weights.problem(torch.bfloat16, top_k=2, activation="relu2"))
    assert torch.equal(ours["w13"], weights.up.packed)


def with_scale(code: int, *, zero: bool = False):
    weights = data.experts_weights(MXFP4_W4A16, 2, 32, 32, dtype=torch.float16)
    scales, packed = weights.down.scales.clone(), weights.down.packed.clone()
    scales[1, 5, 0] = code
    packed[1, 5] = 0x80 if zero else 0x21
    return replace(weights, down=replace(weights.down, scales=scales, packed=packed))


@pytest.mark.parametrize(("code", "fits"), [(103, False), (104, True), (140, True), (141, False)])
def test_scales_that_float16_has_not_are_refused(code: int, fits: bool):
    weights = with_scale(code)
    problem = weights.problem(torch.float16, top_k=1, activation="silu")
    vllm.pack_experts(weights, replace(problem, dtype="bfloat16"))
    vllm.pack_experts(with_scale(code, zero=True), problem)
    if fits:
        vllm.pack_experts(weights, problem)
    else:
        with pytest.raises(CheckpointError, match=rf"2\*\*{code - 127}.*bfloat16"):
            vllm.pack_experts(weights, problem)


@pytest.mark.parametrize(("n", "k"), [(3, 32), (64, 96)])
def test_ipex_words_are_those_of_its_own_test(n: int, k: int):
    matrix = data.linear_weights(MXFP4_W4A16, n, k, dtype=torch.bfloat16).matrix
    bytes_by_row = matrix.packed.t().tolist()  # [K/2, N], as that test starts
    expected = torch.zeros(k // 8, n, dtype=torch.int64)
    for word in range(k // 8):
        for column in range(n):
            codes = [bytes_by_row[word * 4 + i // 2][column] >> 4 * (i % 2) & 15 for i in range(8)]
            shuffled = [codes[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
            expected[word, column] = sum(code << 4 * place for place, code in enumerate(shuffled))
    weight, scales = ipex.pack(matrix)
    assert (weight.dtype, weight.is_contiguous()) == (torch.int32, True)
    assert torch.equal(weight.long() & 0xFFFFFFFF, expected)
    assert torch.equal(scales, matrix.scales.t())
    assert scales.is_contiguous()


def test_scaled_mm_keeps_everything_as_stored_and_global_scales_in_float32():
    weights = data.linear_weights(NVFP4_W4A4, 32, 64, dtype=torch.bfloat16)
    matrix = weights.matrix
    assert matrix.global_scale is not None
    assert matrix.input_global_scale is not None
    ours = torch_xpu.pack_linear(matrix, NVFP4_W4A4)
    assert torch.equal(ours["weight"], matrix.packed)
    assert torch.equal(ours["scales"], matrix.scales.view(torch.uint8))
    assert torch.equal(ours["global_scale"], matrix.global_scale.float())
    assert torch.equal(ours["x_global_scale"], matrix.input_global_scale.float())
    assert torch.equal(ours["x_input_divisor"], GlobalScale.of(matrix.input_global_scale).divisor)
    assert matrix.format is NVFP4


def test_nvfp4_activations_need_a_calibrated_scale():
    weights = data.linear_weights(NVFP4_W4A4, 32, 64, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="calibrat"):
        torch_xpu.pack_linear(replace(weights.matrix, input_global_scale=None), NVFP4_W4A4)


@pytest.mark.parametrize(
    "variable",
    ["VLLM_XPU_FORCE_XE_DEFAULT_KERNEL", "VLLM_XPU_FUSED_MOE_USE_REF", "VLLM_XPU_FUSED_MOE_USE_MXFP4_FP8"],
)
def test_variables_that_change_what_the_library_computes_are_refused(variable: str, monkeypatch, doubles):
    weights = data.experts_weights(MXFP4_W4A16, 2, 32, 32, dtype=torch.bfloat16)
    problem = weights.problem(torch.bfloat16, top_k=1, activation="silu")
    kernel = experts.FusedMoe()
    monkeypatch.setenv(variable, "0")
    packed = Packed(problem, kernel.prepare(weights, problem))
    x, (ids, shares) = data.activations(3, 32, torch.bfloat16), data.routing(3, 2, 1)
    kernel.apply(x, packed, ids, shares)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=variable):
        kernel.prepare(weights, problem)
    with pytest.raises(UsageError, match=variable):
        kernel.apply(x, packed, ids, shares)


def test_a_device_that_is_neither_xe2_nor_xe3_is_refused(monkeypatch, doubles):
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Arc A770")
    device = torch.device("xpu", 0)
    library.check_device(device)
    monkeypatch.setattr(library, "IS_XE2", schemas.IS_XE3)
    with pytest.raises(PluginError, match="Arc A770"):
        library.check_device(device)


def test_float32_activations_never_reach_the_library(doubles):
    weights = data.experts_weights(MXFP4_W4A16, 2, 32, 32, dtype=torch.float32)
    problem = weights.problem(torch.bfloat16, top_k=1, activation="silu")
    kernel = experts.FusedMoe()
    packed = Packed(problem, kernel.prepare(weights, problem))
    with pytest.raises(UsageError, match="float32"):
        kernel.apply(torch.ones(1, 32), packed, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))


def test_more_elements_than_the_library_can_count_are_refused(doubles):
    weights = data.experts_weights(MXFP4_W4A16, 2, 64, 32, dtype=torch.bfloat16)
    problem = weights.problem(torch.bfloat16, top_k=2, activation="silu")
    kernel = experts.FusedMoe()
    packed = Packed(problem, kernel.prepare(weights, problem))
    tokens = 2**31 // (2 * 64)
    for many, refused in ((tokens, True), (tokens - 1, False)):
        x, ids, shares = (
            torch.empty(many, width, dtype=dtype, device="meta")
            for width, dtype in ((64, torch.bfloat16), (2, torch.int32), (2, torch.float32))
        )
        with pytest.raises(UsageError if refused else NotImplementedError) as error:
            kernel.apply(x, packed, ids, shares)
        assert (f"at most {tokens - 1} tokens" in str(error.value)) == refused


def test_the_library_never_rewrites_prepared_weights(doubles):
    weights = data.experts_weights(MXFP4_W4A16, 2, 32, 32, dtype=torch.bfloat16)
    problem = weights.problem(torch.bfloat16, top_k=1, activation="silu")
    kernel = experts.FusedMoe()
    packed = Packed(problem, kernel.prepare(weights, problem))
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in packed.tensors.items()}
    ids, shares = data.routing(3, 2, 1)
    kernel.apply(torch.ones(3, 32, dtype=torch.bfloat16), packed, ids, shares)
    for name, (address, copy) in before.items():
        assert packed[name].data_ptr() == address
        assert packed[name].dtype == copy.dtype
        assert torch.equal(packed[name], copy)
