"""Plans of compressed-tensors checkpoints against compressed-tensors' own matching, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import QuantizationScheme
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.checkpoints import LayerPlan, MatrixSource, Plan, plan
from halfbyte.errors import CheckpointError
from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import quantization_config, quantized_linear, scheme_of
from support.tiny_models import write_llama, write_mixtral_nvfp4, write_qwen3_moe

ROOT = Path(__file__).parents[2]
REAL = (
    ROOT / "examples/tiny-python-lm",
    *(ROOT / "tests/checkpoints" / name for name in (
        "tiny-python-llama-mxfp4a16", "tiny-python-qwen3moe-nvfp4a16", "tiny-python-qwen3moe-mxfp4"
    )),
)  # fmt: skip


def planned(checkpoint: Plan) -> dict[str, str]:
    """Module to scheme name, experts one by one."""
    sources = (source for layer in checkpoint.layers for part in layer.sources.values() for source in part)
    return {source.name: source.scheme.name for source in sources}


def scheme_name(scheme: QuantizationScheme) -> str:
    fmt = {16: "nvfp4", 32: "mxfp4"}[scheme.weights.group_size]
    return f"{fmt}-w4a{16 if scheme.input_activations is None else 4}"


def skeleton(names: list[str]) -> nn.Module:
    """A tree of small modules with these names: Linear, unless they are embeddings or norms."""
    root = nn.Module()
    for name in names:
        module = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        embedding, norm = "embed" in leaf, "norm" in leaf
        module.add_module(leaf, nn.Embedding(1, 1) if embedding else nn.LayerNorm(1) if norm else nn.Linear(16, 16))
    return root


def matched(model: nn.Module, quantization: dict[str, Any]) -> dict[str, str]:
    """compressed-tensors' own answer: module to scheme name."""
    known = {key: value for key, value in quantization.items() if key in QuantizationConfig.model_fields}
    apply_quantization_config(model, QuantizationConfig.model_validate(known), show_progress=False)
    schemes = ((name, getattr(module, "quantization_scheme", None)) for name, module in model.named_modules())
    return {name: scheme_name(scheme) for name, scheme in schemes if scheme is not None}


def module_names(path: Path) -> list[str]:
    tensors = read_checkpoint(path)[1]
    return sorted({name.rpartition(".")[0] for name in tensors})


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_layers_and_schemes_of_real_checkpoints_are_those_that_compressed_tensors_matches(path: Path) -> None:
    checkpoint = plan(path)
    oracle = matched(skeleton(module_names(path)), checkpoint.config["quantization_config"])
    assert planned(checkpoint) == oracle
    assert oracle


def test_the_real_dense_checkpoint_agrees_with_the_model_that_transformers_builds() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(REAL[0]))
    quantization = json.loads((REAL[0] / "config.json").read_text())["quantization_config"]
    assert planned(plan(REAL[0])) == matched(model, quantization)


def group(preset: str, *targets: str) -> dict[str, Any]:
    dumped: dict[str, Any] = scheme_of(preset).model_dump(mode="json")
    return {**dumped, "targets": list(targets)}


@pytest.mark.parametrize(
    ("groups", "ignore"),
    [
        ([group("NVFP4", "Linear")], ["model.layers.0.self_attn.k_proj", "lm_head"]),
        ([group("MXFP4", "Linear")], [r"re:.*self_attn\..*", "lm_head"]),
        ([group("NVFP4", r"re:.*mlp.*"), group("MXFP4A16", r"re:.*self_attn.*")], []),
        ([group("NVFP4", "Linear"), group("MXFP4A16", r"re:.*self_attn.*")], ["lm_head"]),
        ([group("MXFP4A16", r"re:.*layers\.0.*"), group("NVFP4", r"re:.*k_proj")], ["lm_head"]),
        ([group("MXFP4", r"re:.*k_proj"), group("NVFP4", "model.layers.0.self_attn.k_proj")], []),
        ([group("NVFP4", r"re:model\.layers\.1"), group("NVFP4A16", "Linear")], ["re:lm", "re:.*o_proj$"]),
        ([group("NVFP4", "Linear", "re:self_attn"), group("MXFP4", "model.layers.1.mlp.up_proj", "Embedding")], []),
        ([group("NVFP4", "Linear"), group("MXFP4", "Linear")], ["lm_head"]),
    ],
)
def test_targets_and_ignores_are_matched_as_compressed_tensors_does(
    tmp_path: Path, groups: list[dict[str, Any]], ignore: list[str]
) -> None:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = ["lm_head", *(f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves)]
    config = {**quantization_config("NVFP4", ignore), "config_groups": {f"g{i}": g for i, g in enumerate(groups)}}
    config["format"] = "mixed-precision"
    oracle = matched(skeleton(names), config)
    assert oracle
    presets = {"nvfp4-w4a4": "NVFP4", "nvfp4-w4a16": "NVFP4A16", "mxfp4-w4a4": "MXFP4", "mxfp4-w4a16": "MXFP4A16"}
    tensors = {f"{name}.weight": torch.ones(2, 32) for name in names if name not in oracle}
    for name, scheme in oracle.items():
        tensors |= quantized_linear(name, torch.randn(2, 32), presets[scheme])
    checkpoint = plan(write_checkpoint(tmp_path, {"quantization_config": config}, tensors))
    assert planned(checkpoint) == oracle
    assert {info.name for info in checkpoint.unquantized} == tensors.keys() - {
        name for name in tensors if name.rpartition(".")[0] in oracle
    }


