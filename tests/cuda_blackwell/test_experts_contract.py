"""What we declare and call is what the installed FlashInfer has: capabilities, activations, signatures, layouts."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

from flashinfer import fused_moe
from flashinfer.fused_moe import api, core, prepare

from cuda_blackwell.experts_emulator import signatures
from cuda_blackwell.flashinfer_emulator.patches import card
from halfbyte.machines import CUDA_ARCHES, describe, matches
from halfbyte_cuda_blackwell.experts_packing import interleaved, mma_view
from halfbyte_cuda_blackwell.experts_specs import EXPERTS
from halfbyte_cuda_blackwell.packing import shuffled_rows, swizzle_128x4

SPECS = {spec.id.removeprefix("flashinfer."): spec for spec in EXPERTS}
CONFIGS = {
    "b12x": (fused_moe.B12xNvfp4Config,),
    "b12x-a16": (fused_moe.B12xW4A16Config,),
    "cutlass": (fused_moe.CutlassNvfp4Config,),
    "trtllm": (fused_moe.TrtllmFp4Config,),
    "cute-dsl": (fused_moe.CuteDslConfig,),
    "cute-dsl-a16": (fused_moe.CuteDslConfig,),
    "cutile": (fused_moe.CuTileNvfp4Bf16Config, fused_moe.CuTileMxfp4Bf16Config),
}
#: Where the library runs and we do not: nothing of SM110 was asked for.
LEFT_OUT = {"cutlass": {"sm_110"}}
SM12X = "fused_moe/cute_dsl/blackwell_sm12x"


@pytest.mark.parametrize("kernel", CONFIGS)
def test_the_capabilities_are_the_librarys(kernel: str):
    for config in CONFIGS[kernel]:
        supported = {arch for arch in CUDA_ARCHES if config.supported(int(arch[3:]))}
        declared = {
            arch for arch in CUDA_ARCHES if any(matches(pattern, describe(arch)) for pattern in SPECS[kernel].devices)
        }
        assert declared == supported - LEFT_OUT.get(kernel, set())


def test_every_kernel_is_compared_with_the_library():
    assert set(CONFIGS) == set(SPECS)


def source(path: str) -> ast.Module:
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text(encoding="utf-8"))


def constant(path: str, name: str) -> set[str]:
    """The strings in a module's constant."""
    for node in ast.walk(source(path)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            strings = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
            names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            return {str(string) for string in strings} | names
    raise LookupError(name)


def test_the_activations_are_the_librarys():
    assert {"silu", "gelu_tanh", "relu2", "SWIGLUOAI_UNINTERLEAVE"} <= constant(
        f"{SM12X}/moe_activation.py", "SUPPORTED_MOE_ACTIVATIONS"
    )
    a16 = constant(f"{SM12X}/moe_w4a16_activations.py", "SUPPORTED_MOE_ACTIVATIONS")
    assert set(SPECS["b12x-a16"].activations) == a16 & {"silu", "gelu_tanh", "relu2", "swigluoai"}
    supported = {kind.name for kind in api._CUTILE_SUPPORTED_ACTIVATIONS}
    assert {"Swiglu", "GegluTanh", "Relu2"} <= supported


def calls(path: str, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


@pytest.mark.parametrize(
    ("module", "name", "library"),
    [
        ("experts_cutlass", "cutlass_fused_moe", fused_moe.cutlass_fused_moe),
        ("experts_trtllm", "trtllm_fp4_block_scale_routed_moe", fused_moe.trtllm_fp4_block_scale_routed_moe),
        ("experts_cute_dsl", "cute_dsl_fused_moe", ("fused_moe/cute_dsl/fused_moe.py", "cute_dsl_fused_moe")),
        ("experts_b12x", "launch_sm120_moe", (f"{SM12X}/moe_dispatch.py", "launch_sm120_moe")),
        ("experts_b12x", "_get_weight_views", (f"{SM12X}/moe_dispatch.py", "_get_weight_views")),
        ("experts_cutile", "MoEActivationPack", fused_moe.MoEActivationPack),
        ("experts_cutile", "MoELayer", fused_moe.MoELayer),
        ("experts_cutile", "MoEConfig", fused_moe.MoEConfig),
        ("experts_cutile", "ExecutionConfig", fused_moe.ExecutionConfig),
    ],
)
def test_what_we_call_takes_what_we_give(module: str, name: str, library: Any):
    signature = signatures.signature(*library) if isinstance(library, tuple) else inspect.signature(library)
    spec = importlib.util.find_spec(f"halfbyte_cuda_blackwell.{module}")
    assert spec is not None
    found = list(calls(str(spec.origin), name))
    assert found
    for call in found:
        given = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        # A starred argument stands for two there (inputs and their scales), a ** for keywords looked at elsewhere.
        positional = sum(2 if isinstance(argument, ast.Starred) else 1 for argument in call.args)
        bound = signature.bind_partial(*[None] * positional, **given)
        if not any(keyword.arg is None for keyword in call.keywords):
            signature.bind(*[None] * positional, **given)
        assert len(bound.arguments) == positional + len(given)


def test_the_rows_are_shuffled_as_the_library_does_it():
    weights = torch.arange(2 * 256 * 64, dtype=torch.int32).to(torch.uint8).reshape(2, 256, 64)
    weights[:, :, 0] = torch.arange(256).to(torch.uint8)
    first = core._maybe_get_cached_w3_w1_permute_indices({}, weights[0], 128, is_gated_act_gemm=True)
    second = core.get_w2_permute_indices_with_cache({}, weights[0], 128)
    for expert in range(2):
        assert torch.equal(shuffled_rows(interleaved(weights, 1))[expert], weights[expert][first])
        assert torch.equal(shuffled_rows(weights)[expert], weights[expert][second])


def test_runs_of_up_and_gate_are_interleaved_as_the_library_does_it():
    rows = torch.arange(3 * 512 * 2).reshape(3, 512, 2)
    assert torch.equal(interleaved(rows, 64), prepare._interleave_linear_and_gate(rows, 64, dim=1))


def test_scales_are_viewed_as_the_library_does_it():
    scales = torch.randint(0, 256, (3, 256, 12), dtype=torch.int32).to(torch.uint8)
    swizzled = swizzle_128x4(scales)
    with card(100):
        from flashinfer.cute_dsl.utils import convert_sf_to_mma_layout

        theirs = convert_sf_to_mma_layout(swizzled.flatten(0, 1), m=256, k=192, num_groups=3)
    ours = mma_view(swizzled)
    assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
    assert torch.equal(ours, theirs.view(torch.uint8))


def test_cutiles_swizzle_is_ours():
    scales = torch.randint(0, 256, (3, 192, 8), dtype=torch.int32).to(torch.uint8)
    theirs = prepare._swizzle_cutile_fp4_scales(scales, scale_block_size=16)
    assert torch.equal(theirs.reshape(3, -1), swizzle_128x4(scales).reshape(3, -1))
