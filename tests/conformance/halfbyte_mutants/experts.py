"""Experts kernels with one fault each."""
# ruff: noqa: ARG002 - to ignore an argument is the fault

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.experts import Reference
from halfbyte.schemes import NVFP4_W4A4

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.matrix import Matrix
    from halfbyte.weights import ExpertsWeights


class NoFault(Reference):
    pass


class GateForUp(Reference):
    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        assert weights.gate is not None
        return super().prepare(replace(weights, gate=weights.up, up=weights.gate), problem)


class IgnoredRouterWeights(Reference):
    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().apply(x, packed, topk_ids, torch.ones_like(topk_weights), expert_map)


class IgnoredExpertBias(Reference):
    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        tensors = super().prepare(weights, problem)
        return {name: tensor for name, tensor in tensors.items() if name != "down_bias"}


class GlobalNumbers(Reference):
    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().apply(x, packed, topk_ids, topk_weights, None)


class FirstExpertOnly(Reference):
    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        return super().apply(x, packed, topk_ids[:, :1], topk_weights[:, :1], expert_map)


class WrongActivation(Reference):
    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        assert isinstance(packed.problem, ExpertsProblem)
        other = Packed(replace(packed.problem, activation="gelu_tanh"), packed.tensors)
        return super().apply(x, other, topk_ids, topk_weights, expert_map)


class OneScaleForBoth(Reference):
    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        assert weights.gate is not None
        up = replace(weights.up, global_scale=weights.gate.global_scale)
        return super().prepare(replace(weights, up=up), problem)


def _largest(matrix: Matrix) -> Matrix:
    scales = matrix.input_global_scale
    assert scales is not None
    return replace(matrix, input_global_scale=scales.max().expand_as(scales).clone())


class LargestInputScale(Reference):
    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        assert weights.gate is not None
        return super().prepare(replace(weights, gate=_largest(weights.gate), up=_largest(weights.up)), problem)


class LargestHiddenScale(Reference):
    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        return super().prepare(replace(weights, down=_largest(weights.down)), problem)


class OneInputScale(Reference):
    """No fault: it is given no others."""

    taken: ClassVar[tuple[str, ...]] = ("one",)

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        assert weights.input_scales in self.taken
        return super().prepare(weights, problem)


class OneInputScaleForX(OneInputScale):
    taken = ("one-for-x", "one")


class FixedInputScale(Reference):
    """No fault: it quantizes what the checkpoint leaves alone, as it declares."""

    scale: ClassVar[float] = 1.5

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        assert weights.gate is not None
        gate, up, down = (self._scaled(matrix) for matrix in (weights.gate, weights.up, weights.down))
        other = replace(weights, scheme=NVFP4_W4A4, gate=gate, up=up, down=down)
        return super().prepare(other, replace(problem, scheme=NVFP4_W4A4))

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        assert isinstance(packed.problem, ExpertsProblem)
        other = Packed(replace(packed.problem, scheme=NVFP4_W4A4), packed.tensors)
        return super().apply(x, other, topk_ids, topk_weights, expert_map)

    def _scaled(self, matrix: Matrix) -> Matrix:
        assert matrix.global_scale is not None
        return replace(matrix, input_global_scale=torch.full_like(matrix.global_scale, self.scale))


class OtherInputScale(FixedInputScale):
    scale = 1.0
