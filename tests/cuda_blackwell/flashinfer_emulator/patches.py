"""Put the doubles in the place of the compiled modules, and a card of some capability in the place of none."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import flashinfer
import flashinfer.utils
import torch
from flashinfer.gemm import gemm_base, gemm_bf16_fp4, gemm_bf16_fp4_cudnn, gemm_bf16_fp4_cute_dsl
from flashinfer.quantization import fp4_quantization
from packaging.version import Version

from cuda_blackwell.flashinfer_emulator import compiled

_MODULES = (flashinfer.utils, gemm_base, gemm_bf16_fp4, gemm_bf16_fp4_cute_dsl, fp4_quantization)


@contextlib.contextmanager
def card(capability: int, *, cuda: str = "13.0", cudnn: int = 92400) -> Iterator[None]:
    """Every device is a card of this capability, with this CUDA release and libcudnn; nothing is computed."""
    pair = divmod(capability, 10)
    library = SimpleNamespace(__version__="1.31.0", backend_version=lambda: cudnn)
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "get_compute_capability", lambda _: pair) for module in _MODULES),
        (gemm_base, "get_cuda_version", lambda: Version(cuda)),
        (gemm_base, "_check_cute_dsl_arch", lambda _: None),
        (gemm_base, "_check_cute_dsl_availability", lambda: None),
        (gemm_bf16_fp4, "_check_cute_dsl_availability", lambda: None),
        (gemm_base, "CUDNN_AVAILABLE", True),
        (gemm_base, "cudnn", library),
        (gemm_bf16_fp4, "cudnn", library),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.dict(flashinfer.utils._cache_buf, clear=True))
        if importlib.util.find_spec("cutlass") is None:
            stack.enter_context(_module("flashinfer.cute_dsl.utils", _cute_dsl_utils()))
        yield


@contextlib.contextmanager
def emulated(capability: int) -> Iterator[None]:
    """A card, and doubles of everything that FlashInfer would compile for it."""
    quantization = fp4_quantization.get_fp4_quantization_module.__wrapped__
    trtllm = gemm_base._get_trtllm_gemm_module_impl.__wrapped__
    runners = {
        "get_cutlass_fp4_gemm_module": lambda *_: gemm_base._create_cutlass_fp4_gemm_module(compiled.Cutlass(), "", ""),
        "gen_trtllm_gen_gemm_module": lambda **_: compiled.built(compiled.Trtllm()),
        "get_trtllm_gemm_module": lambda: trtllm(enable_rubin=False),
        "_cudnn_gemm_fp4_runner": lambda *_: compiled.Dsl(1),
        "_cute_dsl_gemm_fp4_runner": lambda *_: compiled.Dsl(8),
        "_b12x_gemm_fp4_runner": lambda *_: compiled.Dsl(1),
    }
    replaced: list[tuple[Any, str, Any]] = [
        *((gemm_base, name, value) for name, value in runners.items()),
        (fp4_quantization, "gen_fp4_quantization_module", lambda *_: compiled.built(compiled.Quantization())),
        (
            fp4_quantization,
            "get_fp4_quantization_module",
            lambda arch: quantization("120f" if arch in ("120", "121") else arch),
        ),
        (gemm_bf16_fp4_cute_dsl, "_cute_dsl_sm100_bf16_fp4_runner", lambda **_: compiled.WeightOnlySm10x()),
        (gemm_bf16_fp4_cute_dsl, "_cute_dsl_bf16_fp4_runner", lambda **_: compiled.WeightOnlySm12x()),
        (gemm_bf16_fp4_cudnn, "_compute_cudnn", compiled.weight_only_cudnn),
    ]
    with card(capability), contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def _module(name: str, module: ModuleType) -> Iterator[None]:
    """Put a module in place of another one; what is imported meanwhile stays, unlike with `mock.patch.dict`."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _cute_dsl_utils() -> ModuleType:
    """The wheel's convert_sf_to_mma_layout without the rest of its module, which imports CuTe DSL."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("flashinfer")
    source = Path(spec.origin).parent / "cute_dsl/utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = ("convert_sf_to_mma_layout", "ceil_div")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    module = ModuleType("flashinfer.cute_dsl.utils")
    module.__dict__.update(torch=torch, ceil_div=flashinfer.utils.ceil_div)
    exec(compile(tree, str(source), "exec"), module.__dict__)
    return module
