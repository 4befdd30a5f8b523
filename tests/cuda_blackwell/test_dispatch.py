"""FlashInfer's own validation and dispatch take exactly the tensors that our kernels pass, on the cards we declare.

The tensors are recorded once, then posed again as fake CUDA tensors on a card of every capability. Nothing is computed.
"""
# ruff: noqa: E402 - nothing of it can be imported without the library

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

flashinfer = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

import torch
from flashinfer.gemm import gemm_base, gemm_bf16_fp4_cudnn, gemm_bf16_fp4_cute_dsl
from flashinfer.utils import BackendSupportedError
from torch._subclasses.fake_tensor import FakeTensorMode

from cuda_blackwell.flashinfer_emulator.patches import card, emulated
from halfbyte.conformance import data
from halfbyte.kernels import LinearKernel, Packed
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_blackwell import linear
from halfbyte_cuda_blackwell.backends import BACKENDS, WEIGHT_ONLY
from halfbyte_cuda_blackwell.weight_only import Bf16Fp4

CAPABILITIES = (90, 100, 103, 110, 120, 121)
CLASSES = {
    kind.backend.name: kind for kind in (linear.Cutlass, linear.Cudnn, linear.Trtllm, linear.CuteDsl, linear.B12x)
}
ROWS = (1, 7, 33, 129)


class Recorder(gemm_base.TunableRunner):  # type: ignore[misc]  # the library has no annotations
    """In the place of every runner: takes what it is given."""

    def get_valid_tactics(self, inputs, profile):  # noqa: ARG002
        return [0]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):  # noqa: ARG002
        return inputs[6]


class WeightOnlyRecorder(Recorder):
    """The same for mm_bf16_fp4, whose results lie elsewhere."""

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):  # noqa: ARG002
        return inputs[5]


