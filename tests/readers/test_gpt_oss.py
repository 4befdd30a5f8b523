"""gpt-oss checkpoints against transformers' own MXFP4 dequantization, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from io import BufferedReader, FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from halfbyte.checkpoints import Checkpoint, MatrixSource, TensorInfo, plan
from halfbyte.errors import CheckpointError
from halfbyte.matrix import Matrix
from support.checkpoints import read_checkpoint, write_checkpoint
from support.tiny_models import write_gpt_oss

EXPERTS = "model.layers.0.mlp.experts"


def dequantized(matrix: Matrix) -> Tensor:
    """float32 [E, N, K] by transformers' formula, from the canonical stack."""
    blocks = matrix.packed.reshape(*matrix.packed.shape[:-1], -1, 16)
    weights: Tensor = convert_moe_packed_tensors(blocks, matrix.scales, dtype=torch.float32)
    return weights.mT


@pytest.mark.parametrize("shards", [1, 3])
def test_gate_and_up_are_the_even_and_odd_rows_that_transformers_dequantizes(tmp_path: Path, shards: int) -> None:
    # Sizes that all differ, so that no wrong order of dimensions can pass.
    _, tensors = read_checkpoint(write_gpt_oss(tmp_path, shards=shards, intermediate_size=96, num_local_experts=3))
    checkpoint = plan(tmp_path)
    with Checkpoint(checkpoint) as opened:
        weights = opened.experts(checkpoint.layers[0])
    blocks, scales = tensors[f"{EXPERTS}.gate_up_proj_blocks"], tensors[f"{EXPERTS}.gate_up_proj_scales"]
    gate_up = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    blocks, scales = tensors[f"{EXPERTS}.down_proj_blocks"], tensors[f"{EXPERTS}.down_proj_scales"]
    down = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    assert weights.gate is not None
    assert torch.equal(dequantized(weights.gate), gate_up[:, ::2])
    assert torch.equal(dequantized(weights.up), gate_up[:, 1::2])
    assert torch.equal(dequantized(weights.down), down)
    bias = tensors[f"{EXPERTS}.gate_up_proj_bias"]
    assert weights.gate.bias is not None
    assert weights.up.bias is not None
    assert weights.down.bias is not None
    assert torch.equal(weights.gate.bias, bias[:, ::2])
    assert torch.equal(weights.up.bias, bias[:, 1::2])
    assert torch.equal(weights.down.bias, tensors[f"{EXPERTS}.down_proj_bias"])


def test_every_byte_of_the_experts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = plan(write_gpt_oss(tmp_path))
    layer, read = checkpoint.layers[0], 0
    stored = {info.name: info.nbytes for sources in layer.sources.values() for s in sources for info in tensors_of(s)}
    real = BufferedReader.readinto

    class Counting(BufferedReader):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            nonlocal read
            read += len(buffer)
            return real(self, buffer)

    monkeypatch.setattr(Path, "open", lambda path, _: Counting(FileIO(path)))
    with Checkpoint(checkpoint) as opened:
        opened.experts(layer)
    assert read == sum(stored.values())


def tensors_of(source: MatrixSource) -> list[TensorInfo]:
    assert source.bias is not None
    return [source.packed, source.scales, source.bias]


def test_the_problem_is_weight_only_with_bias_and_its_own_activation(tmp_path: Path) -> None:
    checkpoint = plan(write_gpt_oss(tmp_path))
    assert [str(layer.problem) for layer in checkpoint.layers] == [
        "experts mxfp4-w4a16 E=4 top-2 H=64 I=64 swigluoai bfloat16 bias"
    ] * 2
    assert f"{EXPERTS.replace('experts', 'router')}.weight" in {info.name for info in checkpoint.unquantized}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop(f"{EXPERTS}.down_proj_scales"),
            "down_proj_blocks': its partner .*_scales' is missing",
        ),
        (lambda t: t.pop(f"{EXPERTS}.down_proj_blocks"), "down_proj_scales': .* no FP4 layer uses it"),
        (
            lambda t: [t.pop(f"{EXPERTS}.down_proj_{part}") for part in ("blocks", "scales", "bias")],
            "the packed down of expert 0 is missing",
        ),
        (lambda t: t.pop(f"{EXPERTS}.down_proj_bias"), "down_proj_blocks': has no bias"),
        (lambda t: replace(t, "gate_up_proj_blocks", lambda x: x.flatten(-2)), "expected U8 .experts, 2 \\* rows"),
        (lambda t: replace(t, "gate_up_proj_blocks", lambda x: x[:, 1:]), "expected U8 .experts, 2 \\* rows"),
        (lambda t: replace(t, "gate_up_proj_scales", lambda x: x[..., :1]), "_scales': has shape"),
        (lambda t: replace(t, "gate_up_proj_scales", lambda x: x.float()), "_scales': is F32, but mxfp4 scales are"),
        (lambda t: replace(t, "gate_up_proj_bias", lambda x: x[:, 1:]), "_bias': is BF16"),
        (lambda t: replace(t, "down_proj_bias", lambda x: x.float()), "down_proj_bias': is F32, but .* is BF16"),
        (lambda t: [replace(t, f"down_proj_{p}", lambda x: x[1:]) for p in ("blocks", "scales", "bias")], "expert 3"),
    ],
)
def test_missing_or_wrongly_shaped_tensors_are_errors(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    config, tensors = read_checkpoint(write_gpt_oss(tmp_path / "good"))
    edit(tensors)
    with pytest.raises(CheckpointError, match=message):
        plan(write_checkpoint(tmp_path / "bad", config, tensors))


def replace(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    changed = tensors[f"{EXPERTS}.{name}"] = change(tensors[f"{EXPERTS}.{name}"])
    return changed


def test_another_limit_of_the_activation_is_an_error(tmp_path: Path) -> None:
    config, tensors = read_checkpoint(write_gpt_oss(tmp_path / "good"))
    with pytest.raises(CheckpointError, match=r"swiglu_limit is 5.0; kernels have 7.0"):
        plan(write_checkpoint(tmp_path / "bad", {**config, "swiglu_limit": 5.0}, tensors))
