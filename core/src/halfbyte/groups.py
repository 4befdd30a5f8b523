"""The decision for a whole checkpoint: layers with the same problem share one resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from halfbyte.errors import NoKernelError, OutOfMemoryError
from halfbyte.machines import Machine
from halfbyte.policies import Policy
from halfbyte.problems import Problem
from halfbyte.resolve import Resolution, decide
from halfbyte.specs import KernelSpec

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
    """The answer for a checkpoint."""

    plan: Plan
    machine: Machine
    groups: tuple[LayerGroup, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all weights in memory: those of every group and the unquantized tensors."""
        return self.plan.unquantized_bytes + sum(group.bytes for group in self.groups)

    def resolution_of(self, layer: str) -> Resolution:
        """The resolution of the layer of this name."""
        return next(group.resolution for group in self.groups if layer in group.layers)

    def require(self) -> None:
        """NoKernelError naming the layers, if some group has no kernel; OutOfMemoryError if the whole does not fit."""
        for group in self.groups:
            if group.resolution.selected is None:
                try:
                    group.resolution.require()
                except NoKernelError as error:
                    raise NoKernelError(f"{_named(group.layers)}: {error}") from None
        there = self.machine.memory
        if there is not None and self.bytes > WEIGHTS_SHARE * there:
            raise OutOfMemoryError(
                f"the weights of {self.plan.path} take {_gib(self.bytes)}; {self.machine} has {_gib(there)}, of which "
                f"{WEIGHTS_SHARE:.0%} may hold weights; use a device with more memory, or see `halfbyte explain` for "
                "kernels that keep weights packed"
            )


def resolve_model(plan: Plan, machine: Machine | None = None, policy: Policy | None = None) -> ModelResolution:
    """Choose a kernel for every quantized layer of a planned checkpoint; the missing arguments as in `resolve`."""
    from halfbyte.plugins import all_kernels, installed_plugins
    from halfbyte.policies import current_policies
    from halfbyte.probe import probe

    kernels = all_kernels(installed_plugins())
    return decide_model(plan, machine or probe(kernels=kernels), kernels, current_policies(policy))


def decide_model(
    plan: Plan, machine: Machine, kernels: Sequence[tuple[str, KernelSpec]], policies: Sequence[Policy]
) -> ModelResolution:
    """Choose for every layer. Pure.

    Whether weights may be dequantized at load is decided once for the whole model, from its bytes and the machine's
    memory, unless a policy says so.
    """
    result = _decide_groups(plan, machine, kernels, policies)
    form = next((p.weights for p in policies if p.weights is not None), "auto")
    if form == "auto" and machine.memory is not None and result.bytes > DEQUANTIZED_SHARE * machine.memory:
        keep_packed = Policy(weights="packed", origin=f"memory of {machine}")
        result = _decide_groups(plan, machine, kernels, (keep_packed, *policies))
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
    return ModelResolution(plan=plan, machine=machine, groups=groups)


def _named(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more layers"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
