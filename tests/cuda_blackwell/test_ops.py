"""Our operators around FlashInfer's calls: what they refuse before the library is asked, fakes as real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

import torch
from flashinfer.gemm import gemm_base
from torch._subclasses.fake_tensor import FakeTensorMode

from cuda_blackwell.flashinfer_emulator.patches import card, emulated
from halfbyte.conformance import data, oracle
from halfbyte.conformance.oracle import Expected
from halfbyte.errors import PluginError, UsageError
from halfbyte.kernels import Packed
from halfbyte.schemes import SCHEMES, Scheme
from halfbyte.specs import Rounding
from halfbyte.weights import LinearWeights
from halfbyte_cuda_blackwell import library, linear, ops
from halfbyte_cuda_blackwell.packing import padded_scale_shape, swizzle_128x4
from halfbyte_cuda_blackwell.weight_only import Bf16Fp4

M, N, K = 7, 64, 96


@pytest.fixture
def sm_100() -> Iterator[None]:
    with emulated(100):
        yield


def factor(value: float = 1.0) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def rows(m: int = M, k: int = K) -> torch.Tensor:
    return data.activations(m, k, torch.bfloat16)


def product_arguments() -> dict[str, object]:
    """What a call of mm_fp4 takes; all codes and scales are zero."""
    return {
        "a": torch.zeros(M, K // 2, dtype=torch.uint8),
        "a_scales": torch.zeros(padded_scale_shape(M, K // 16), dtype=torch.uint8),
        "weight": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scales": torch.zeros(padded_scale_shape(N, K // 16), dtype=torch.uint8),
        "alpha": factor(),
        "backend": "cutlass",
        "group": 16,
        "tile": 128,
        "dtype": torch.bfloat16,
    }


def refused_alike(operator: Callable[..., object], arguments: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match) as real:
        operator(**arguments)
    with FakeTensorMode() as mode, pytest.raises(UsageError) as fake:
        operator(**torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_cards_before_blackwell_are_refused_by_us(capability: int):
    with card(capability):
        refused_alike(ops.quantize, {"x": rows(), "encode": factor(), "tile": 128}, f"from sm_100 on.*sm_{capability}")
        refused_alike(ops.quantize, {"x": rows(), "encode": None, "tile": 128}, f"from sm_100 on.*sm_{capability}")
        refused_alike(ops.mm_fp4, product_arguments(), f"runs on sm_100.*is sm_{capability}")
        weights = data.linear_weights(SCHEMES["nvfp4-w4a4"], N, K, dtype=torch.bfloat16)
        for kernel in (linear.Cutlass(), Bf16Fp4()):
            with pytest.raises(UsageError, match=f"is sm_{capability}"):
                kernel.prepare(weights, weights.problem(torch.bfloat16))


def test_tensors_that_are_on_no_cuda_card_are_refused():
    with pytest.raises(UsageError, match="runs on CUDA cards; the tensors are on cpu"):
        ops.quantize(rows(), factor(), 128)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"a_scales": torch.zeros(M, K // 16, dtype=torch.uint8)}, r"scales of a: .*expected .*\[128, 8\]"),
        ({"a_scales": torch.zeros(128, 8, dtype=torch.float8_e4m3fn)}, "scales of a: torch.float8_e4m3fn"),
        ({"weight_scales": torch.zeros(N, 8, dtype=torch.uint8)}, r"scales of the weight: .*expected .*\[128, 8\]"),
        ({"weight": torch.zeros(K // 2, N, dtype=torch.uint8).T}, "weight: .*strides"),
        ({"weight": torch.zeros(N, K, dtype=torch.uint8)}, r"weight: .*expected .*\[64, 48\]"),
        ({"a": torch.zeros(M, K // 2, dtype=torch.int8)}, "a: torch.int8"),
        ({"alpha": torch.ones(1, dtype=torch.float64)}, "alpha is torch.float64"),
        ({"alpha": torch.ones(M)}, r"alpha is torch.float32 \[7\]"),
        ({"alpha": torch.ones(())}, r"alpha is torch.float32 \[\]"),
        ({"tile": 8}, "tiles of 128 rows"),
        ({"group": 32}, "cutlass computes nvfp4"),
        ({"dtype": torch.float32}, "not nvfp4 to torch.float32"),
        ({"backend": "b12x"}, "mm_fp4 with back end b12x runs on sm_120, sm_121"),
    ],
)
def test_a_product_takes_nothing_that_the_library_would_misread(sm_100: None, wrong: dict[str, object], match: str):
    refused_alike(ops.mm_fp4, product_arguments() | wrong, match)


def test_sizes_off_the_alignment_are_refused(sm_100: None):
    arguments = product_arguments()
    arguments |= {"weight": torch.zeros(65, K // 2, dtype=torch.uint8)}
    refused_alike(ops.mm_fp4, arguments, "N=65, K=96: cutlass needs multiples of 32 and 32")


@pytest.mark.parametrize("encode", [factor(300.0), None])
def test_linear_scales_are_the_swizzled_ones(sm_100: None, encode: torch.Tensor | None):
    codes, swizzled = ops.quantize(rows(130), encode, 128)
    again, scales = ops.quantize(rows(130), encode, ops.LINEAR)
    assert torch.equal(again, codes)
    assert scales.shape == (130, K // (16 if encode is not None else 32))
    assert torch.equal(swizzle_128x4(scales), swizzled)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"x": rows(M, 24)}, "K a multiple of 16"),
        ({"x": rows().float()}, "torch.float32"),
        ({"x": rows()[:, ::2]}, "strides"),
        ({"x": rows()[None]}, r"\[1, 7, 96\]"),
        ({"encode": torch.ones(1, dtype=torch.bfloat16)}, "encode is torch.bfloat16"),
        ({"tile": 64}, "tiles of 8 or 128 rows"),
    ],
)
def test_the_quantizer_takes_nothing_that_the_library_would_misread(sm_100: None, wrong: dict[str, object], match: str):
    refused_alike(ops.quantize, {"x": rows(), "encode": factor(), "tile": 128} | wrong, match)


def test_the_weight_only_product_refuses_another_x(sm_100: None):
    weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], 64, 128, dtype=torch.bfloat16)
    packed = Bf16Fp4().prepare(weights, weights.problem(torch.bfloat16))
    right = {"x": rows(M, 128), "n": 64, **packed}
    for wrong, match in (
        ({"x": rows(M, 64)}, r"takes contiguous bfloat16 \[M, 128\]"),
        ({"x": rows(M, 128).half()}, "torch.float16"),
        ({"alpha": torch.ones(2)}, "alpha is"),
    ):
        refused_alike(ops.mm_bf16_fp4, right | wrong, match)


def test_the_operators_pass_opcheck(sm_100: None):
    utilities = ("test_schema", "test_faketensor")
    for tile in (ops.LINEAR, 8, 128):
        for encode in (factor(300.0), None):
            torch.library.opcheck(ops.quantize, (rows(), encode, tile), test_utils=utilities)
    torch.library.opcheck(ops.mm_fp4, tuple(product_arguments().values()), test_utils=utilities)
    for scheme in ("nvfp4-w4a16",):
        weights = data.linear_weights(SCHEMES[scheme], 64, 128, dtype=torch.bfloat16)
        packed = Bf16Fp4().prepare(weights, weights.problem(torch.bfloat16))
        torch.library.opcheck(ops.mm_bf16_fp4, (rows(M, 128), *packed.values(), 64), test_utils=utilities)


def test_one_row_with_the_strides_of_a_column_is_no_column(sm_100: None):
    column = rows(K, 1).T  # [1, K] with strides (1, 1): contiguous, and column-major to the library
    codes, scales = ops.quantize(column, factor(300.0), 128)
    again, expected = ops.quantize(column.clone(memory_format=torch.contiguous_format).view(1, K), factor(300.0), 128)
    assert codes.shape == (1, K // 2)
    assert torch.equal(codes, again)
    assert torch.equal(scales, expected)


def test_rows_at_any_address_are_taken(sm_100: None):
    shifted = torch.empty(M * K + 1, dtype=torch.bfloat16)[1:].view(M, K)
    shifted.copy_(rows())
    assert shifted.data_ptr() % 32
    for one, other in zip(ops.quantize(shifted, None, 128), ops.quantize(rows(), None, 128), strict=True):
        assert torch.equal(one, other)


def test_a_card_that_is_not_the_current_one_becomes_it_for_the_call(monkeypatch: pytest.MonkeyPatch):
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def enter(device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    for device in (torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)):
        with ops.current(device):
            pass
    assert entered == [torch.device("cuda", 1)]


@pytest.mark.parametrize("size", [1.0, 1e-30, 0.0])
def test_activations_without_a_calibrated_scale_are_scaled_by_their_largest(sm_100: None, size: float):
    weights = data.linear_weights(SCHEMES["nvfp4-w4a16"], N, K, dtype=torch.bfloat16)  # no input scale
    weights = LinearWeights(scheme=Scheme.parse("nvfp4-w4a4"), matrix=weights.matrix)
    problem = weights.problem(torch.bfloat16)
    kernel, x = linear.Cutlass(), rows(33) * size
    y = kernel.apply(x, Packed(problem, kernel.prepare(weights, problem)), None).double()
    expected: Expected = oracle.linear(x, weights, Rounding())
    if size == 0:
        assert not y.any()
    else:  # the scale of a group may be a neighbouring one: ties are common, and a unit in the last place moves them
        assert (y - expected.values).norm() < 0.02 * expected.values.norm()


def test_libraries_that_are_too_old_are_named_when_weights_are_prepared():
    weights = data.linear_weights(SCHEMES["mxfp4-w4a4"], N, K, dtype=torch.bfloat16)
    problem = weights.problem(torch.bfloat16)
    with (
        card(120, cudnn=91300),
        pytest.raises(PluginError, match=r"libcudnn 91400 or newer; found 91300.*HALFBYTE_DENY"),
    ):
        linear.Cudnn().prepare(weights, problem)
    with card(100, cudnn=91300):
        linear.Cudnn().prepare(weights, problem)
    with card(120, cuda="12.9"), pytest.raises(PluginError, match=r"needs CUDA 13\.0 or newer; found 12\.9"):
        linear.B12x().prepare(weights, problem)
    nvfp4 = data.linear_weights(SCHEMES["nvfp4-w4a4"], N, K, dtype=torch.bfloat16)
    with card(120, cuda="12.8"), pytest.raises(PluginError, match=r"needs CUDA 12\.9"):
        linear.B12x().prepare(nvfp4, nvfp4.problem(torch.bfloat16))
    with card(110, cudnn=92300), pytest.raises(PluginError, match="libcudnn 92301"):
        Bf16Fp4().prepare(nvfp4, nvfp4.problem(torch.bfloat16))


def test_cudnn_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gemm_base, "CUDNN_AVAILABLE", False)
    with pytest.raises(PluginError, match="nvidia-cudnn-frontend"):
        library.require_cudnn(library.CUDNN_FP4, "flashinfer.cudnn")


def test_cudnn_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing() -> int:
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    monkeypatch.setattr(gemm_base, "CUDNN_AVAILABLE", True)
    monkeypatch.setattr(gemm_base, "cudnn", type("cudnn", (), {"backend_version": missing}), raising=False)
    with pytest.raises(PluginError, match="does not load: Unable to find symbol cudnnGetVersion"):
        library.require_cudnn(library.CUDNN_FP4, "flashinfer.cudnn")
