"""Level 3: what of FlashInfer's experts and layouts runs on an H200, and what the plugin refuses there."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

import flashinfer
from flashinfer.cutile import is_cuda_tile_available

from halfbyte import FP4Experts, Policy
from halfbyte.conformance import data
from halfbyte.errors import UsageError
from halfbyte.models import load_model, load_tokenizer
from halfbyte.perplexity import perplexity
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_blackwell import linear, ops
from halfbyte_cuda_blackwell.experts_cute_dsl import CuteDslA16
from halfbyte_cuda_blackwell.experts_cutlass import Cutlass
from halfbyte_cuda_blackwell.experts_trtllm import Trtllm
from halfbyte_cuda_blackwell.packing import shuffled_rows, swizzle_128x4
from halfbyte_cuda_blackwell.weight_only import Bf16Fp4

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests/checkpoints"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


#: FlashInfer compiles its layout operations at their first use.
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not is_installed("cuda-tile"), reason="cuda-tile is not installed")
@pytest.mark.parametrize(
    ("name", "loss"), [("tiny-python-qwen3moe-nvfp4a16", 2.2718), ("tiny-python-qwen3moe-mxfp4", 2.2848)]
)
def test_the_loss_with_cutile_is_that_of_weights_alone(name: str, loss: float):
    assert is_cuda_tile_available(), "cuda-tile lacks a compiler for sm_90: tileiras 13.3 or later"
    model: Any = load_model(CHECKPOINTS / name, "cuda", "bfloat16", Policy(prefer="flashinfer.cutile"))
    experts = [module for module in model.modules() if isinstance(module, FP4Experts)]
    assert experts
    assert {module.choice.spec.id for module in experts} == {"flashinfer.cutile"}
    text = (ROOT / "examples/heldout.txt").read_text(encoding="utf-8")[:120_000]
    found = perplexity(model, load_tokenizer(CHECKPOINTS / name), text, window=512, max_windows=48).loss
    assert found == pytest.approx(loss, abs=0.005)


def on_the_card(*shape: int) -> torch.Tensor:
    """Random scale bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.int32).to("cuda", torch.uint8)


@NEEDS_NVCC
@pytest.mark.parametrize("shape", [(256, 12), (3, 256, 12), (2, 1536, 128)])
def test_the_cards_swizzle_is_ours(shape: tuple[int, ...]):
    scales = on_the_card(*shape)
    assert torch.equal(flashinfer.block_scale_interleave(scales), swizzle_128x4(scales).flatten())


@NEEDS_NVCC
@pytest.mark.parametrize("rows", [128, 384])
def test_the_cards_shuffled_scales_are_ours(rows: int):
    scales = on_the_card(rows, 16)
    theirs = flashinfer.shuffle_matrix_sf_a(scales, 128)
    assert torch.equal(theirs.view(torch.uint8).flatten(), swizzle_128x4(shuffled_rows(scales)).flatten())


@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("tile", [ops.LINEAR, 8, 128])
def test_the_quantizer_is_refused_before_the_library_is_called(encode: bool, tile: int):
    x = torch.zeros(4, 256, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(UsageError, match="sm_90"):
        ops.quantize(x, torch.ones(1, device="cuda") if encode else None, tile)


@pytest.mark.parametrize(
    "kernel",
    [linear.Cutlass, linear.Cudnn, linear.Trtllm, linear.CuteDsl, linear.B12x, Bf16Fp4],
    ids=lambda one: one.__name__,
)
def test_linear_kernels_are_refused_when_weights_are_prepared(kernel: Any):
    weights = data.linear_weights(SCHEMES["nvfp4-w4a4"], 128, 128, dtype=torch.bfloat16)
    weights = type(weights)(scheme=weights.scheme, matrix=weights.matrix.to("cuda"))
    with pytest.raises(UsageError, match="sm_90"):
        kernel().prepare(weights, weights.problem(torch.bfloat16))


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [(Trtllm, "mxfp4-w4a16"), (Trtllm, "nvfp4-w4a4"), (CuteDslA16, "nvfp4-w4a16"), (Cutlass, "nvfp4-w4a4")],
)
def test_experts_are_refused_when_weights_are_prepared(kernel: Any, scheme: str):
    weights = data.experts_weights(SCHEMES[scheme], 4, 256, 256, dtype=torch.bfloat16)
    on_card = type(weights)(
        scheme=weights.scheme,
        gate=None if weights.gate is None else weights.gate.to("cuda"),
        up=weights.up.to("cuda"),
        down=weights.down.to("cuda"),
    )
    with pytest.raises(UsageError, match="sm_90"):
        kernel().prepare(on_card, on_card.problem(torch.bfloat16, top_k=2, activation="silu"))
