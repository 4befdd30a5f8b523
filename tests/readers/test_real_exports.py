"""Small checkpoints described as published exports are: what ModelOpt, llm-compressor and OpenAI really write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoints import plan
from halfbyte.errors import CheckpointError
from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import as_modelopt, quantized_linear
from support.tiny_models import write_gpt_oss

#: As llm-compressor dumps its arguments, with everything that it says.
OBSERVED: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 16,
    "num_bits": 4,
    "observer": "minmax",
    "observer_kwargs": {},
    "scale_dtype": None,
    "strategy": "tensor_group",
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}
CACHE = {**OBSERVED, "num_bits": 8, "group_size": None, "strategy": "tensor"}
FP8 = {**CACHE, "observer": "static_minmax"}
MOE = {"hidden_act": "silu", "num_experts_per_tok": 1}


def compressed_tensors(*, weight_only: bool = False, **values: Any) -> dict[str, Any]:
    """config.json's quantization_config of an llm-compressor export."""
    activations = None if weight_only else {**OBSERVED, "dynamic": "local", "observer": "static_minmax"}
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": OBSERVED,
    }
    whole: dict[str, Any] = {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.11.1.a20250820",
    }
    return {**whole, **values}


def linear(*names: str, preset: str = "NVFP4") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= quantized_linear(name, torch.ones(16, 16), preset)
    return tensors


def experts(layer: str, preset: str = "NVFP4") -> dict[str, Tensor]:
    projections = ("gate_proj", "up_proj", "down_proj")
    return linear(*(f"{layer}.{number}.{name}" for number in range(2) for name in projections), preset=preset)


def plain(*names: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(16, 16, dtype=torch.bfloat16) for name in names}


def schemes(path: Path) -> dict[str, str]:
    return {layer.name: f"{layer.problem.op} {layer.problem.scheme}" for layer in plan(path).layers}


@pytest.mark.parametrize("weight_only", [False, True])
def test_llm_compressor_of_a_vision_language_model_with_experts(tmp_path: Path, weight_only: bool) -> None:
    # As published for Llama 4: the language model's sizes are in text_config alone.
    preset = "NVFP4A16" if weight_only else "NVFP4"
    ignore = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:multi_modal_projector.*"]
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "quantization_config": compressed_tensors(weight_only=weight_only, ignore=ignore, kv_cache_scheme=CACHE),
        "text_config": {**MOE, "model_type": "llama4_text", "num_local_experts": 2, "torch_dtype": "float16"},
        "vision_config": {"hidden_act": "gelu", "model_type": "llama4_vision_model"},
    }
    block = "language_model.model.layers.0"
    tensors = {
        **experts(f"{block}.feed_forward.experts", preset),
        **linear(f"{block}.feed_forward.shared_expert.up_proj", preset=preset),
        **plain("language_model.lm_head", f"{block}.self_attn.q_proj", f"{block}.feed_forward.router"),
        **plain("vision_model.model.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1"),
        f"{block}.self_attn.k_scale": torch.ones(1),
    }
    checkpoint = plan(write_checkpoint(tmp_path, config, tensors))
    scheme = "nvfp4-w4a16" if weight_only else "nvfp4-w4a4"
    assert schemes(tmp_path) == {
        f"{block}.feed_forward.experts": f"experts {scheme}",
        f"{block}.feed_forward.shared_expert.up_proj": f"linear {scheme}",
    }
    assert (checkpoint.dtype, len(checkpoint.unquantized), len(checkpoint.notes)) == ("float16", 5, 1)


def test_a_description_inside_the_language_models_own_configuration(tmp_path: Path) -> None:
    text = {**MOE, "n_routed_experts": 2, "quantization_config": compressed_tensors(ignore=["re:.*lm_head"])}
    layer = "language_model.model.layers.1.mlp.experts"
    write_checkpoint(tmp_path, {"model_type": "kimi_k25", "text_config": text}, experts(layer))
    assert schemes(tmp_path) == {layer: "experts nvfp4-w4a4"}


def test_modelopts_own_file_for_a_model_with_experts_and_an_fp8_cache(tmp_path: Path) -> None:
    # As published for DeepSeek-R1: config.json is the original model's without a word of quantization.
    own = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.1.self_attn*", "model.layers.1.mlp.gate"],
        },
    }
    config = {**MOE, "model_type": "deepseek_v3", "n_routed_experts": 2, "torch_dtype": "bfloat16"}
    block = "model.layers.1"
    tensors = {
        **as_modelopt(experts(f"{block}.mlp.experts")),
        **as_modelopt(linear(f"{block}.mlp.shared_experts.up_proj")),
        **plain("lm_head", f"{block}.self_attn.o_proj", f"{block}.self_attn.kv_b_proj", f"{block}.mlp.gate"),
        f"{block}.self_attn.kv_b_proj.k_scale": torch.tensor(1.0),
        f"{block}.self_attn.kv_b_proj.v_scale": torch.tensor(1.0),
        f"{block}.mlp.gate.e_score_correction_bias": torch.ones(2),
    }
    checkpoint = plan(write_checkpoint(tmp_path, config, tensors, hf_quant_config=own))
    assert schemes(tmp_path) == {
        f"{block}.mlp.experts": "experts nvfp4-w4a4",
        f"{block}.mlp.shared_experts.up_proj": "linear nvfp4-w4a4",
    }
    assert (len(checkpoint.ignored), len(checkpoint.unquantized), len(checkpoint.notes)) == (2, 5, 1)


