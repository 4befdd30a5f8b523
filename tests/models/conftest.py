from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WRITERS = {
    "llama-nvfp4": ("write_llama", "NVFP4A16"),
    "llama-mxfp4": ("write_llama", "MXFP4A16"),
    "qwen3-nvfp4": ("write_qwen3_nvfp4", "NVFP4A16"),
    "qwen3moe-nvfp4": ("write_qwen3_moe", "NVFP4A16"),
    "qwen3moe-mxfp4": ("write_qwen3_moe", "MXFP4A16"),
    "mixtral-nvfp4": ("write_mixtral_nvfp4", "NVFP4A16"),
    "mixtral-mxfp4": ("write_mixtral_nvfp4", "MXFP4A16"),
}


@pytest.fixture
def write_tiny(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Write one of the tiny checkpoints; returns its folder and compressed-tensors' name of its scheme."""
    from support import tiny_models

    def write(kind: str, **sizes: Any) -> tuple[Path, str]:
        if kind == "gpt-oss":
            return tiny_models.write_gpt_oss(tmp_path / kind, **sizes), kind
        writer, preset = WRITERS[kind]
        return getattr(tiny_models, writer)(tmp_path / kind, preset, **sizes), preset

    return write
