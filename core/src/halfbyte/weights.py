"""Canonical weights: the matrices of one layer and the scheme that the checkpoint asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, UsageError
from halfbyte.matrix import Matrix, same_scale, times_power_of_two
from halfbyte.problems import ExpertsProblem, InputScales, LinearProblem
from halfbyte.schemes import Scheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearWeights:
    """The weights of one linear layer: a matrix [N, K] and the scheme that the checkpoint asks for."""

    scheme: Scheme
    matrix: Matrix

    def __post_init__(self) -> None:
        """CheckpointError naming the matrix, unless it is one of the scheme's format."""
        _check_shape(self.matrix, self.scheme, (self.matrix.n, self.matrix.k))

    def problem(self, dtype: torch.dtype) -> LinearProblem:
        """The problem that these weights pose with activations of `dtype`."""
        matrix = self.matrix
        return LinearProblem(
            scheme=self.scheme, n=matrix.n, k=matrix.k, dtype=dtype_name(dtype), bias=matrix.bias is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsWeights:
    """The weights of the experts of one layer: gate and up [E, I, H], down [E, H, I]; gate is None for relu2."""

    scheme: Scheme
    gate: Matrix | None
    up: Matrix
    down: Matrix
    #: Gate and up with one global scale, once that was asked for: it looks at block scales.
    _folded: list[tuple[Matrix, Matrix] | None] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """CheckpointError naming the matrix that does not fit the others."""
        experts, up = self.up.packed.shape[0], self.up
        for matrix in self.matrices:
            shape = (up.k, up.n) if matrix is self.down else (up.n, up.k)
            _check_shape(matrix, self.scheme, (experts, *shape))
            if (matrix.bias is None) != (up.bias is None):
                raise CheckpointError(f"{matrix.name}: of the projections of one layer, all have a bias or none has")

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Gate (if there is one), up, down."""
        return (*(() if self.gate is None else (self.gate,)), self.up, self.down)

    @property
    def input_scales(self) -> InputScales | None:
        """Which experts share input scales; None if a matrix has none."""
        scales = [matrix.input_global_scale for matrix in self.matrices if matrix.input_global_scale is not None]
        if len(scales) < len(self.matrices):
            return None
        *of_x, hidden = scales
        if not _is_one(torch.cat(of_x)):
            return "per-expert"
        return "one" if _is_one(hidden) else "one-for-x"

    def problem(self, dtype: torch.dtype, *, top_k: int, activation: str) -> ExpertsProblem:
        """The problem that these weights pose with activations of `dtype`.

        UsageError if the activation function needs a gate that is not there, or takes none.
        """
        problem = ExpertsProblem(
            scheme=self.scheme,
            experts=self.up.packed.shape[0],
            top_k=top_k,
            hidden=self.up.k,
            intermediate=self.up.n,
            dtype=dtype_name(dtype),
            activation=activation,
            bias=self.up.bias is not None,
            shared_global_scale=self.with_shared_global_scale() is not None,
            input_scales=self.input_scales,
        )
        if problem.gated != (self.gate is not None):
            has = "no gate" if self.gate is None else "a gate"
            wants = "needs one" if problem.gated else "takes none"
            raise UsageError(f"{self.up.name}: the experts have {has}; the activation {activation!r} {wants}")
        return problem

    def with_shared_global_scale(self) -> ExpertsWeights | None:
        """The same weights with one global scale for gate and up of each expert; None where that is not exact.

        Where the two of an expert differ by a power of two, that is folded into the E4M3 block scales of one of them,
        if every product is an E4M3 number again. Another ratio would be exact for degenerate block scales alone (such
        as all zero) and counts as not exact, without looking at them.
        """
        gate, up = self.gate, self.up
        if gate is None or gate.global_scale is None or up.global_scale is None:
            return self
        if not same_scale(gate.input_global_scale, up.input_global_scale):
            return None
        if torch.equal(gate.global_scale, up.global_scale):
            return self
        if not self._folded:
            self._folded.append(_fold(gate, gate.global_scale, up, up.global_scale))
        pair = self._folded[0]
        return None if pair is None else replace(self, gate=pair[0], up=pair[1])

    def fused_gate_up(self, order: Literal["gate-up", "up-gate", "interleaved"]) -> Matrix:
        """Gate and up as one stack [E, 2I, H] in the order a kernel wants; "interleaved" alternates rows, gate first.

        The global scale is the shared one (see `with_shared_global_scale`), or gate's when they differ: a kernel with
        scales per projection takes those from `gate` and `up`.
        """
        if self.gate is None:
            return self.up
        first, second = (self.up, self.gate) if order == "up-gate" else (self.gate, self.up)

        def fuse(a: Tensor, b: Tensor) -> Tensor:
            if order == "interleaved":
                return torch.stack((a, b), dim=2).flatten(1, 2)
            return torch.cat((a, b), dim=1)

        bias = None if first.bias is None or second.bias is None else fuse(first.bias, second.bias)
        return replace(
            self.gate, packed=fuse(first.packed, second.packed), scales=fuse(first.scales, second.scales), bias=bias
        )


def _is_one(scales: Tensor) -> bool:
    return bool((scales == scales[0]).all())


def _fold(gate: Matrix, gate_scale: Tensor, up: Matrix, up_scale: Tensor) -> tuple[Matrix, Matrix] | None:
    """Gate and up with one global scale for each expert; only experts whose ratio is not 1 are looked at."""
    first, second = torch.frexp(gate_scale), torch.frexp(up_scale)
    if not torch.equal(first.mantissa, second.mantissa):
        return None
    scales, shared = (gate.scales.clone(), up.scales.clone()), torch.maximum(gate_scale, up_scale)
    for expert, exponent in enumerate((first.exponent - second.exponent).tolist()):
        if exponent == 0:
            continue
        # The smaller global scale becomes the larger and its block scales shrink; if that rounds, the other way.
        large, small = scales if exponent > 0 else scales[::-1]
        if (folded := times_power_of_two(small[expert], -abs(exponent))) is not None:
            small[expert] = folded
        elif (folded := times_power_of_two(large[expert], abs(exponent))) is not None:
            large[expert] = folded
            shared[expert] = torch.minimum(gate_scale[expert], up_scale[expert])
        else:
            return None
    return replace(gate, scales=scales[0], global_scale=shared), replace(up, scales=scales[1], global_scale=shared)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that problems use: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _check_shape(matrix: Matrix, scheme: Scheme, shape: tuple[int, ...]) -> None:
    found = (*matrix.packed.shape[:-1], matrix.k)
    if found != shape or matrix.format != scheme.weights:
        raise CheckpointError(
            f"{matrix.name}: {matrix.format} weights {list(found)}, expected {scheme.weights} {list(shape)}"
        )