def test_modelopt_in_config_json_beside_its_own_file_for_a_vision_language_model(tmp_path: Path) -> None:
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    ignore = ["lm_head", "model.visual*", "mtp*", "model.language_model.layers.0.linear_attn.conv1d"]
    description = {
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "quant_algo": "NVFP4",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quant_method": "modelopt",
    }
    own = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ignore}}
    name = "model.language_model.layers.0.linear_attn.out_proj"
    tensors = {**as_modelopt(linear(name)), **plain("lm_head", "model.visual.blocks.0.attn.proj", "mtp.fc")}
    config = {"model_type": "qwen3_5", "quantization_config": description, "text_config": {"dtype": "bfloat16"}}
    write_checkpoint(tmp_path, config, tensors, hf_quant_config=own)
    assert schemes(tmp_path) == {name: "linear nvfp4-w4a4"}


def test_modelopts_mixed_precision_names_the_experts_as_a_whole(tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.experts"
    named = {layer: {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    own = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": named}
    tensors = as_modelopt(experts(layer, "NVFP4A16"))
    write_checkpoint(tmp_path, {**MOE, "num_experts": 2}, tensors, hf_quant_config={"quantization": own})
    assert schemes(tmp_path) == {layer: "experts nvfp4-w4a16"}


def test_gpt_oss_as_openai_publishes_it(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_gpt_oss(tmp_path / "made"))
    published = {
        "architectures": ["GptOssForCausalLM"],
        "experts_per_token": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "hidden_act": "silu",
        "model_type": "gpt_oss",
        "swiglu_limit": 7.0,
        "initial_context_length": 4096,
        "router_aux_loss_coef": 0.9,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    }
    assert config["quantization_config"] == published["quantization_config"]
    checkpoint = plan(write_checkpoint(tmp_path / "published", published, tensors))
    assert set(schemes(tmp_path / "published").values()) == {"experts mxfp4-w4a16"}
    assert checkpoint.dtype == "bfloat16"


def refused(tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], own: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(write_checkpoint(tmp_path, config, tensors, hf_quant_config=own))


def test_fp8_layers_beside_fp4_layers_are_refused_by_name(tmp_path: Path) -> None:
    fp8_group = {"weights": FP8, "input_activations": FP8, "targets": ["re:.*self_attn.*"], "format": "float-quantized"}
    description = compressed_tensors(format="mixed-precision")
    description["config_groups"]["group_1"] = fp8_group
    message = "config group 'group_1' has 8-bit float weights .*; supported are NVFP4"
    refused(tmp_path, {"quantization_config": description}, linear("model.layers.0.mlp.up_proj"), None, message)


def test_modelopts_fp8_layers_beside_fp4_layers_are_refused_by_name(tmp_path: Path) -> None:
    named = {"a.up_proj": {"quant_algo": "NVFP4", "group_size": 16}, "a.o_proj": {"quant_algo": "FP8"}}
    own = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": named}}
    message = r"hf_quant_config\.json: layer 'a\.o_proj' has quant_algo 'FP8'; supported are NVFP4, W4A16_NVFP4"
    refused(tmp_path, {}, as_modelopt(linear("a.up_proj")), own, message)


def test_an_fp8_base_model_under_fp4_experts_is_refused_by_its_tensor(tmp_path: Path) -> None:
    # As published for DeepSeek-V4: what is excluded is not in 16 bits but stays FP8.
    own = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["*.self_attn*"]}}
    tensors = as_modelopt(linear("layers.0.mlp.up_proj"))
    tensors["layers.0.self_attn.wq.weight"] = torch.ones(16, 16).to(torch.float8_e4m3fn)
    refused(tmp_path, {}, tensors, own, r"'layers\.0\.self_attn\.wq\.weight': is F8_E4M3 .* no FP4 layer uses it")


def test_modelopts_experts_stored_as_one_stack_are_refused_by_their_tensor(tmp_path: Path) -> None:
    # As published for Step-3.5: [experts, N, K/2] under one name.
    stack = {
        name: torch.stack((tensor, tensor)) for name, tensor in as_modelopt(linear("layers.3.moe.up_proj")).items()
    }
    own = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    refused(tmp_path, {}, stack, own, r"layers\.3\.moe\.up_proj\.weight': is U8 \[2, 16, 8\], expected U8 \[N, K/2\]")


@pytest.mark.parametrize("method", ["quark", "fp8", "nvfp4"])
def test_another_tools_description_names_its_method(tmp_path: Path, method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    refused(tmp_path, config, linear("a"), None, f"quant_method is '{method}'; supported are compressed-tensors")
