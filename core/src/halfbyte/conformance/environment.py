"""Where the kit runs a kernel: the machine that is asked about, and the device that computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.machines import Machine
from halfbyte.plugins import all_kernels, installed_plugins
from halfbyte.probe import probe


@dataclass(frozen=True, slots=True)
class Environment:
    """The two are the same thing on real hardware; over a contract double the machine is described by name."""

    machine: Machine
    device: torch.device


def probed(name: str | None = None) -> Environment:
    """The device of this name, or the one that `halfbyte.resolve` would take. UsageError if it is not there."""
    machine = probe(name, all_kernels(installed_plugins()))
    return Environment(machine, torch.empty(0, device=name or machine.device).device)
