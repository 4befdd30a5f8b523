"""The prepare side of the modules: from canonical weights to packed tensors that a module holds as buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.decisions import Resolution, machine_here, resolve
from halfbyte.eligibility import scale_refusals
from halfbyte.errors import UsageError
from halfbyte.kernels import ExpertsKernel, LinearKernel, Packed, load_kernel
from halfbyte.matrix import Matrix
from halfbyte.policies import Policy
from halfbyte.problems import ExpertsProblem, LinearProblem, Problem
from halfbyte.specs import KernelSpec
from halfbyte.weights import ExpertsWeights, LinearWeights


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a module was decided to run. Copies of a module share it."""

    resolution: Resolution
    spec: KernelSpec
    kernel: LinearKernel | ExpertsKernel

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"a module that runs kernel {self.spec.id!r} cannot be pickled: the kernel belongs to this machine. Save "
            "its state_dict(), and load that into a module made from the checkpoint's weights"
        )


def choose(
    problem: Problem, device: torch.device, policy: Policy | None = None, resolution: Resolution | None = None
) -> Choice:
    """Resolve the problem for the device, unless that was done already, and import the kernel.

    NoKernelError if nothing can run; UsageError for a resolution of another problem or kind of device.
    """
    if resolution is None:
        resolution = resolve(problem, machine_here(str(device)), policy)
    elif _without_facts(resolution.problem) != _without_facts(problem):
        raise UsageError(f"the resolution given is for {resolution.problem}; the weights pose {problem}")
    if resolution.machine.device != device.type:
        raise UsageError(f"the resolution given is for {resolution.machine}; the weights go to {device}")
    spec = resolution.chosen().spec
    return Choice(resolution, spec, load_kernel(spec))


def linear_parts(choice: Choice, matrix: Matrix) -> list[Matrix]:
    """The matrix as the kernel wants it: whole, or in runs of rows with one global scale."""
    return matrix.parts() if choice.spec.global_scales == "one" else [matrix]


def pack_linear(choice: Choice, weights: LinearWeights, problem: LinearProblem, device: torch.device) -> list[Packed]:
    """Prepare every one of `linear_parts` on the device, padded as the kernel needs it."""
    result = []
    for part in linear_parts(choice, weights.matrix):
        own = replace(problem, n=part.n).padded(choice.spec.n_multiple, choice.spec.k_multiple)
        matrix = part.to(device).padded(own.n, own.k)
        tensors = choice.kernel.prepare(LinearWeights(scheme=weights.scheme, matrix=matrix), own)  # type: ignore[arg-type]
        result.append(Packed(own, tensors))
    return result


def pack_experts(choice: Choice, weights: ExpertsWeights, problem: ExpertsProblem, device: torch.device) -> Packed:
    """Prepare the weights on the device, gate and up with one global scale where the kernel asks so.

    UsageError where that would not be exact, or the experts' input scales are not what the kernel takes: `resolve`
    refuses such a kernel when it knows.
    """
    spec = choice.spec
    if refusals := scale_refusals(spec, problem):
        raise UsageError(
            f"{weights.up.name}: kernel {spec.id!r} {refusals[0].detail}; deny the kernel for this layer, such as with "
            f"HALFBYTE_DENY={spec.id}"
        )
    if spec.global_scales == "per-expert":
        weights = cast("ExpertsWeights", weights.with_shared_global_scale())
    own = problem.padded(spec.n_multiple, spec.k_multiple)

    def moved(matrix: Matrix, n: int, k: int) -> Matrix:
        return matrix.to(device).padded(n, k)

    padded = ExpertsWeights(
        scheme=weights.scheme,
        gate=None if weights.gate is None else moved(weights.gate, own.intermediate, own.hidden),
        up=moved(weights.up, own.intermediate, own.hidden),
        down=moved(weights.down, own.hidden, own.intermediate),
    )
    return Packed(own, choice.kernel.prepare(padded, own))  # type: ignore[arg-type]


class PackedBuffers(nn.Module):
    """The packed tensors of one kernel call, as buffers, and the call itself."""

    def __init__(self, choice: Choice, packed: Packed) -> None:
        super().__init__()
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.choice = choice
        # The buffers themselves, not a copy: what load_state_dict puts there is what runs.
        self.packed = Packed(packed.problem, self._buffers)  # type: ignore[arg-type]
        self.key = ops.register(choice.spec, choice.kernel, packed)

    @property
    def tensors(self) -> list[Tensor]:
        """The packed tensors in the order of the kernel's names."""
        return list(self.packed.tensors.values())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Run the kernel: y [M, n] for x [M, k] of the padded problem, M >= 0."""
        if ops.tracing(x):
            result: Tensor = ops.linear(x, self.tensors, bias, self.key)
            return result
        return ops.run_linear(self.choice.kernel, x, self.packed, bias)  # type: ignore[arg-type]

    def experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None) -> Tensor:
        """Run the kernel: y [T, H] for x [T, H] of the padded problem, T >= 0."""
        if ops.tracing(x):
            result: Tensor = ops.experts(x, self.tensors, topk_ids, topk_weights, expert_map, self.key)
            return result
        kernel = self.choice.kernel
        return ops.run_experts(kernel, x, self.packed, topk_ids, topk_weights, expert_map)  # type: ignore[arg-type]


def _without_facts(problem: Problem) -> Problem:
    return problem.without_facts() if isinstance(problem, ExpertsProblem) else problem
