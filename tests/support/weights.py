"""Canonical weights with random numbers, beside what compressed-tensors says they are; and what layers then compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor

from halfbyte.matrix import SCALE_DTYPES, Matrix
from halfbyte.schemes import Scheme
from halfbyte.weights import ExpertsWeights, LinearWeights
from support.quantized import oracle_dequantize, quantized_linear, scheme_of


@dataclass
class Known:
    """A matrix, its dequantized weight [..., N, K] in float64, and the float32 divisor of each part's input scale."""

    matrix: Matrix
    weight: Tensor
    input_divisors: list[Tensor | None] = field(default_factory=list)

    @property
    def bias(self) -> Tensor:
        bias = self.matrix.bias
        return torch.zeros(self.weight.shape[:-1], dtype=torch.float64) if bias is None else bias.double()


def preset_of(scheme: Scheme) -> str:
    return scheme.weights.name.upper() + ("" if scheme.activations else "A16")


def known_matrix(
    scheme: Scheme, rows: Sequence[int], k: int, *, bias: bool = False, stack: bool = False, name: str = "layer"
) -> Known:
    """A matrix whose parts have these rows (or a stack of matrices), each part with global scales of its own."""
    pieces, weights = [], []
    for index, n in enumerate(rows):
        weight = torch.randn(n, k) * 0.1
        weight[0, :32] = 0  # whole groups of zeros
        piece = quantized_linear("x", weight, preset_of(scheme), amax=None, input_amax=2.0 + index)
        pieces.append(piece)
        weights.append(oracle_dequantize("x", piece, preset_of(scheme)).double())
    join = torch.stack if stack else torch.cat

    def multipliers(key: str) -> Tensor | None:
        found = [piece[f"x.{key}"].double().reciprocal() for piece in pieces if f"x.{key}" in piece]
        return torch.cat(found) if found else None

    matrix = Matrix(
        name=name,
        format=scheme.weights,
        packed=join([piece["x.weight_packed"] for piece in pieces]),
        scales=join([piece["x.weight_scale"].view(SCALE_DTYPES[scheme.weights.scale]) for piece in pieces]),
        global_scale=multipliers("weight_global_scale"),
        input_global_scale=multipliers("input_global_scale"),
        bias=torch.randn((len(rows), rows[0]) if stack else (sum(rows),)) if bias else None,
        part_rows=() if stack or len(rows) == 1 else tuple(rows),
    )
    return Known(matrix, join(weights), [piece.get("x.input_global_scale") for piece in pieces])


def oracle_fake_quantize(x: Tensor, scheme: Scheme, divisor: Tensor | None) -> Tensor:
    """The input of a layer as compressed-tensors quantizes and dequantizes it in float32; x itself for weight-only."""
    if scheme.activations is None:
        return x
    layer = SimpleNamespace(quantization_status=QuantizationStatus.FROZEN, input_global_scale=divisor)
    args = scheme_of(preset_of(scheme)).input_activations
    result: Tensor = forward_quantize(layer, x.float().clone(), "input", args).to(x.dtype)
    return result


def known_linear(scheme: Scheme, rows: Sequence[int], k: int, *, bias: bool = False) -> tuple[LinearWeights, Known]:
    known = known_matrix(scheme, rows, k, bias=bias)
    return LinearWeights(scheme=scheme, matrix=known.matrix), known


def expected_linear(known: Known, scheme: Scheme, x: Tensor) -> Tensor:
    """y [M, N] in float64 for x [M, K]; the weights rounded to x's dtype, as every kernel holds them."""
    rows = known.matrix.part_rows or (known.matrix.n,)
    weights = torch.split(known.weight.to(x.dtype).double(), list(rows))
    inputs = [oracle_fake_quantize(x, scheme, divisor).double() for divisor in known.input_divisors]
    bias = known.bias.to(x.dtype).double()
    return torch.cat([v @ w.T for v, w in zip(inputs, weights, strict=True)], dim=-1) + bias


@dataclass
class KnownExperts:
    """Gate (None for relu2), up and down of every expert."""

    weights: ExpertsWeights
    gate: Known | None
    up: Known
    down: Known


def known_experts(
    scheme: Scheme, experts: int, hidden: int, intermediate: int, *, gated: bool = True, bias: bool = False
) -> KnownExperts:
    def stack(name: str, n: int, k: int) -> Known:
        return known_matrix(scheme, [n] * experts, k, bias=bias, stack=True, name=f"experts.{name}")

    gate = stack("gate", intermediate, hidden) if gated else None
    up, down = stack("up", intermediate, hidden), stack("down", hidden, intermediate)
    weights = ExpertsWeights(scheme=scheme, gate=None if gate is None else gate.matrix, up=up.matrix, down=down.matrix)
    return KnownExperts(weights, gate, up, down)


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct expert numbers int64 [T, k] and weights float32 [T, k] of random tokens."""
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k)


def expected_experts(
    known: KnownExperts, x: Tensor, ids: Tensor, weights: Tensor, activation: str, local: Sequence[int] | None = None
) -> Tensor:
    """y [T, H] in float64 for x [T, H], token by token; `local` as expert_map."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
        for number, share in zip(chosen, shares, strict=True):
            expert = number if local is None else local[number]
            if expert >= 0:
                result[token] += share * _expert(known, expert, x[token : token + 1], activation)[0]
    return result


def _expert(known: KnownExperts, expert: int, x: Tensor, activation: str) -> Tensor:
    def project(matrix: Known, value: Tensor) -> Tensor:
        value = oracle_fake_quantize(value.to(x.dtype), known.weights.scheme, matrix.input_divisors[expert]).double()
        bias = matrix.bias[expert].to(x.dtype).double()
        return value @ matrix.weight[expert].to(x.dtype).double().T + bias

    up = project(known.up, x)
    if known.gate is None:
        return project(known.down, torch.relu(up) ** 2)
    gate = project(known.gate, x)
    if activation == "swigluoai":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        hidden = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    elif activation == "silu":
        hidden = gate / (1 + torch.exp(-gate)) * up
    else:
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        hidden = 0.5 * gate * (1 + torch.tanh(inner)) * up
    return project(known.down, hidden)
