"""Losses of real checkpoints, against those measured with compressed-tensors and transformers alone.

The first 120,000 characters of heldout.txt, 48 windows of 512 tokens, float32. "w4a4" there is compressed-tensors' fake
quantization of activations, experts included; weight-only is its decompression and transformers on dense weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.models import load_model, load_tokenizer
from halfbyte.perplexity import perplexity
from support.dense import weight_only

ROOT = Path(__file__).parents[1]
LLAMA_NVFP4 = ROOT / "examples/tiny-python-lm"
CHECKPOINTS = ROOT / "tests/checkpoints"
TEXT = (ROOT / "examples/heldout.txt").read_text(encoding="utf-8")[:120_000]


def loss_of(path: Path) -> float:
    model = load_model(path, device="cpu", dtype="float32")
    return perplexity(model, load_tokenizer(path), TEXT, window=512, max_windows=48).loss


@pytest.mark.parametrize(
    ("path", "loss", "tolerance"),
    [
        (LLAMA_NVFP4, 2.2616, 0.01),
        (CHECKPOINTS / "tiny-python-llama-mxfp4a16", 2.2231, 0.002),
        (CHECKPOINTS / "tiny-python-qwen3moe-nvfp4a16", 2.2718, 0.002),
        (CHECKPOINTS / "tiny-python-qwen3moe-mxfp4", 2.3375, 0.01),
    ],
    ids=["llama-nvfp4-w4a4", "llama-mxfp4-w4a16", "qwen3moe-nvfp4-w4a16", "qwen3moe-mxfp4-w4a4"],
)
def test_loss_is_the_one_measured(path: Path, loss: float, tolerance: float) -> None:
    assert loss_of(path) == pytest.approx(loss, abs=tolerance)


@pytest.mark.parametrize(
    ("path", "loss"),
    [(LLAMA_NVFP4, 2.2101), (CHECKPOINTS / "tiny-python-qwen3moe-mxfp4", 2.2848)],
    ids=["llama-nvfp4", "qwen3moe-mxfp4"],
)
def test_loss_without_quantized_activations_is_the_one_measured(path: Path, loss: float, tmp_path: Path) -> None:
    assert loss_of(weight_only(path, tmp_path / "weight-only")) == pytest.approx(loss, abs=0.002)
