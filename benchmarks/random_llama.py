"""Llamas with random weights: FP4 checkpoints of any size, as compressed-tensors lays them out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

_QUANTIZATION: dict[str, dict[str, Any]] = {
    "nvfp4": {"format": "nvfp4-pack-quantized", "group_size": 16, "strategy": "tensor_group"},
    "mxfp4": {"format": "mxfp4-pack-quantized", "group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"},
}


def write_random_llama(folder: Path, config: LlamaConfig, *, scheme: str = "nvfp4", device: str = "cpu") -> None:
    """Write a weight-only checkpoint with one file for each layer; weights are drawn on `device`."""
    config.architectures = ["LlamaForCausalLM"]
    own = _QUANTIZATION[scheme]
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    weights |= {key: value for key, value in own.items() if key != "format"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": own["format"],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    data = {**config.to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    places: dict[str, str] = {}
    for part, tensors in enumerate(_parts(config, scheme, device)):
        file = f"model-{part:05}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _parts(config: LlamaConfig, scheme: str, device: str) -> Iterator[dict[str, Tensor]]:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    small: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    yield {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, **small),
        "lm_head.weight": torch.randn(vocabulary, hidden, **small) / hidden**0.5,
        "model.norm.weight": torch.ones(hidden, **small),
    }
    for layer in range(config.num_hidden_layers):
        tensors = {
            f"{norm}.weight": torch.ones(hidden, **small) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, (n, k) in _matrices(config).items():
            tensors |= {f"{name}.{part}": value for part, value in _quantized(n, k, scheme, device).items()}
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    cached = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (cached, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }


def _quantized(n: int, k: int, scheme: str, device: str) -> dict[str, Tensor]:
    """Random codes with scales that make products of unit activations about 1."""
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=device)
    if scheme == "mxfp4":
        scales = torch.full((n, k // 32), 126 - int(1.5 + k.bit_length() / 2), dtype=torch.uint8, device=device)
        return {"weight_packed": packed, "weight_scale": scales}
    scales = (torch.rand(n, k // 16, device=device) + 0.5).to(torch.float8_e4m3fn)
    return {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([3.0 * k**0.5], device=device),
    }
