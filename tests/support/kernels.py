"""Kernels that insist on what the contract promises them: alignment, one global scale, whole tiles, plain rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.decisions import Resolution, decide
from halfbyte.kernels import Packed
from halfbyte.machines import describe
from halfbyte.matrix import Matrix
from halfbyte.numerics import dequantize
from halfbyte.problems import Problem
from halfbyte.specs import KernelSpec
from support.specs import kernel, plugged

N_MULTIPLE, K_MULTIPLE = 48, 96


def picky(op: str, **fields: Any) -> KernelSpec:
    """The declaration of the kernels below."""
    default = {
        "id": "picky",
        "target": f"support.kernels:Picky{op.title()}",
        "n_multiple": N_MULTIPLE,
        "k_multiple": K_MULTIPLE,
        "fuses_bias": op == "experts",
    }
    return kernel(op=op, **{**default, **fields})


def chosen(spec: KernelSpec, problem: Problem) -> Resolution:
    """The resolution that picks this kernel on a CPU."""
    return decide(problem, describe("cpu"), plugged(spec))


def _aligned(matrix: Matrix) -> None:
    assert matrix.n % N_MULTIPLE == 0
    assert matrix.k % K_MULTIPLE == 0


def _weight(packed: Packed, name: str, dtype: torch.dtype) -> Tensor:
    fmt = packed.problem.scheme.weights
    scale = packed[f"{name}_global"] if fmt.has_global_scale else None
    return dequantize(packed[name], packed[f"{name}_scales"], fmt, global_scale=scale, dtype=dtype)


def _keep(name: str, matrix: Matrix) -> dict[str, Tensor]:
    _aligned(matrix)
    tensors = {name: matrix.packed.clone(), f"{name}_scales": matrix.scales.view(torch.uint8).clone()}
    if matrix.global_scale is not None:
        scale = matrix.global_scale.clone()
        tensors[f"{name}_global"] = scale[:, None] if matrix.packed.ndim == 3 else scale
    return tensors


class PickyLinear:
    def prepare(self, weights: Any, problem: Any) -> dict[str, Tensor]:
        assert not weights.matrix.part_rows
        assert (weights.matrix.n, weights.matrix.k) == (problem.n, problem.k)
        return _keep("w", weights.matrix)

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        assert bias is None
        assert x.shape[0] >= 1
        assert x.is_contiguous()
        return F.linear(x, _weight(packed, "w", x.dtype))


class FusingLinear(PickyLinear):
    """Fuses the bias, so that its sum is rounded once."""

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = F.linear(x.float(), _weight(packed, "w", x.dtype).float(), None if bias is None else bias.float())
        return y.to(x.dtype)


class PickyExperts:
    def prepare(self, weights: Any, problem: Any) -> dict[str, Tensor]:
        assert (
            weights.gate is None
            or weights.up.global_scale is None
            or torch.equal(weights.gate.global_scale, weights.up.global_scale)
        )
        assert (weights.down.n, weights.down.k) == (problem.hidden, problem.intermediate)
        named = {"gate": weights.gate, "up": weights.up, "down": weights.down}
        return {k: v for name, matrix in named.items() for k, v in _keep(name, matrix).items()}

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        assert x.shape[0] >= 1
        assert topk_ids.dtype == torch.int32
        assert topk_weights.dtype == torch.float32
        gate, up, down = (_weight(packed, name, x.dtype) for name in ("gate", "up", "down"))
        y = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for number, share in zip(topk_ids[token].tolist(), topk_weights[token], strict=True):
                expert = number if expert_map is None else int(expert_map[number])
                if expert >= 0:
                    hidden = F.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
                    y[token] += share * (down[expert] @ hidden)
        return y
