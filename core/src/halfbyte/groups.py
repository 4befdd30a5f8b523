"""The decision for a whole checkpoint: layers with the same problem share one resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from halfbyte.decisions import Resolution, decide, machine_here
from halfbyte.errors import NoKernelError, OutOfMemoryError
from halfbyte.machines import Machine
from halfbyte.plugins import available_kernels
from halfbyte.policies import MEMORY, Policy, current_policies
from halfbyte.problems import Problem
from halfbyte.specs import KernelSpec
from halfbyte.units import size_text

if TYPE_CHECKING:
    from halfbyte.checkpoints.plan import Plan

#: The share of a device's memory that weights may take; the rest is for activations and the key-value cache.
WEIGHTS_SHARE: Final = 0.9
#: The share above which weights are not dequantized at load without being asked to.
DEQUANTIZED_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of one checkpoint with the same problem, and the answer to it."""

    layers: tuple[str, ...]
    resolution: Resolution

    @property
    def bytes(self) -> int:
        """Bytes of all layers' weights in the chosen kernel's form; 0 where nothing can run."""
        chosen = self.resolution.selected
        return 0 if chosen is None else chosen.bytes * len(self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResolution:
    """The answer for a checkpoint, and what was asked, so that it can be asked again for one layer."""

    plan: Plan
    machine: Machine
    kernels: Sequence[tuple[str, KernelSpec]] = field(repr=False)
    policies: Sequence[Policy] = field(repr=False)
    groups: tuple[LayerGroup, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all weights in memory: those of every group, and the unquantized tensors in the compute dtype."""
        return self.plan.unquantized_bytes + sum(group.bytes for group in self.groups)

    @property
    def fits(self) -> bool:
        """Whether all weights fit the machine's memory, as far as that is known."""
        return self.machine.memory is None or self.bytes <= WEIGHTS_SHARE * self.machine.memory

    def resolution_of(self, layer: str) -> Resolution:
        """The resolution of the layer of this name."""
        return next(group.resolution for group in self.groups if layer in group.layers)

    def decide_again(self, problem: Problem) -> Resolution:
        """The resolution of a problem of which the weights themselves told more than the plan could know."""
        return decide(problem, self.machine, self.kernels, self.policies)

    def check(self) -> None:
        """NoKernelError naming the layers, if some group has no kernel; OutOfMemoryError if the whole does not fit."""
        for group in self.groups:
            try:
                group.resolution.chosen()
            except NoKernelError as error:
                raise NoKernelError(f"{_named(group.layers)}: {error}") from None
        if not self.fits and self.machine.memory is not None:
            there = size_text(self.machine.memory)
            raise OutOfMemoryError(
                f"the weights of {self.plan.path} take {size_text(self.bytes)}; {self.machine} has {there}, of which "
                f"{WEIGHTS_SHARE:.0%} may hold weights; use a device with more memory, or see `halfbyte explain` for "
                "kernels that keep weights packed"
            )


def resolve_model(plan: Plan, machine: Machine | None = None, policy: Policy | None = None) -> ModelResolution:
    """Choose a kernel for every quantized layer of a planned checkpoint; the missing arguments as in `resolve`."""
    return decide_model(plan, machine or machine_here(), available_kernels(), current_policies(policy))


def decide_model(
    plan: Plan, machine: Machine, kernels: Sequence[tuple[str, KernelSpec]], policies: Sequence[Policy]
) -> ModelResolution:
    """Choose for every layer. Pure.

    Whether weights may be dequantized at load is decided once for the whole model, from its bytes and the machine's
    memory, unless a policy says so or names the kernel.
    """
    result = _decide_groups(plan, machine, kernels, policies)
    form = next((p.weights for p in policies if p.weights is not None), "auto")
    if form == "auto" and machine.memory is not None and result.bytes > DEQUANTIZED_SHARE * machine.memory:
        keep_packed = Policy(weights="packed", origin=MEMORY)
        result = _decide_groups(plan, machine, kernels, [*(replace(p, weights=None) for p in policies), keep_packed])
    return result


def _decide_groups(
    plan: Plan, machine: Machine, kernels: Sequence[tuple[str, KernelSpec]], policies: Sequence[Policy]
) -> ModelResolution:
    layers: dict[Problem, list[str]] = {}
    for layer in plan.layers:
        layers.setdefault(layer.problem, []).append(layer.name)
    groups = tuple(
        LayerGroup(layers=tuple(names), resolution=decide(problem, machine, kernels, policies))
        for problem, names in layers.items()
    )
    return ModelResolution(plan=plan, machine=machine, kernels=kernels, policies=policies, groups=groups)


def _named(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more layers"
