"""What load_model promises beside the numbers, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import CheckpointError, MissingExtraError, OutOfMemoryError, UsageError
from halfbyte.machines import Machine
from halfbyte.models import load_model, load_tokenizer
from halfbyte.models.names import Names
from halfbyte.modules import FP4Experts
from support.checkpoints import read_checkpoint
from support.dense import change_tensors, dense_model, logits_of
from support.quantized import oracle_dequantize

Writer = Callable[..., tuple[Path, str]]
IDS = torch.arange(24).reshape(2, 12)


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_model_is_complete_in_eval_mode_and_without_gradients(write_tiny: Writer) -> None:
    model = load_model(write_tiny("mixtral-nvfp4")[0], device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not hasattr(model.config, "quantization_config")


def test_dtype_is_the_checkpoints_unless_asked_otherwise(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    assert load_model(path, device="cpu").dtype == torch.bfloat16
    assert load_model(path, device="cpu", dtype=torch.float16).dtype == torch.float16
    assert logits_of(load_model(path, device="cpu", dtype="float32"), IDS).dtype == torch.float32


def test_parameters_that_must_not_lose_precision_stay_in_float32(write_tiny: Writer) -> None:
    path, _ = write_tiny("gpt-oss")
    model: Any = load_model(path, device="cpu", dtype="float16")
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float16
    model = load_model(path, device="cpu", dtype="bfloat16")
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_generation_config_of_the_checkpoint_counts(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(path, device="cpu").generation_config.eos_token_id == [7, 9]


def test_progress_counts_up_to_the_total(write_tiny: Writer) -> None:
    seen: list[tuple[int, int]] = []
    load_model(write_tiny("qwen3-nvfp4")[0], device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1))
    assert len({total for _, total in seen}) == 1


@pytest.mark.parametrize("kind", ["qwen3moe-nvfp4", "mixtral-nvfp4"])
def test_experts_that_are_not_quantized_stay_transformers_own(write_tiny: Writer, tmp_path: Path, kind: str) -> None:
    path, preset = write_tiny(kind)
    _, tensors = read_checkpoint(path)
    changes: dict[str, Any] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if "layers.0." in module and ".experts." in module:
            changes[name] = None
            if leaf == "weight_packed":
                changes[f"{module}.weight"] = oracle_dequantize(module, tensors, preset)
    change_tensors(path, changes)
    model: Any = load_model(path, device="cpu", dtype="float32")
    assert [isinstance(layer.mlp.experts, FP4Experts) for layer in model.model.layers] == [False, True]
    expected = logits_of(dense_model(path, tmp_path / "dense", preset), IDS)
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_named(write_tiny: Writer, name: str) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_tensors(path, {name: None})
    with pytest.raises(CheckpointError, match=rf"{path.name} lacks .*{name}"):
        load_model(path, device="cpu")


def test_unexpected_tensor_is_named(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_tensors(path, {"model.layers.0.self_attn.q_proj.lora.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.lora\.weight"):
        load_model(path, device="cpu")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.k_scale", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
def test_scales_of_a_quantized_cache_and_old_buffers_are_tolerated(write_tiny: Writer, name: str) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_tensors(path, {name: torch.ones(1)})
    load_model(path, device="cpu")


def test_wrongly_shaped_tensor_is_named_with_its_file(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_tensors(path, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .model\.norm\.weight.: has shape \[32\]"):
        load_model(path, device="cpu")


def test_layer_whose_size_is_not_the_models_is_named(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_config(path, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.\w+: cannot replace Linear .*checkpoint has"):
        load_model(path, device="cpu")


def test_layer_that_the_model_does_not_have_is_named(write_tiny: Writer) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_config(path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*has no"):
        load_model(path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "vit"}, "it has no causal language model of type 'vit'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "bogus"}}, "bogus"),
    ],
)
def test_model_that_transformers_cannot_build_is_refused(
    write_tiny: Writer, changes: dict[str, Any], message: str
) -> None:
    path, _ = write_tiny("llama-nvfp4")
    change_config(path, **changes)
    with pytest.raises(
        CheckpointError, match=rf"config\.json: transformers cannot build this model: \w+: (.|\n)*{message}"
    ):
        load_model(path, device="cpu")


def test_missing_transformers_names_the_install_line(write_tiny: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_tiny("llama-nvfp4")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'halfbyte\[transformers\]'"):
        load_model(path)


def test_tokenizer_that_is_not_there_is_a_checkpoint_error(write_tiny: Writer) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(write_tiny("llama-nvfp4")[0])


def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    write_tiny: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_tiny("llama-nvfp4")
    small = Machine(name="small", arch="cpu", memory=40_000)
    monkeypatch.setattr("halfbyte.decisions.probe", lambda *_: small)
    monkeypatch.setattr(Names, "__init__", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(OutOfMemoryError, match="small"):
        load_model(path, device="cpu")


def test_unknown_device_is_a_usage_error(write_tiny: Writer) -> None:
    with pytest.raises(UsageError, match="no device 'cuda:9'"):
        load_model(write_tiny("llama-nvfp4")[0], device="cuda:9")
