"""Level 3: what of FlashInfer's experts runs on an H200, and what of it the plugin refuses there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

from flashinfer.cutile import is_cuda_tile_available

from halfbyte import FP4Experts, Policy
from halfbyte.conformance import data
from halfbyte.errors import UsageError
from halfbyte.models import load_model, load_tokenizer
from halfbyte.perplexity import perplexity
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_blackwell.experts_quantize import quantized
from halfbyte_cuda_blackwell.experts_trtllm import Trtllm

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests/checkpoints"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


@pytest.mark.parametrize(
    ("name", "loss"), [("tiny-python-qwen3moe-nvfp4a16", 2.2718), ("tiny-python-qwen3moe-mxfp4", 2.2848)]
)
def test_the_loss_with_cutile_is_that_of_weights_alone(name: str, loss: float):
    if not is_cuda_tile_available():
        pytest.skip("needs cuda-tile and its compiler, tileiras 13.3 or later")
    model: Any = load_model(CHECKPOINTS / name, "cuda", "bfloat16", Policy(prefer="flashinfer.cutile"))
    experts = [module for module in model.modules() if isinstance(module, FP4Experts)]
    assert experts
    assert {module.choice.spec.id for module in experts} == {"flashinfer.cutile"}
    text = (ROOT / "examples/heldout.txt").read_text(encoding="utf-8")[:120_000]
    found = perplexity(model, load_tokenizer(CHECKPOINTS / name), text, window=512, max_windows=48).loss
    assert found == pytest.approx(loss, abs=0.005)


def test_what_needs_blackwell_is_refused_before_the_library_is_called():
    x = torch.zeros(4, 256, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(UsageError, match="sm_90"):
        quantized(x, torch.ones(1, device="cuda"))
    weights = data.experts_weights(SCHEMES["mxfp4-w4a16"], 4, 256, 256, dtype=torch.bfloat16)
    on_card = type(weights)(
        scheme=weights.scheme,
        gate=None if weights.gate is None else weights.gate.to("cuda"),
        up=weights.up.to("cuda"),
        down=weights.down.to("cuda"),
    )
    with pytest.raises(UsageError, match="sm_90"):
        Trtllm().prepare(on_card, on_card.problem(torch.bfloat16, top_k=2, activation="silu"))