def change_weights(config: dict[str, Any], **values: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)


def change_activations(config: dict[str, Any], **values: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(values)


def change_group(config: dict[str, Any], **values: Any) -> None:
    config["quantization_config"]["config_groups"]["group_0"].update(values)


def change(config: dict[str, Any], **values: Any) -> None:
    config["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: change_weights(c, num_bits=8), "8-bit float weights .*tensor_group.*supported are NVFP4"),
        (
            lambda c: change_weights(c, type="int", strategy="group", group_size=128),
            "4-bit int weights .* 128",
        ),
        (lambda c: change_weights(c, group_size=32), "strategy tensor_group, group_size 32"),
        (lambda c: change_weights(c, symmetric=False), "asymmetric"),
        (lambda c: change_group(c, weights=None), "'group_0' has no weights"),
        (lambda c: change_activations(c, num_bits=8, strategy="token"), "8-bit float input activations"),
        (lambda c: change_activations(c, dynamic=False), "dynamic: False.*supported are none, and nvfp4 activations"),
        (lambda c: change_activations(c, strategy="group", group_size=32, dynamic=True), "group_size 32"),
        (
            lambda c: change_group(c, output_activations={"num_bits": 8, "type": "float"}),
            "8-bit float output act",
        ),
        (lambda c: change_group(c, format="pack-quantized"), "in format 'pack-quantized'"),
        (lambda c: change_group(c, targets=["re:("]), "no regular expression"),
        (lambda c: change_group(c, targets=["re:.*self_attn.*"]), "no config group targets 'model.layers..*mlp"),
        (lambda c: change_group(c, targets="Linear"), "targets is 'Linear', expected a list"),
        (lambda c: change(c, config_groups={}), "targets: none"),
        (lambda c: change(c, config_groups=[1]), "config_groups is"),
        (lambda c: change(c, ignore=["re:.*q_proj"]), "ignore list .* has 'model.layers.*q_proj'"),
        (lambda c: change(c, quantization_status="frozen"), "quantization_status is 'frozen'"),
        (lambda c: change(c, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (lambda c: change(c, transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "transforms"),
    ],
)
def test_what_cannot_be_run_is_an_error_that_names_what_was_found(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    edit(config)
    with pytest.raises(CheckpointError, match=message):
        plan(write_checkpoint(tmp_path / "bad", config, tensors))


def test_unknown_and_missing_keys_are_tolerated_and_the_cache_scheme_is_noted(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    before = planned(plan(tmp_path / "good"))
    change(config, moe_sparsity_config=None, future={"x": 1}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    change_weights(config, future=1)
    for key in ("ignore", "format", "quantization_status"):
        del config["quantization_config"][key]
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    checkpoint = plan(write_checkpoint(tmp_path / "other", config, tensors))
    assert planned(checkpoint) == before
    assert [info.name for info in checkpoint.ignored] == ["model.layers.0.self_attn.k_scale"]
    assert len(checkpoint.notes) == 1


def test_mixtral_is_grouped_by_its_own_spelling(tmp_path: Path) -> None:
    checkpoint = plan(write_mixtral_nvfp4(tmp_path, shards=2))
    layer = next(layer for layer in checkpoint.layers if layer.problem.op == "experts")
    assert layer.name == "model.layers.0.block_sparse_moe.experts"
    spelled = {role: [source.name.rpartition(".")[2] for source in sources] for role, sources in layer.sources.items()}
    assert spelled == {"gate": ["w1"] * 4, "up": ["w3"] * 4, "down": ["w2"] * 4}


def test_experts_are_one_layer_with_the_sizes_of_the_configuration(tmp_path: Path) -> None:
    checkpoint = plan(write_qwen3_moe(tmp_path), dtype="float32")
    layers = {layer.name: layer for layer in checkpoint.layers}
    problem = layers["model.layers.1.mlp.experts"].problem
    assert problem.to_dict() == {
        "op": "experts",
        "scheme": "nvfp4-w4a4",
        "experts": 4,
        "top_k": 2,
        "hidden": 64,
        "intermediate": 32,
        "dtype": "float32",
        "activation": "silu",
        "bias": False,
        "shared_global_scale": False,
        "input_scales": "one",
    }


def test_layers_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    checkpoint = plan(write_llama(tmp_path, num_hidden_layers=11))
    numbers = [int(layer.name.split(".")[2]) for layer in checkpoint.layers]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 11


def source_of(checkpoint: Plan, name: str) -> MatrixSource:
    layer: LayerPlan = next(layer for layer in checkpoint.layers if layer.name == name)
    return layer.sources["weight"][0]


def test_global_scales_become_multipliers_in_double_precision(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    _, tensors = read_checkpoint(write_llama(tmp_path))
    source = source_of(plan(tmp_path), name)
    assert source.global_scale == 1 / tensors[f"{name}.weight_global_scale"].double().item()
    assert source.input_global_scale == 1 / tensors[f"{name}.input_global_scale"].double().item()
