"""Where the kit runs a kernel: the machine that is asked about, and the device that computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.decisions import machine_here
from halfbyte.machines import Machine


@dataclass(frozen=True, slots=True)
class Environment:
    """The two are the same thing on real hardware; over a contract double the machine is described by name."""

    machine: Machine
    device: torch.device


def probed(name: str | None = None) -> Environment:
    """The device of this name, or the one that `halfbyte.resolve` would take. UsageError if it is not there."""
    machine = machine_here(name)
    return Environment(machine, torch.empty(0, device=name or machine.device).device)
