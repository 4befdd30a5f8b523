"""Tiny transformers models with random weights, quantized and written as real checkpoints of every dialect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import as_modelopt, quantization_config, quantized_linear

#: Sizes that all tiny models share. K is a multiple of 32 everywhere, so that MXFP4 fits too.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


def write_llama(path: Path, preset: str = "NVFP4", *, shards: int = 1, **sizes: Any) -> Path:
    """A compressed-tensors Llama, all Linear layers but lm_head quantized."""
    return _write_compressed_tensors(path, _dense("Llama", **sizes), preset, shards)


def write_qwen3_nvfp4(path: Path, preset: str = "NVFP4", *, shards: int = 1, **sizes: Any) -> Path:
    """A compressed-tensors Qwen3."""
    return _write_compressed_tensors(path, _dense("Qwen3", **sizes), preset, shards)


def write_qwen3_moe(path: Path, preset: str = "NVFP4", *, shards: int = 1, **sizes: Any) -> Path:
    """A compressed-tensors Qwen3-MoE: 4 experts, top 2."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _write_compressed_tensors(path, _dense("Qwen3Moe", **{**moe, **sizes}), preset, shards)


def write_mixtral_nvfp4(path: Path, preset: str = "NVFP4A16", *, shards: int = 1, **sizes: Any) -> Path:
    """A compressed-tensors Mixtral: 4 experts, top 2, spelled w1 (gate), w3 (up), w2 (down)."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _write_compressed_tensors(path, _dense("Mixtral", **{**moe, **sizes}), preset, shards)


def write_modelopt_llama(path: Path, algo: str = "NVFP4", *, in_config_json: bool = False, **sizes: Any) -> Path:
    """A ModelOpt Llama ("NVFP4" or "W4A16_NVFP4"), its quantization described in hf_quant_config.json or config.json.

    As ModelOpt does, W4A16_NVFP4 modules keep an input_scale that nothing has filled (NaN).
    """
    config, dense = _dense("Llama", **sizes)
    weight_only = algo == "W4A16_NVFP4"

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        tensors = quantized_linear(name, weight, "NVFP4A16" if weight_only else "NVFP4", amax=_fused_amax(name, dense))
        return as_modelopt(tensors, input_scale=float("nan") if weight_only else None)

    tensors = _quantize_linears(dense, quantize)
    exclude = ["lm_head", "model.embed_tokens*"]
    if not in_config_json:
        quantization: dict[str, Any] = {
            "quant_algo": algo,
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": exclude,
        }
        hf_quant_config = {"producer": {"name": "modelopt"}, "quantization": quantization}
        return write_checkpoint(path, config, tensors, hf_quant_config=hf_quant_config)
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": None if weight_only else number, "weights": number, "targets": ["Linear"]}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": algo,
        "config_groups": {"group_0": group},
        "ignore": exclude,
        "producer": {"name": "modelopt"},
    }
    return write_checkpoint(path, {**config, "quantization_config": quantization}, tensors)


def write_gpt_oss(path: Path, *, shards: int = 1, **sizes: Any) -> Path:
    """A gpt-oss with MXFP4 experts and random biases: 4 experts, top 2, everything else in bfloat16."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 32}
    moe["max_position_embeddings"] = 131072  # what gpt-oss's YaRN scaling expects
    config, dense = _dense("GptOss", **{**moe, **sizes})
    tensors: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            # [E, K, N] in transformers; rows of the transposed matrix are quantized along K.
            experts = [quantized_linear("e", weight.T.contiguous(), "MXFP4A16") for weight in tensor]
            packed = torch.stack([expert["e.weight_packed"] for expert in experts])
            tensors[f"{name}_blocks"] = packed.reshape(*packed.shape[:-1], -1, 16)
            tensors[f"{name}_scales"] = torch.stack([expert["e.weight_scale"] for expert in experts])
        else:
            tensors[name] = tensor
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": keep}
    return write_checkpoint(path, config, tensors, shards=shards)


def _dense(kind: str, **sizes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors as transformers saves this model, with random values even where it starts with 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written, tensors = read_checkpoint(Path(folder))
    return written, tensors


def _write_compressed_tensors(
    path: Path, model: tuple[dict[str, Any], dict[str, Tensor]], preset: str, shards: int
) -> Path:
    config, dense = model

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        return quantized_linear(name, weight, preset, amax=_fused_amax(name, dense))

    tensors = _quantize_linears(dense, quantize)
    ignore = ["lm_head", r"re:.*\.gate$"]
    config["quantization_config"] = quantization_config(preset, ignore)
    return write_checkpoint(path, config, tensors, shards=shards)


def _quantize_linears(
    dense: dict[str, Tensor], quantize: Callable[[str, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        kept = ("lm_head", "embed_tokens", ".gate")
        if name.endswith(".weight") and tensor.ndim == 2 and not module.endswith(kept):
            tensors |= quantize(module, tensor)
        else:
            tensors[name] = tensor
    return tensors


def _fused_amax(name: str, dense: dict[str, Tensor]) -> float:
    """One global scale for q, k and v, as calibrators do; any other matrix has its own, gate and up included."""
    parent, _, leaf = name.rpartition(".")
    shards = ("q_proj", "k_proj", "v_proj")
    names = [f"{parent}.{shard}.weight" for shard in shards] if leaf in shards else [f"{name}.weight"]
    return max(dense[shard].abs().max().item() for shard in names)


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config
