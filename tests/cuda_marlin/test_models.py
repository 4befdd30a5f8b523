"""Whole models on a card: losses, and compiled and captured models against eager ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.models import load_model, load_tokenizer
from halfbyte.perplexity import perplexity
from halfbyte.policies import Policy

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests/checkpoints"
LLAMA_NVFP4 = ROOT / "examples/tiny-python-lm"
LLAMA_MXFP4 = CHECKPOINTS / "tiny-python-llama-mxfp4a16"
EXPERTS_NVFP4 = CHECKPOINTS / "tiny-python-qwen3moe-nvfp4a16"
EXPERTS_MXFP4 = CHECKPOINTS / "tiny-python-qwen3moe-mxfp4"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


def load(path: Path) -> Any:
    return load_model(path, "cuda", "bfloat16", Policy(require="marlin.cuda"))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a few roundings to bfloat16."""
    assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize(
    ("path", "loss"),
    [(LLAMA_NVFP4, 2.2101), (LLAMA_MXFP4, 2.2231), (EXPERTS_NVFP4, 2.2718), (EXPERTS_MXFP4, 2.2848)],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_the_loss_is_that_of_weights_alone(path: Path, loss: float):
    text = (ROOT / "examples/heldout.txt").read_text(encoding="utf-8")[:120_000]
    found = perplexity(load(path), load_tokenizer(path), text, window=512, max_windows=48).loss
    assert found == pytest.approx(loss, abs=0.005)


@pytest.mark.parametrize("path", [LLAMA_NVFP4, EXPERTS_MXFP4], ids=lambda path: path.name)
@pytest.mark.parametrize("tokens", [1, 48])
def test_a_captured_model_gives_the_same_logits_within_rounding(path: Path, tokens: int):
    model, ids = load(path), torch.arange(tokens, device="cuda")[None]
    with torch.inference_mode():
        expected = [model(ids + shift, use_cache=False).logits for shift in (0, 7)]
        fixed, graph = ids.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(fixed, use_cache=False).logits
        for shift, logits in zip((0, 7), expected, strict=True):
            fixed.copy_(ids + shift)
            graph.replay()
            first = captured.clone()
            graph.replay()
            assert torch.equal(captured, first)
            # The unquantized layers are cuBLAS's, which may take another algorithm while a graph is captured.
            assert_close(first, logits)


@pytest.mark.inductor
@pytest.mark.parametrize("path", [LLAMA_MXFP4, EXPERTS_NVFP4], ids=lambda path: path.name)
def test_a_compiled_model_gives_the_same_logits_within_rounding(path: Path):
    model, ids = load(path), torch.arange(48, device="cuda")[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        # Inductor fuses what eager mode rounds in between.
        assert_close(torch.compile(model)(ids, use_cache=False).logits, expected)
