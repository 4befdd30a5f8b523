"""Weights that the reader gives against compressed-tensors' own dequantization, bit for bit, and its memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoints import Checkpoint, LayerPlan, plan
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.matrix import Matrix
from halfbyte.weights import ExpertsWeights
from support.checkpoints import read_checkpoint, write_checkpoint
from support.quantized import oracle_dequantize, quantization_config, quantized_linear
from support.tiny_models import write_llama, write_mixtral_nvfp4, write_modelopt_llama, write_qwen3_moe

ROOT = Path(__file__).parents[2]
REAL = {
    "examples/tiny-python-lm": "NVFP4",
    "tests/checkpoints/tiny-python-llama-mxfp4a16": "MXFP4A16",
    "tests/checkpoints/tiny-python-qwen3moe-nvfp4a16": "NVFP4A16",
    "tests/checkpoints/tiny-python-qwen3moe-mxfp4": "MXFP4",
}


def plain(matrix: Matrix, expert: int | None = None) -> Tensor:
    """float32 [N, K] of a matrix or of one of a stack, by compressed-tensors' unpacking and the plain formula.

    The divisor is recovered from the multiplier: dividing by it is what compressed-tensors does.
    """
    packed, scales = matrix.packed, matrix.scales
    if expert is not None:
        packed, scales = packed[expert], scales[expert]
    values: Tensor = unpack_fp4_from_uint8(packed, matrix.n, matrix.k, torch.float32)
    steps = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    if matrix.global_scale is not None:
        steps = steps / (1 / matrix.global_scale[expert or 0]).float()
    return values * steps.repeat_interleave(matrix.format.group_size, dim=-1)


def experts_by_role(layer: LayerPlan, weights: ExpertsWeights) -> list[tuple[str, Tensor]]:
    """(module, float32 weight) of every matrix of every expert."""
    found = []
    matrices = {"gate": weights.gate, "up": weights.up, "down": weights.down}
    for role, sources in layer.sources.items():
        matrix = matrices[role]
        assert matrix is not None
        found += [(source.name, plain(matrix, number)) for number, source in enumerate(sources)]
    return found


def check_all(path: Path, preset: str) -> int:
    """Compare every matrix of a compressed-tensors checkpoint; the number compared."""
    _, tensors = read_checkpoint(path)
    checkpoint, compared = plan(path), 0
    with Checkpoint(checkpoint) as opened:
        for layer in checkpoint.layers:
            if layer.problem.op == "linear":
                weights = [(layer.name, plain(opened.linear(layer).matrix))]
            else:
                weights = experts_by_role(layer, opened.experts(layer))
            for module, weight in weights:
                oracle = oracle_dequantize(module, tensors, preset)
                assert torch.equal(weight, oracle), module
                compared += 1
        for info in checkpoint.unquantized:
            stored, oracle = opened.tensor(info.name), tensors[info.name]
            assert stored.dtype == oracle.dtype
            assert torch.equal(stored, oracle)
    return compared


@pytest.mark.parametrize(("path", "preset"), REAL.items())
def test_real_checkpoints_dequantize_as_compressed_tensors_does_bit_for_bit(path: str, preset: str) -> None:
    assert check_all(ROOT / path, preset) > 40


def test_sharded_and_mixtral_checkpoints_dequantize_as_compressed_tensors_does(tmp_path: Path) -> None:
    assert check_all(write_llama(tmp_path / "llama", "MXFP4", shards=4), "MXFP4") == 14
    assert check_all(write_mixtral_nvfp4(tmp_path / "mixtral", shards=3), "NVFP4A16") == 32


def test_modelopt_and_compressed_tensors_spell_the_same_weights(tmp_path: Path) -> None:
    ours, theirs = plan(write_modelopt_llama(tmp_path / "a")), plan(write_llama(tmp_path / "b"))
    with Checkpoint(ours) as first, Checkpoint(theirs) as second:
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            x, y = first.linear(a), second.linear(b)
            assert x.scheme == y.scheme
            assert torch.equal(x.matrix.packed, y.matrix.packed)
            assert torch.equal(x.matrix.scales.view(torch.uint8), y.matrix.scales.view(torch.uint8))
            for p, q in (
                (x.matrix.global_scale, y.matrix.global_scale),
                (x.matrix.input_global_scale, y.matrix.input_global_scale),
            ):
                assert p is not None
                assert q is not None
                torch.testing.assert_close(p, q, rtol=1e-7, atol=0)


def test_every_expert_keeps_its_own_scales_and_its_place(tmp_path: Path) -> None:
    _, tensors = read_checkpoint(write_qwen3_moe(tmp_path))
    checkpoint = plan(tmp_path)
    with Checkpoint(checkpoint) as opened:
        weights = opened.experts(checkpoint.layers[0])
    stored = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(4)]
    divisors = torch.stack([tensors[f"{name}.weight_global_scale"][0] for name in stored]).double()
    inputs = torch.stack([tensors[f"{name}.input_global_scale"][0] for name in stored]).double()
    assert weights.down.global_scale is not None
    assert weights.down.input_global_scale is not None
    assert torch.equal(weights.down.global_scale, 1 / divisors)
    assert torch.equal(weights.down.input_global_scale, 1 / inputs)
    assert weights.down.name == "model.layers.0.mlp.experts.*.down_proj"


def test_biases_are_read_in_the_dtype_that_is_stored(tmp_path: Path) -> None:
    bias = torch.randn(8, dtype=torch.float16)
    tensors = {**quantized_linear("a.b", torch.randn(8, 32), "MXFP4A16"), "a.b.bias": bias}
    write_checkpoint(tmp_path, {"quantization_config": quantization_config("MXFP4A16")}, tensors)
    checkpoint = plan(tmp_path)
    with Checkpoint(checkpoint) as opened:
        matrix = opened.linear(checkpoint.layers[0]).matrix
    assert matrix.name == "a.b"
    assert matrix.bias is not None
    assert torch.equal(matrix.bias, bias)


def test_e8m0_scales_may_be_stored_under_their_own_dtype(tmp_path: Path) -> None:
    tensors = quantized_linear("a", torch.randn(8, 32), "MXFP4A16")
    scales = tensors["a.weight_scale"]
    tensors["a.weight_scale"] = scales.view(torch.float8_e8m0fnu)
    checkpoint = plan(write_checkpoint(tmp_path, {"quantization_config": quantization_config("MXFP4A16")}, tensors))
    with Checkpoint(checkpoint) as opened:
        assert torch.equal(opened.linear(checkpoint.layers[0]).matrix.scales, scales)


def test_unquantized_tensors_of_any_dtype_and_shape_are_read(tmp_path: Path) -> None:
    others = {
        "long": torch.arange(3),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
    }
    tensors = {**quantized_linear("a", torch.randn(8, 32), "MXFP4A16"), **others}
    checkpoint = plan(write_checkpoint(tmp_path, {"quantization_config": quantization_config("MXFP4A16")}, tensors))
    with Checkpoint(checkpoint) as opened:
        for name, tensor in others.items():
            torch.testing.assert_close(opened.tensor(name), tensor, rtol=0, atol=0)
        with pytest.raises(UsageError, match=r"no unquantized tensor 'scalars' .* did you mean 'scalar'"):
            opened.tensor("scalars")


def test_nan_block_scales_name_file_and_layer(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    tensors[f"{name}.weight_scale"].view(torch.uint8)[5, 1] = 0x7F
    checkpoint = plan(write_checkpoint(tmp_path / "bad", config, tensors))
    layer = next(layer for layer in checkpoint.layers if layer.name == name)
    with (
        Checkpoint(checkpoint) as opened,
        pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: 1 block scales are NaN, .*\[5, 1\]"),
    ):
        opened.linear(layer)


@pytest.mark.parametrize(("value", "message"), [(0.0, "all zeros"), (-1.0, "negative")])
def test_block_scales_that_were_never_filled_in_or_are_negative_name_the_tensor(
    tmp_path: Path, value: float, message: str
) -> None:
    config, tensors = read_checkpoint(write_llama(tmp_path / "good"))
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = torch.full(tensors[name].shape, value).to(tensors[name].dtype)
    the_plan = plan(write_checkpoint(tmp_path / "bad", config, tensors))
    layer = next(layer for layer in the_plan.layers if layer.name == "model.layers.1.mlp.down_proj")
    with (
        Checkpoint(the_plan) as checkpoint,
        pytest.raises(CheckpointError, match=rf"safetensors.*down_proj.*{message}"),
    ):
        checkpoint.linear(layer)


def test_a_file_that_shrinks_after_planning_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = plan(write_llama(tmp_path))
    os.truncate(tmp_path / "model.safetensors", checkpoint.layers[0].sources["weight"][0].packed.start + 10)
    with (
        Checkpoint(checkpoint) as opened,
        pytest.raises(CheckpointError, match=r"^[^:]*: tensor '[^']*weight_packed': ends before"),
    ):
        opened.linear(checkpoint.layers[0])


def test_weights_outlive_the_files_and_do_not_follow_them(tmp_path: Path) -> None:
    checkpoint = plan(write_llama(tmp_path))
    with Checkpoint(checkpoint) as opened:
        matrix = opened.linear(checkpoint.layers[0]).matrix
    before = matrix.packed.clone()
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert torch.equal(matrix.packed, before)


def test_reading_holds_no_more_than_the_layer_asked_for(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for number in range(8):
        for projection, shape in (("gate_proj", (64, 256)), ("up_proj", (64, 256)), ("down_proj", (256, 64))):
            name = f"mlp.experts.{number}.{projection}"
            tensors |= quantized_linear(name, torch.randn(shape), "NVFP4A16")
    config = {"quantization_config": quantization_config("NVFP4A16"), "hidden_act": "silu", "num_experts_per_tok": 2}
    checkpoint = plan(write_checkpoint(tmp_path, config, tensors))
    layer_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with Checkpoint(checkpoint) as opened:
        opened.experts(checkpoint.layers[0])
        # Buffers are Python's, so that tracemalloc sees them.
        tracemalloc.start()
        weights = opened.experts(checkpoint.layers[0])
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert weights.up.packed.shape == (8, 64, 128)
    assert layer_bytes * 0.95 < held
    assert peak < layer_bytes * 1.1
