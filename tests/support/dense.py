"""The oracle of whole models: compressed-tensors' weights, tensor by tensor, in transformers' own dense model."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import oracle_dequantize

_QUANTIZED = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


def dense_copy(checkpoint: Path, target: Path, preset: str) -> Path:
    """Write a compressed-tensors checkpoint with its quantized weights dequantized to float32."""
    config, tensors = read_checkpoint(checkpoint)
    del config["quantization_config"]
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(_QUANTIZED)}
    dense |= {f"{module}.weight": oracle_dequantize(module, tensors, preset) for module in modules}
    return write_checkpoint(target, config, dense)


def dense_model(checkpoint: Path, target: Path, preset: str) -> Any:
    """Transformers' model of a dense copy, in float32; gpt-oss through transformers' own MXFP4 dequantization."""
    if preset == "gpt-oss":
        config = Mxfp4Config(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config).float().eval()
    copy = dense_copy(checkpoint, target, preset)
    return AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()


def weight_only(checkpoint: Path, target: Path) -> Path:
    """The same compressed-tensors checkpoint without quantization of activations."""
    copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def change_tensors(checkpoint: Path, changes: dict[str, Tensor | None]) -> Path:
    """Replace, add or (None) drop tensors of a single-file checkpoint."""
    _, tensors = read_checkpoint(checkpoint)
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint
