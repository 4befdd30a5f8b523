"""Experts kernels with one fault each."""
# ruff: noqa: ARG002 - to ignore an argument is the fault

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.reference.experts import Reference

if TYPE_CHECKING:
    from torch import Tensor

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
