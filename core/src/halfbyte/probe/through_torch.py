"""What torch itself says of its devices, which is the truth, where this process has imported it already."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from halfbyte.probe.device import Device
from halfbyte.probe.intel import intel_family


def state() -> tuple[bool, ...]:
    """What `confirmed` depends on: whether torch is imported, and which of its accelerators the process uses."""
    return "torch" in sys.modules, in_use("cuda"), in_use("xpu")


def in_use(kind: str) -> bool:
    """Whether this process uses torch's "cuda" or "xpu" already."""
    backend = _backend(kind)
    return backend is not None and bool(backend.is_initialized())


def current(kind: str) -> int:
    """The number of the device that torch means by "cuda" or "xpu" alone."""
    backend = _backend(kind)
    return int(backend.current_device()) if backend is not None and in_use(kind) else 0


def confirmed(kind: str, seen: Sequence[Device]) -> Sequence[Device]:
    """The "cuda" or "xpu" devices by torch's own account where that may be had, else those that were seen without it.

    To ask starts the device's runtime, after which a process can no longer fork workers that use it. So torch is asked
    only where it runs already, or where what was seen is nothing or not certain.
    """
    backend = _backend(kind)
    uncertain = not seen or any(device.note or not device.arch for device in seen)
    if backend is None or not (in_use(kind) or (uncertain and backend.is_available())):
        return seen
    driver = next((device.driver for device in seen if device.driver), "")
    describe = _cuda_device if kind == "cuda" else _xpu_device
    try:
        return [
            describe(number, backend.get_device_properties(number), driver) for number in range(backend.device_count())
        ]
    except RuntimeError:  # such as in a forked process
        return seen


def other(name: str) -> Device | None:
    """A device of another type that torch knows ("mps", "meta", ...), if it can put a tensor there. Imports torch."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError):  # one for each way in which a type can be missing
        return None
    kind = name.partition(":")[0]
    return Device(name=kind, arch=kind, product="")


def _backend(kind: str) -> Any:
    """The module torch.cuda or torch.xpu, None without torch."""
    return getattr(sys.modules.get("torch"), kind, None)


def _cuda_device(number: int, properties: Any, driver: str) -> Device:
    rocm = sys.modules["torch"].version.hip is not None
    return Device(
        name=f"cuda:{number}",
        arch="rocm" if rocm else f"sm_{properties.major}{properties.minor}",
        product=properties.name,
        memory=properties.total_memory,
        driver=driver,
    )


def _xpu_device(number: int, properties: Any, driver: str) -> Device:
    family = intel_family(properties.device_id)
    return Device(
        name=f"xpu:{number}",
        arch=f"xpu-{family}" if family else "xpu",
        product=properties.name,
        memory=properties.total_memory,
        driver=properties.driver_version or driver,
    )
