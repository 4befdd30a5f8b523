"""What kernels are timed beside: torch.nn.functional.linear on weights that were dequantized beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.matrix import Matrix
from halfbyte.problems import Problem
from halfbyte.reference.activations import activate
from halfbyte.reference.packing import KeepDequantized
from halfbyte.weights import ExpertsWeights, LinearWeights

Layer: TypeAlias = Callable[..., Tensor]


def dense_layer(problem: Problem, weights: LinearWeights | ExpertsWeights, dtype: torch.dtype) -> Layer:
    """A layer of the problem's op with weights in `dtype`, called as FP4Linear and FP4Experts are."""
    if isinstance(weights, LinearWeights):
        return _Dense(weights.matrix, dtype)
    return _DenseExperts(weights, getattr(problem, "activation", ""), dtype)


class _Dense:
    """One matrix, or one for each expert."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        self.weight = KeepDequantized.keep("weight", matrix, dtype)["weight"]
        self.bias = matrix.bias

    def __call__(self, x: Tensor, expert: int | None = None) -> Tensor:
        if expert is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class _DenseExperts:
    """Expert after expert. Where tokens go is looked up once for the same ids, so that graphs can be captured."""

    def __init__(self, weights: ExpertsWeights, activation: str, dtype: torch.dtype) -> None:
        self.activation = activation
        self.gate = None if weights.gate is None else _Dense(weights.gate, dtype)
        self.up, self.down = _Dense(weights.up, dtype), _Dense(weights.down, dtype)
        self.ids: Tensor | None = None
        self.places: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        if self.ids is not ids:
            hit = ids.unique().tolist()
            self.ids, self.places = ids, [(expert, *torch.where(ids == expert)) for expert in hit]
        y = torch.zeros_like(x)
        for expert, token, place in self.places:
            rows = x[token]
            gate = None if self.gate is None else self.gate(rows, expert)
            hidden = activate(self.activation, gate, self.up(rows, expert))
            weight = routing[token, place].to(x.dtype)[:, None]
            y.index_add_(0, token, self.down(hidden, expert) * weight)
        return y
