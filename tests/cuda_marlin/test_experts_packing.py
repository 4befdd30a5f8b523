"""Experts' packed layout, read back as the threads read it: which row of which projection a thread finds where."""

import pytest
import torch

from halfbyte.conformance import data, oracle
from halfbyte.formats import FORMATS
from halfbyte.matrix import Matrix
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda.experts_packing import pack_experts
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, pack_codes
from halfbyte_cuda_marlin.cuda.specs import SPECS

EXPERTS, HIDDEN, INNER = 3, 64, 96
SPEC = next(spec for spec in SPECS if spec.op == "experts")


def values(units: torch.Tensor, rows: torch.Tensor, fmt: str) -> torch.Tensor:
    """float64 [E, N, K] of a stack of bfloat16 units: masks and shifts of kernels/fp4.cuh, scales and row factors."""
    e, tiles, columns, _ = units.shape
    words = units[..., :CODE_BYTES].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    w0, w1 = words.view(e, tiles, columns, 2, 2, 8, 4, 2, 2).unbind(-1)  # part, half, g, thread, couple
    rotated = [(w << 10 | w >> 22) & 0xFFFFFFFF for w in (w0, w1)]
    merged = w0 & 0x06030603 | (w1 << 2) & ~0x06030603 & 0xFFFFFFFF
    turned = (merged << 12 | merged >> 20) & 0xFFFFFFFF
    registers = torch.stack([w0, w0 << 4, rotated[0], merged << 6, w1, w1 << 4, rotated[1], turned], -1) & 0x81C081C0
    pairs = torch.stack([registers & 0xFFFF, registers >> 16], -1)
    bits = torch.where(pairs > 0x7FFF, pairs - 0x10000, pairs).to(torch.int16)
    codes = bits.view(torch.bfloat16).double() * 2.0**126
    # [e, tile, unit, part, half, g, thread, couple, step, second, row half, element] to rows and columns
    codes = codes.view(e, tiles, columns, 2, 2, 8, 4, 2, 2, 2, 2, 2).permute(0, 1, 3, 10, 5, 2, 4, 7, 8, 9, 6, 11)
    numbers = codes.reshape(e, tiles * 32, columns * 128)
    raw = units[..., CODE_BYTES:].to(torch.int32)
    if fmt == "nvfp4":  # part, g, word, half, parity
        raw = (raw << 4 | 0x6000).view(e, tiles, columns, 2, 8, 4, 2, 2).permute(0, 1, 3, 6, 4, 2, 5, 7)
    else:  # g, part, pair, half, parity
        raw = (raw << 7).view(e, tiles, columns, 8, 2, 2, 2, 2).permute(0, 1, 4, 6, 3, 2, 5, 7)
    scales = raw.to(torch.int16).view(torch.bfloat16).double().reshape(e, tiles * 32, -1) / 2.0**126
    return numbers * scales.repeat_interleave(FORMATS[fmt].group_size, dim=2) * rows.double()[..., None]


def dequantized(stack: Matrix) -> torch.Tensor:
    return torch.stack([oracle.dequantize(oracle._one(stack, e).matrix) for e in range(EXPERTS)])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_thread_finds_gate_and_up_of_the_same_number_eight_rows_apart(fmt: str, gated: bool):
    weights = data.experts_weights(
        SCHEMES[f"{fmt}-w4a16"], EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16, gated=gated, bias=True
    )
    packed, up_bias = pack_experts(weights, torch.bfloat16, pack_codes), weights.up.bias
    assert up_bias is not None
    first, up = values(packed["first"], packed["first_rows"], fmt), dequantized(weights.up)
    if weights.gate is None:
        torch.testing.assert_close(first[:, :, :HIDDEN], up, rtol=1e-6, atol=0)
        assert torch.equal(packed["first_bias"], up_bias)
        return
    gate, gate_bias = dequantized(weights.gate), weights.gate.bias
    assert gate_bias is not None
    for index in range(INNER):
        row = index // 8 * 16 + index % 8
        torch.testing.assert_close(first[:, row, :HIDDEN], gate[:, index], rtol=1e-6, atol=0)
        torch.testing.assert_close(first[:, row + 8, :HIDDEN], up[:, index], rtol=1e-6, atol=0)
        assert torch.equal(packed["first_bias"][:, row], gate_bias[:, index])
        assert torch.equal(packed["first_bias"][:, row + 8], up_bias[:, index])


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_rows_of_down_keep_their_order(fmt: str):
    weights = data.experts_weights(SCHEMES[f"{fmt}-w4a16"], EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16, bias=True)
    packed = pack_experts(weights, torch.bfloat16, pack_codes)
    down = values(packed["down"], packed["down_rows"], fmt)
    torch.testing.assert_close(down[:, :, :INNER], dequantized(weights.down), rtol=1e-6, atol=0)
    assert weights.down.bias is not None
    assert torch.equal(packed["down_bias"], weights.down.bias)


def test_experts_packed_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch):
    weights = data.experts_weights(SCHEMES["nvfp4-w4a16"], EXPERTS, HIDDEN, INNER, dtype=torch.float16)
    whole = pack_experts(weights, torch.float16, pack_codes)
    monkeypatch.setattr("halfbyte_cuda_marlin.cuda.experts_packing._SLICE_BYTES", 1)
    apart = pack_experts(weights, torch.float16, pack_codes)
    assert all(torch.equal(whole[name], apart[name]) for name in whole)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_packed_experts_take_exactly_the_bytes_that_are_declared(fmt: str, activation: str, bias: bool):
    gated = activation != "relu2"
    weights = data.experts_weights(
        SCHEMES[f"{fmt}-w4a16"], EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16, gated=gated, bias=bias
    )
    packed = pack_experts(weights, torch.bfloat16, pack_codes)
    problem = weights.problem(torch.bfloat16, top_k=2, activation=activation)
    assert sum(tensor.nbytes for tensor in packed.values()) == SPEC.resident_bytes(problem)
