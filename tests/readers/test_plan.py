"""Plans: what is no checkpoint, tensors that do not fit, experts that do not fit, and that no torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.checkpoints import Checkpoint, plan
from halfbyte.errors import CheckpointError, UsageError
from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import quantization_config, quantized_linear
from support.tiny_models import write_llama, write_qwen3_moe

ROOT = Path(__file__).parents[2]
Q = "model.layers.0.self_attn.q_proj"
E = "model.layers.0.mlp.experts"


def test_a_plan_imports_no_torch_and_no_safetensors() -> None:
    code = (
        "import sys; from halfbyte.checkpoints import plan; plan(sys.argv[1]);"
        "print([name for name in ('torch', 'numpy', 'safetensors', 'transformers') if name in sys.modules])"
    )
    path = ROOT / "examples/tiny-python-lm"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_accounts_for_every_byte_of_the_weights(tmp_path: Path) -> None:
    checkpoint = plan(write_llama(tmp_path, shards=2))
    _, tensors = read_checkpoint(tmp_path)
    unquantized = {info.name for info in checkpoint.unquantized}
    assert unquantized == {name for name in tensors if "norm" in name or "embed" in name or "lm_head" in name}
    assert checkpoint.unquantized_bytes == sum(tensors[name].nbytes for name in unquantized)


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"dtype": "float16"}, None, "float16"),
        ({"torch_dtype": "torch.float32"}, None, "float32"),
        ({"text_config": {"dtype": "float16"}}, None, "float16"),
        ({}, None, "bfloat16"),
        ({"dtype": "float16"}, "float32", "float32"),
    ],
)
def test_the_dtype_is_the_arguments_or_the_configurations(
    tmp_path: Path, config: dict[str, Any], dtype: str | None, expected: str
) -> None:
    whole = {**config, "quantization_config": quantization_config("NVFP4")}
    checkpoint = plan(write_checkpoint(tmp_path, whole, quantized_linear("a", torch.ones(2, 16))), dtype)
    assert (checkpoint.dtype, checkpoint.layers[0].problem.dtype) == (expected, expected)


def test_an_unknown_dtype_is_a_usage_error_or_the_checkpoints(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    with pytest.raises(UsageError, match="'bfloat61'; did you mean 'bfloat16'"):
        plan(tmp_path / "good", "bfloat61")
    with pytest.raises(CheckpointError, match=r"config\.json: dtype is 'float8'"):
        plan(write_checkpoint(tmp_path / "bad", {**config, "dtype": "float8"}, tensors))


def test_what_is_no_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"Only local folders are read.*hf download org/name --local-dir name"):
        plan("org/name")
    with pytest.raises(CheckpointError, match="does not exist"):
        plan(tmp_path / "nowhere")
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        plan(tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        plan(tmp_path)
    (tmp_path / "file.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config("NVFP4")}))
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        plan(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin, which cannot be read"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"config\.json: has no quantization_config"),
        ({"quantization_config": "NVFP4"}, "quantization_config is 'NVFP4', expected an object"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quant_method is 'gptq'; supported are .*'bits': 4",
        ),
        ({"quantization_config": quantization_config("NVFP4")}, "has no FP4 layers, .*'nvfp4-pack-quantized'"),
    ],
)
def test_a_checkpoint_without_fp4_layers_says_what_its_configuration_says(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan(write_checkpoint(tmp_path, config, {"a.weight": torch.ones(2, 16)}))


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def remove(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return edit


def value(number: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, number)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(f"{Q}.weight_scale"), f"{Q}.weight_packed': its partner '{Q}.weight_scale' is missing"),
        (remove(f"{Q}.weight_global_scale"), f"partner '{Q}.weight_global_scale' is missing"),
        (remove(f"{Q}.input_global_scale"), f"partner '{Q}.input_global_scale' is missing .nvfp4-w4a4 needs it"),
        (remove(f"{Q}.weight_packed"), f"'{Q}.* no FP4 layer uses it"),
        (lambda t: t.update({"x.weight_zero_point": torch.ones(1)}), "'x.weight_zero_point'.* no FP4 layer uses it"),
        (lambda t: t.update({"x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}), "'x.weight': is F8_E4M3 .*no FP4"),
        (replace(f"{Q}.weight_packed", lambda x: x.int()), f"{Q}.weight_packed': is I32 .64, 32., expected U8"),
        (replace(f"{Q}.weight_packed", lambda x: x[None]), r"is U8 \[1, 64, 32\], expected U8 \[N, K/2\]"),
        (replace(f"{Q}.weight_packed", lambda x: x[:, :20]), "K=40 is not a multiple of nvfp4's group of 16"),
        (replace(f"{Q}.weight_packed", lambda x: x[:0]), r"is U8 \[0, 32\]"),
        (
            replace(f"{Q}.weight_scale", lambda x: x[:, :3]),
            rf"{Q}.weight_scale': has shape \[64, 3\], expected \[64, 4\]",
        ),
        (replace(f"{Q}.weight_scale", lambda x: x.float()), "weight_scale': is F32, but nvfp4 scales are F8_E4M3"),
        (replace(f"{Q}.weight_scale", lambda x: x.view(torch.uint8)), "weight_scale': is U8, but nvfp4"),
        (
            replace(f"{Q}.weight_global_scale", lambda x: x.double()),
            "weight_global_scale': is F64 .1., expected one F32",
        ),
        (replace(f"{Q}.weight_global_scale", lambda x: x[:0]), r"weight_global_scale': is F32 \[0\], expected one F32"),
        (
            replace(f"{Q}.weight_global_scale", value(0.0)),
            f"tensor '{Q}.weight_global_scale': is 0.0; a global scale must",
        ),
        (replace(f"{Q}.weight_global_scale", value(-1.0)), "weight_global_scale': is -1.0"),
        (replace(f"{Q}.weight_global_scale", value(float("inf"))), "weight_global_scale': is inf"),
        (replace(f"{Q}.input_global_scale", value(float("nan"))), "input_global_scale': is nan"),
        (replace(f"{Q}.weight_global_scale", lambda x: torch.cat((x, 2 * x))), "has 2 different values .* rows"),
        (
            lambda t: t.update({f"{Q}.bias": torch.ones(63)}),
            rf"{Q}.bias': is F32 \[63\], expected floating point \[64\]",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(64, dtype=torch.int8)}), "bias': is I8"),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_file_and_tensor(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    edit(tensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor .*{message}|model\.safetensors: {message}"):
        plan(write_checkpoint(tmp_path / "bad", config, tensors))


def test_equal_global_scales_of_several_parts_are_one(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    replace(f"{Q}.weight_global_scale", lambda x: x.repeat(3))(tensors)
    before, after = plan(tmp_path / "good"), plan(write_checkpoint(tmp_path / "other", config, tensors))
    assert [layer.problem for layer in after.layers] == [layer.problem for layer in before.layers]


def test_a_bias_belongs_to_its_layer(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    tensors[f"{Q}.bias"] = torch.ones(64, dtype=torch.bfloat16)
    checkpoint = plan(write_checkpoint(tmp_path / "other", config, tensors))
    assert {layer.name for layer in checkpoint.layers if layer.problem.bias} == {Q}
    assert f"{Q}.bias" not in {info.name for info in checkpoint.unquantized}


def expert(number: int, projection: str = "up_proj") -> list[str]:
    parts = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    return [f"{E}.{number}.{projection}.{part}" for part in parts]


def whole_expert(number: int) -> list[str]:
    return [name for projection in ("gate_proj", "up_proj", "down_proj") for name in expert(number, projection)]


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({k.replace(old, new): tensors.pop(k) for k in list(tensors) if old in k})


def other_size(number: int, projection: str, rows: int, columns: int, preset: str = "NVFP4") -> Callable[..., None]:
    weights = quantized_linear(f"{E}.{number}.{projection}", torch.randn(rows, columns), preset)
    return lambda tensors: tensors.update(weights)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(*expert(2)), f"{E} has 4 experts, but the packed up of expert 2 is missing .1 in all"),
        (remove(*whole_expert(3)), "the packed gate of expert 3 is missing"),
        (renamed(f"{E}.3.", f"{E}.4."), "the packed gate of expert 3 is missing"),
        (
            lambda t: t.update(quantized_linear(f"{E}.4.up_proj", torch.randn(32, 64))),
            "expert 4, but config.json says 4",
        ),
        (lambda t: t.update(quantized_linear(f"{E}.0.w3", torch.randn(32, 64))), "is the up of expert 0, as is"),
        (renamed(f"{E}.1.up_proj", f"{E}.1.linear_fc1"), "unknown projection 'linear_fc1'"),
        (other_size(1, "gate_proj", 48, 64), r"gate of an expert is \[48, 64\], but up is \[32, 64\]"),
        (other_size(1, "down_proj", 32, 32), r"down of an expert is \[32, 32\], .* expected \[64, 32\]"),
        (other_size(0, "up_proj", 32, 32), "expected"),
        (
            lambda t: t.update({f"{E}.1.up_proj.bias": torch.ones(32)}),
            "has no bias, but .*1.up_proj' of the same experts",
        ),
    ],
)
def test_experts_that_do_not_fit_together_are_errors(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good"))
    edit(tensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor .*{message}"):
        plan(write_checkpoint(tmp_path / "bad", config, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": None}, "how many experts serve a token"),
        ({"num_experts_per_tok": 5}, "5 experts serve a token, but there are only 4"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'; supported are silu"),
        ({"hidden_act": "relu2"}, "is a gate, but the activation relu2 has none"),
        ({"swiglu_limit": 7.0}, "clamped activation"),
    ],
)
def test_a_configuration_that_does_not_describe_the_experts_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good"))
    with pytest.raises(CheckpointError, match=message):
        plan(write_checkpoint(tmp_path / "bad", {**config, **change}, tensors))


def test_experts_of_different_schemes_are_an_error(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good", "NVFP4A16"))
    groups = config["quantization_config"]["config_groups"]
    groups["mx"] = {**quantization_config("MXFP4A16")["config_groups"]["group_0"], "targets": [f"{E}.2.up_proj"]}
    remove(f"{E}.2.up_proj.weight_global_scale")(tensors)
    tensors |= quantized_linear(f"{E}.2.up_proj", torch.randn(32, 64), "MXFP4A16")
    with pytest.raises(CheckpointError, match=f"{E}.2.up_proj.weight_packed': is mxfp4-w4a16, but"):
        plan(write_checkpoint(tmp_path / "bad", config, tensors))


def test_experts_without_a_gate_are_planned(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good"))
    ungated = {name: tensor for name, tensor in tensors.items() if ".gate_proj." not in name}
    changed = {**config, "hidden_act": None, "mlp_hidden_act": "relu2"}
    layer = plan(write_checkpoint(tmp_path / "other", changed, ungated)).layers[0]
    assert (str(layer.problem), set(layer.sources)) == (
        "experts nvfp4-w4a4 E=4 top-2 H=64 I=32 relu2 bfloat16",
        {"up", "down"},
    )


@pytest.mark.parametrize(
    ("preset", "factor", "input_factor", "shared"),
    [
        ("NVFP4", 1.0, 1.0, True),
        ("NVFP4", 1.0, 2.0, False),
        ("NVFP4A16", 4.0, 1.0, None),
        ("NVFP4A16", 0.5, 1.0, None),
        ("NVFP4A16", 1.1, 1.0, False),
        ("MXFP4A16", 1.0, 1.0, True),
    ],
)
def test_whether_gate_and_up_share_a_global_scale_is_decided_from_the_scalars(
    tmp_path: Path, preset: str, factor: float, input_factor: float, shared: bool | None
) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good", preset))
    for name in [name for name in tensors if ".experts." in name and ".gate_proj." in name]:
        up = tensors[name.replace("gate_proj", "up_proj")]
        # Only one expert differs: one is enough.
        last = ".experts.3." in name
        if name.endswith("weight_global_scale"):
            tensors[name] = up * factor if last else up
        if name.endswith("input_global_scale"):
            tensors[name] = up * input_factor if last else up
    problem = plan(write_checkpoint(tmp_path / "other", config, tensors)).layers[0].problem
    assert problem.to_dict()["shared_global_scale"] is shared


@pytest.mark.parametrize(
    ("preset", "changed", "found"),
    [
        ("NVFP4", "", "one"),
        ("NVFP4", "gate_proj", "per-expert"),
        ("NVFP4", "up_proj", "per-expert"),
        ("NVFP4", "down_proj", "one-for-x"),
        ("NVFP4", "_proj", "per-expert"),
        ("NVFP4A16", "", None),
        ("MXFP4", "", None),
    ],
)
def test_which_experts_share_input_scales_is_decided_from_the_scalars(
    tmp_path: Path, preset: str, changed: str, found: str | None
) -> None:
    config, tensors = read_checkpoint(write_qwen3_moe(tmp_path / "good", preset))
    for name in tensors:
        # One expert is enough.
        if changed and name.startswith(f"{E}.3.") and name.endswith(f"{changed}.input_global_scale"):
            tensors[name] = tensors[name] * 1.5
    checkpoint = plan(write_checkpoint(tmp_path / "other", config, tensors))
    layer = next(layer for layer in checkpoint.layers if layer.name == E)
    assert layer.problem.to_dict()["input_scales"] == found
    with Checkpoint(checkpoint) as opened:
        assert opened.experts(layer).input_scales == found
