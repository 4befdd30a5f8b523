"""Logits against transformers on weights that compressed-tensors (gpt-oss: transformers) dequantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.models import load_model
from halfbyte.modules import FP4Experts, FP4Linear
from support.dense import dense_model, logits_of
from support.tiny_models import write_llama, write_modelopt_llama

IDS = torch.arange(24).reshape(2, 12)
KINDS = (
    "llama-nvfp4",
    "llama-mxfp4",
    "qwen3-nvfp4",
    "qwen3moe-nvfp4",
    "qwen3moe-mxfp4",
    "mixtral-nvfp4",
    "mixtral-mxfp4",
    "gpt-oss",
)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Random weights make logits of about 30: float32 sums in another order differ in the sixth digit.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def kinds_of_modules(model: Any) -> set[type]:
    return {type(module) for module in model.modules()} & {FP4Linear, FP4Experts}


@pytest.mark.parametrize("weights", ["packed", "dequantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_on_dequantized_weights(
    write_tiny: Callable[..., tuple[Path, str]], tmp_path: Path, kind: str, weights: Any
) -> None:
    path, preset = write_tiny(kind)
    expected = logits_of(dense_model(path, tmp_path / "dense", preset), IDS)
    model = load_model(path, device="cpu", dtype="float32", weights=weights)
    assert_close(logits_of(model, IDS), expected)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("llama-nvfp4", {FP4Linear}), ("mixtral-nvfp4", {FP4Linear, FP4Experts}), ("gpt-oss", {FP4Experts})],
)
def test_quantized_layers_are_fp4_modules(
    write_tiny: Callable[..., tuple[Path, str]], kind: str, modules: set[type]
) -> None:
    assert kinds_of_modules(load_model(write_tiny(kind)[0], device="cpu")) == modules


def test_modelopt_spelling_gives_the_same_logits(tmp_path: Path) -> None:
    modelopt = load_model(write_modelopt_llama(tmp_path / "a", "W4A16_NVFP4"), device="cpu", dtype="float32")
    path = write_llama(tmp_path / "b", "NVFP4A16")
    expected = logits_of(dense_model(path, tmp_path / "dense", "NVFP4A16"), IDS)
    assert_close(logits_of(modelopt, IDS), expected)


def test_sharded_checkpoint_gives_the_same_logits(write_tiny: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    path, preset = write_tiny("qwen3moe-nvfp4", shards=3)
    expected = logits_of(dense_model(path, tmp_path / "dense", preset), IDS)
    assert_close(logits_of(load_model(path, device="cpu", dtype="float32"), IDS), expected)


def test_tied_embeddings_stay_one_tensor(write_tiny: Callable[..., tuple[Path, str]], tmp_path: Path) -> None:
    path, preset = write_tiny("llama-nvfp4", tie_word_embeddings=True)
    model: Any = load_model(path, device="cpu", dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits_of(dense_model(path, tmp_path / "dense", preset), IDS)
    assert_close(logits_of(model, IDS), expected)


@pytest.mark.parametrize("kind", ["llama-nvfp4", "gpt-oss"])
def test_rotary_buffers_are_those_of_transformers(
    write_tiny: Callable[..., tuple[Path, str]], tmp_path: Path, kind: str
) -> None:
    path, preset = write_tiny(kind)
    expected = dict(dense_model(path, tmp_path / "dense", preset).named_buffers())
    buffers = dict(load_model(path, device="cpu", dtype="bfloat16").named_buffers())
    for name, buffer in expected.items():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == torch.float32
