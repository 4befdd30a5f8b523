"""The two kernel interfaces, and how a declared kernel becomes an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

from torch import Tensor

from halfbyte.errors import PluginError
from halfbyte.problems import ExpertsProblem, LinearProblem, Problem
from halfbyte.specs import KernelSpec
from halfbyte.weights import ExpertsWeights, LinearWeights


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights rearranged for one kernel: the (padded) problem they serve, and the tensors by name.

    No tensor has a dtype of 8 or 4 floating-point bits: those are kept as uint8 and viewed inside the kernel, since
    torch.library cannot check operators that take them.
    """

    problem: Problem
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@runtime_checkable
class LinearKernel(Protocol):
    """y = x @ W.T + b. Made without arguments; keeps no state of any layer."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Rearrange canonical weights, already padded to the problem's [n, k], on the device they are on.

        Nothing of `weights` is changed; the result shares no memory that the caller may free or write. May be called
        again with the same weights. Where the kernel takes one global scale, the matrix has one part.
        """
        ...

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """Return y [M, n] in x's dtype for x [M, k], M >= 1, contiguous, in the problem's dtype.

        `bias` [n] in x's dtype is given only to kernels that fuse it. No host synchronisation; safe in a CUDA graph.
        """
        ...


@runtime_checkable
class ExpertsKernel(Protocol):
    """Gate and up, activation, down, weighted sum over the routed experts. Made without arguments, stateless."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Rearrange canonical weights, already padded to the problem's sizes, biases included. As for linear."""
        ...

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H] in x's dtype for x [T, H], T >= 1, contiguous, in the problem's dtype.

        topk_ids: int32 [T, k], global expert numbers. topk_weights: float32 [T, k], applied to the output of each
        expert. expert_map: int32 [global experts], the local number of each expert or -1 for one of another rank,
        which adds nothing; None where every expert is local. No host synchronisation on a GPU; safe in a CUDA graph.
        """
        ...


def load_kernel(spec: KernelSpec) -> LinearKernel | ExpertsKernel:
    """Import the kernel that a spec names and make it; PluginError saying what failed and how to avoid it."""
    module_name, _, class_name = spec.target.partition(":")
    try:
        kernel = getattr(import_module(module_name), class_name)()
    except Exception as error:  # a vendor's library may raise anything when it is imported
        raise PluginError(
            f"kernel {spec.id!r} was chosen, but importing {spec.target} failed with "
            f"{type(error).__name__}: {error}. To go on without it, set HALFBYTE_DENY={spec.id}"
        ) from error
    interface = LinearKernel if spec.op == "linear" else ExpertsKernel
    if not isinstance(kernel, interface):
        raise PluginError(f"kernel {spec.id!r}: {spec.target} has no prepare and apply as {interface.__name__} asks")
    return kernel
