"""Plans of ModelOpt checkpoints: both places of the description, excludes, mixed precision, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import Checkpoint, plan
from halfbyte.errors import CheckpointError
from support.checkpoints import read_checkpoint, write_checkpoint
from support.tiny_models import write_modelopt_llama

QUANTIZATION = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}


def rewrite(tmp_path: Path, quantization: dict[str, Any], extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A ModelOpt checkpoint with another description in hf_quant_config.json."""
    config, tensors = read_checkpoint(write_modelopt_llama(tmp_path / "good"))
    return write_checkpoint(
        tmp_path / "other", config, {**tensors, **(extra or {})}, hf_quant_config={"quantization": quantization}
    )


@pytest.mark.parametrize("in_config_json", [False, True])
@pytest.mark.parametrize(("algo", "scheme"), [("NVFP4", "nvfp4-w4a4"), ("W4A16_NVFP4", "nvfp4-w4a16")])
def test_both_algorithms_are_read_from_both_places(
    tmp_path: Path, algo: str, scheme: str, in_config_json: bool
) -> None:
    checkpoint = plan(write_modelopt_llama(tmp_path, algo, in_config_json=in_config_json))
    assert {layer.problem.scheme.name for layer in checkpoint.layers} == {scheme}
    assert len(checkpoint.layers) == 14
    assert "lm_head.weight" in {info.name for info in checkpoint.unquantized}


def test_the_global_scale_is_stored_as_a_multiplier(tmp_path: Path) -> None:
    _, tensors = read_checkpoint(write_modelopt_llama(tmp_path))
    for layer in plan(tmp_path).layers:
        (source,) = layer.sources["weight"]
        assert source.global_scale == tensors[f"{layer.name}.weight_scale_2"].item()
        assert source.input_global_scale == tensors[f"{layer.name}.input_scale"].item()


def test_an_unfilled_input_scale_of_a_weight_only_layer_is_ignored(tmp_path: Path) -> None:
    checkpoint = plan(write_modelopt_llama(tmp_path, "W4A16_NVFP4"))
    assert {info.name for info in checkpoint.ignored} == {f"{layer.name}.input_scale" for layer in checkpoint.layers}
    with Checkpoint(checkpoint) as opened:
        assert opened.linear(checkpoint.layers[0]).matrix.input_global_scale is None


def test_nvfp4_whose_groups_have_no_input_activations_is_weight_only(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_modelopt_llama(tmp_path / "good", "W4A16_NVFP4", in_config_json=True))
    config["quantization_config"]["quant_algo"] = "NVFP4"
    checkpoint = plan(write_checkpoint(tmp_path / "other", config, tensors))
    assert {layer.problem.scheme.name for layer in checkpoint.layers} == {"nvfp4-w4a16"}


def test_details_in_its_own_file_serve_a_configuration_that_only_names_the_method(tmp_path: Path) -> None:
    path = rewrite(tmp_path, QUANTIZATION)
    config, tensors = read_checkpoint(path)
    config["quantization_config"] = {"quant_method": "modelopt_fp4"}
    write_checkpoint(path, config, tensors)
    assert len(plan(path).layers) == 14


def test_mixed_precision_gives_each_layer_its_own_scheme(tmp_path: Path) -> None:
    layers = {
        "model.layers.0": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.*": {"quant_algo": "NVFP4"},
        "model.layers.1.mlp": {"quant_algo": "W4A16_NVFP4"},
        "model.layers.1.mlp.up_proj": {"quant_algo": "NVFP4"},
    }
    checkpoint = plan(rewrite(tmp_path, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}))
    weight_only = {layer.name for layer in checkpoint.layers if layer.problem.scheme.activations is None}
    assert weight_only == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_algo": "FP8"}, r"hf_quant_config\.json: the checkpoint has quant_algo 'FP8'; supported are NVFP4"),
        ({"quant_algo": "NVFP4_AWQ"}, "'NVFP4_AWQ'"),
        ({}, "quant_algo None"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size 32; nvfp4 has 16"),
        (
            {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.1*"]},
            r"is packed, but .* excludes 'model.layers.1\*'",
        ),
        (
            {"quant_algo": "NVFP4", "exclude_modules": "lm_head"},
            "quantization.exclude_modules is 'lm_head', expected a list of strings",
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0": {"quant_algo": "FP8"}}},
            "layer 'model.layers.0' has quant_algo 'FP8'",
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0": {"quant_algo": "NVFP4"}}},
            "does not name 'model.layers.1",
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0": "NVFP4"}},
            "layers.0 is 'NVFP4', expected an object",
        ),
    ],
)
def test_what_cannot_be_run_is_an_error_that_names_what_was_found(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(rewrite(tmp_path, quantization))


def test_the_scale_of_an_awq_checkpoint_is_not_lost_silently(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.up_proj.pre_quant_scale": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"pre_quant_scale': is F32 .* no FP4 layer uses it"):
        plan(rewrite(tmp_path, QUANTIZATION, extra))


def test_scales_of_a_quantized_cache_are_ignored_and_noted(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    checkpoint = plan(rewrite(tmp_path, {**QUANTIZATION, "kv_cache_quant_algo": "FP8"}, extra))
    assert [info.name for info in checkpoint.ignored] == list(extra)
    assert len(checkpoint.notes) == 1