@contextlib.contextmanager
def dispatching(capability: int) -> Iterator[None]:
    """A card, and recorders behind the dispatch."""
    runners = ("_cudnn_gemm_fp4_runner", "_cute_dsl_gemm_fp4_runner", "_b12x_gemm_fp4_runner")
    compiled = mock.Mock(cutlass_fp4_gemm_runner=Recorder, trtllm_fp4_gemm_runner=lambda _: Recorder())
    with card(capability), contextlib.ExitStack() as stack:
        for name in runners:
            stack.enter_context(mock.patch.object(gemm_base, name, return_value=Recorder()))
        for name in ("get_cutlass_fp4_gemm_module", "get_trtllm_gemm_module"):
            stack.enter_context(mock.patch.object(gemm_base, name, return_value=compiled))
        for name in ("_cute_dsl_sm100_bf16_fp4_runner", "_cute_dsl_bf16_fp4_runner"):
            stack.enter_context(mock.patch.object(gemm_bf16_fp4_cute_dsl, name, return_value=WeightOnlyRecorder()))
        stack.enter_context(
            mock.patch.object(gemm_bf16_fp4_cudnn, "_compute_cudnn", lambda a, b, *_: a.new_empty(len(a), len(b)))
        )
        yield


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(function: str, kernel: LinearKernel, scheme: str, capability: int) -> list[Call]:
    """The arguments with which the kernel calls a function of FlashInfer, for every number of rows."""
    calls: list[Call] = []
    real: Callable[..., Any] = getattr(flashinfer, function)

    def recording(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        return real(*arguments, **named)

    with emulated(capability), mock.patch.object(flashinfer, function, recording):
        weights = data.linear_weights(SCHEMES[scheme], 256, 192, dtype=torch.bfloat16)
        problem = weights.problem(torch.bfloat16)
        packed = Packed(problem, kernel.prepare(weights, problem))
        for rows in ROWS:
            kernel.apply(data.activations(rows, 192, torch.bfloat16), packed, None)
    return calls


def as_fakes(mode: FakeTensorMode, call: Call) -> Call:
    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    return tuple(map(fake, call[0])), {name: fake(value) for name, value in call[1].items()}


def result_of(function: str, capability: int, call: Call) -> torch.Tensor:
    with dispatching(capability), FakeTensorMode() as mode:
        arguments, named = as_fakes(mode, call)
        return getattr(flashinfer, function)(*arguments, **named)


SETTINGS = [(name, f"{fmt}-w4a4") for name, backend in BACKENDS.items() for fmt in backend.formats]


@pytest.mark.parametrize(("name", "scheme"), SETTINGS)
def test_mm_fp4_takes_what_we_pass_on_every_declared_card(name: str, scheme: str):
    own = BACKENDS[name]
    for call, rows in zip(calls_of("mm_fp4", CLASSES[name](), scheme, own.capabilities[0]), ROWS, strict=True):
        inspect.signature(flashinfer.mm_fp4).bind(*call[0], **call[1])
        assert call[1]["backend"] == name
        for capability in CAPABILITIES:
            if capability in own.capabilities:
                y = result_of("mm_fp4", capability, call)
                assert (tuple(y.shape), y.dtype) == ((rows, 256), torch.bfloat16)
            elif not flashinfer.mm_fp4.is_backend_supported(name, capability):
                with pytest.raises(BackendSupportedError):
                    result_of("mm_fp4", capability, call)


@pytest.mark.parametrize(("name", "scheme"), [("cutlass", "mxfp4-w4a4"), ("trtllm", "mxfp4-w4a4")])
def test_a_format_that_we_do_not_declare_is_refused_by_the_library_too(name: str, scheme: str):
    (arguments, named), *_ = calls_of("mm_fp4", linear.Cudnn(), scheme, 100)
    with pytest.raises(ValueError, match="mxfp4"):
        result_of("mm_fp4", 100, (arguments, {**named, "backend": name}))


@pytest.mark.parametrize("capability", WEIGHT_ONLY)
def test_mm_bf16_fp4_takes_what_we_pass(capability: int):
    for call, rows in zip(calls_of("mm_bf16_fp4", Bf16Fp4(), "nvfp4-w4a16", capability), ROWS, strict=True):
        inspect.signature(flashinfer.mm_bf16_fp4).bind(*call[0], **call[1])
        assert tuple(result_of("mm_bf16_fp4", capability, call).shape) == (rows, 256)
        with pytest.raises(BackendSupportedError):
            result_of("mm_bf16_fp4", 90, call)


@pytest.mark.parametrize("scheme", ["nvfp4-w4a4", "mxfp4-w4a4"])
def test_the_quantizer_is_called_by_its_signature_and_never_by_the_environment(scheme: str):
    for arguments, named in calls_of("fp4_quantize", linear.Cudnn(), scheme, 100):
        bound = inspect.signature(flashinfer.fp4_quantize).bind(*arguments, **named).arguments
        assert bound["nvfp4_4over6"] is None
        assert bound["backend"] == "cuda"
        assert (bound["sf_vec_size"], bound["sf_use_ue8m0"]) == ((16, False) if scheme[0] == "n" else (32, True))


@pytest.mark.parametrize("capability", WEIGHT_ONLY)
def test_weights_are_prepared_by_the_signature_of_the_library(capability: int):
    calls = calls_of("prepare_bf16_fp4_weights", Bf16Fp4(), "nvfp4-w4a16", capability)
    (arguments, named) = calls[0]
    inspect.signature(flashinfer.prepare_bf16_fp4_weights).bind(*arguments, **named)
    assert named["backend"] == WEIGHT_ONLY[capability]


def test_no_call_leaves_the_back_end_to_the_library_or_alpha_out():
    for name, kind in CLASSES.items():
        for arguments, named in calls_of("mm_fp4", kind(), "nvfp4-w4a4", BACKENDS[name].capabilities[0]):
            alpha = arguments[4]
            assert named["backend"] != "auto"
            assert (alpha.dtype, tuple(alpha.shape)) == (torch.float32, (1,))


def test_few_rows_have_small_tiles_on_trtllm_alone():
    for name, kind in CLASSES.items():
        calls = calls_of("mm_fp4", kind(), "nvfp4-w4a4", BACKENDS[name].capabilities[0])
        small = [named["use_8x4_sf_layout"] for _, named in calls]
        assert small == ([True, True, False, False] if name == "trtllm" else [False] * 4), name
