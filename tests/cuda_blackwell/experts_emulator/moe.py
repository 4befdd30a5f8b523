"""What every experts kernel computes once its weights are read, in float32. Nothing of the plugin is used here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_blackwell.flashinfer_emulator import arithmetic

#: (rows, number of the expert) to the rows as the kernel quantizes them.
Rounding = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Activation:
    """FlashInfer's names: swiglu (with alpha, beta, limit), geglu_tanh, relu2."""

    name: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = float("inf")

    def __call__(self, first: Tensor, *, up_first: bool = True) -> Tensor:
        if self.name == "relu2":
            return first.clamp(min=0) ** 2
        up, gate = first.chunk(2, dim=-1) if up_first else reversed(first.chunk(2, dim=-1))
        if self.name == "geglu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def as_is(rows: Tensor, _expert: int) -> Tensor:
    return rows


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    activate: Callable[[Tensor, int], Tensor],
    *,
    inputs: Rounding = as_is,
    hidden: Rounding = as_is,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y [T, H] float32 of dequantized w1 [E, R, H] and w2 [E, H, I]; numbers that are no expert's here add nothing."""
    y = torch.zeros(x.shape[0], w2.shape[1])
    for expert in range(w1.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        first = inputs(x[token].float(), expert) @ w1[expert].T
        if biases is not None:
            first = first + biases[0][expert]
        second = hidden(activate(first, expert), expert) @ w2[expert].T
        if biases is not None:
            second = second + biases[1][expert]
        y.index_add_(0, token, second * weights[token, slot, None])
    return y


def nvfp4(encode: Tensor) -> Rounding:
    """Values times `encode` [E] or [1] in NVFP4: codes times block scales, `encode` left in them."""

    def rounded(rows: Tensor, expert: int) -> Tensor:
        own = encode.reshape(-1)[expert if encode.numel() > 1 else 0].reshape(1)
        return _rounded(rows, own, 16)

    return rounded


def mxfp4(rows: Tensor, _expert: int) -> Tensor:
    return _rounded(rows, None, 32)


def _rounded(rows: Tensor, encode: Tensor | None, group: int) -> Tensor:
    count, columns = rows.shape
    codes = torch.empty(count, columns // 2, dtype=torch.uint8)
    size = arithmetic.pad(count, 128) * arithmetic.pad(columns // group, 4)
    scales = torch.empty(size, dtype=torch.uint8)
    arithmetic.quantize(rows, encode, codes, scales, 128)
    return arithmetic.dequantize(codes, arithmetic.read_scales(scales, count, columns // group, group), group)


def swizzled(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Weights [E, R, K] in float32 of codes uint8 [E, R, K/2] and 128x4-swizzled scale bytes of each expert."""
    experts, rows, half = codes.shape
    flat = scales.reshape(experts, -1)
    return torch.stack(
        [
            arithmetic.dequantize(codes[e], arithmetic.read_scales(flat[e], rows, 2 * half // group, group), group)
            for e in range(experts)
        ]
    )


def unshuffled(rows: Tensor) -> Tensor:
    """[E, R, ...] as it was before trtllm's shuffle: row i of a block of 32 was row 4 (i % 8) + i // 8."""
    blocks = rows.reshape(rows.shape[0], -1, 32, *rows.shape[2:])
    order = torch.tensor([4 * (i % 8) + i // 8 for i in range(32)])
    result = torch.empty_like(blocks)
    result[:, :, order] = blocks
    return result.reshape(rows.shape)


def halves(rows: Tensor, run_length: int) -> Tensor:
    """[E, 2I, ...] of runs of up and of gate in turn: all of up, then all of gate."""
    experts, count, *rest = rows.shape
    runs = rows.reshape(experts, count // (2 * run_length), 2, run_length, *rest)
    return torch.cat((runs[:, :, 0].flatten(1, 2), runs[:, :, 1].flatten(1, 2)), dim=1)
