"""All devices, and the one that a decision is about."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module

from halfbyte.errors import UsageError, nearest
from halfbyte.machines import Machine
from halfbyte.probe import through_torch
from halfbyte.probe.device import Device
from halfbyte.probe.host import cpu_device
from halfbyte.probe.installed import installed_packages, torch_build
from halfbyte.probe.intel import intel_devices
from halfbyte.probe.nvidia import nvidia_devices
from halfbyte.specs import KernelSpec


def probe(device: str | None = None, kernels: Iterable[tuple[str, KernelSpec]] = ()) -> Machine:
    """The machine around one device, with the libraries that `kernels` ask for.

    Args:
        device: what torch calls it: "cpu", "cuda", "cuda:1", "xpu", "mps", ... Without a number it is torch's current
            device. By default that of the accelerator that the installed torch was built for, if there is one and
            halfbyte knows it, else the CPU; "mps" is never the default. The default and a device that is seen without
            torch import no torch; AMD devices are seen only by torch.
        kernels: (plugin name, kernel).

    Raises:
        UsageError: a device that is not there, or that the installed torch was not built for.
    """
    found = _default() if device is None else _named(device)
    machine = Machine(name=found.product or found.name, arch=found.arch, memory=found.memory)
    return machine.with_packages(installed_packages(kernels))


def devices() -> tuple[Device, ...]:
    """Every device seen, accelerators first, the CPU last. Imports no torch, and asks it where it is imported."""
    return _devices(through_torch.state())


@cache
def _devices(_state: tuple[bool, ...]) -> tuple[Device, ...]:
    return (
        *through_torch.confirmed("cuda", nvidia_devices()),
        *through_torch.confirmed("xpu", intel_devices()),
        cpu_device(),
    )


def _default() -> Device:
    build, found = torch_build(), devices()
    if build is None or build.device == "cpu":
        return found[-1]
    device = _seen(_numbered(build.device))
    return device if device is not None and device.arch and build.drives(device) else found[-1]


def _named(name: str) -> Device:
    device = _found(name)
    if device is None:
        raise UsageError(f"no device {name!r} on this machine{nearest(name, (d.name for d in devices()))}")
    if not device.arch:
        why = device.note or "it is of a kind that has no name here"
        raise UsageError(f"{device.product} is a device that halfbyte cannot use: {why}")
    build = torch_build()
    if device.name != "cpu" and not (build is not None and build.drives(device)):
        has = "is not installed" if build is None else f"{build.version} is built for {build.backend}"
        raise UsageError(f"{device.name} ({device.product}) is there, but torch {has}; install a build of torch for it")
    return device


def _found(name: str) -> Device | None:
    """The device of this name, if there is one. Imports torch where only torch can tell for certain."""
    build, device, kind = torch_build(), _seen(_numbered(name)), name.partition(":")[0]
    if build is None or (device is not None and device.arch and not device.note):
        return device
    if kind not in ("cuda", "xpu"):
        return device or through_torch.other(name)
    if kind == build.device:
        import_module("torch")
    return _seen(_numbered(name))


def _seen(name: str) -> Device | None:
    return next((device for device in devices() if device.name == name), None)


def _numbered(name: str) -> str:
    """The full name: "cuda" is torch's current device, and there is only one "cpu"."""
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return kind
    return f"{kind}:{through_torch.current(kind)}" if kind in ("cuda", "xpu") and not number else name
