"""Linear kernels with one fault each."""
# ruff: noqa: ARG002 - to ignore an argument is the fault

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.numerics import fake_quantize
from halfbyte.reference.linear import Reference
from halfbyte.weights import LinearWeights

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.kernels import Packed
    from halfbyte.problems import LinearProblem


class NoFault(Reference):
    pass


def _with(weights: LinearWeights, **changes: Any) -> LinearWeights:
    return replace(weights, matrix=replace(weights.matrix, **changes))


class SwappedNibbles(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        packed = weights.matrix.packed
        return super().prepare(_with(weights, packed=packed % 16 * 16 + packed // 16), problem)


class IgnoredGlobalScale(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        assert weights.matrix.global_scale is not None
        return super().prepare(_with(weights, global_scale=torch.ones_like(weights.matrix.global_scale)), problem)


class OneGlobalScale(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        scale = weights.matrix.global_scale
        assert scale is not None
        return super().prepare(_with(weights, global_scale=scale.max().expand(len(scale)).clone()), problem)


class IgnoredBias(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return super().apply(x, packed, None)


class LastTileMissing(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = super().apply(x, packed, bias)
        y[128:, :8] = 0
        return y


class ClampedScales(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        return super().prepare(_with(weights, scales=weights.matrix.scales.clamp(min=60)), problem)


class OtherRounding(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        fmt = packed.problem.scheme.weights
        return super().apply(fake_quantize(x, fmt, scale_rule="ceil"), packed, bias)


class QuantizesSecretly(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return super().apply(fake_quantize(x, packed.problem.scheme.weights, global_scale=1 / 400), packed, bias)


class HalfPrecision(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return super().apply(x.bfloat16().float(), packed, bias)


class ChangesWeights(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        result = super().prepare(weights, problem)
        weights.matrix.packed.view(-1)[0] ^= 1
        return result


class KeepsWeights(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        return super().prepare(weights, problem) | {"part0": weights.matrix.packed}


class Float8Tensors(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        return super().prepare(weights, problem) | {"spare": weights.matrix.scales.clone()}


class HiddenCopies(Reference):
    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        return super().prepare(weights, problem) | {"spare": torch.zeros(100_000)}


class RandomNoise(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = super().apply(x, packed, bias)
        return y + 1e-7 * torch.rand_like(y)


class ReusedResult(Reference):
    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = super().apply(x, packed, bias)
        whole = self.buffers.setdefault(y.shape[1], y.new_empty(1024, y.shape[1]))
        whole[: y.shape[0]] = y
        return whole[: y.shape[0]]


class ChangesInput(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = super().apply(x, packed, bias)
        x.zero_()
        return y


class OtherStrides(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return super().apply(x, packed, bias).T.contiguous().T


class OwnInputBack(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = super().apply(x, packed, bias)
        return x.view(-1)[: y.numel()].view(y.shape).copy_(y) if x.numel() >= y.numel() else y


class LeavesTheDevice(Reference):
    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return super().apply(x, packed, bias).double()


class VendorLibrary(Reference):
    """Needs a library that is never installed here: only its double is."""

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        import doubled_vendor  # type: ignore[import-not-found]

        y: Tensor = doubled_vendor.checked(super().apply(x, packed, bias))
        return y
