"""Probing: the one impure place of a decision. Finds devices and libraries; imports no vendor's code."""

from __future__ import annotations

from halfbyte.probe.choose import devices, probe
from halfbyte.probe.device import Device
from halfbyte.probe.installed import TorchBuild, installed_packages, torch_build

__all__ = ["Device", "TorchBuild", "devices", "installed_packages", "probe", "torch_build"]
