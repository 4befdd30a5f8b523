"""Probing: the one impure place of a decision. Finds devices and libraries; imports no torch and no vendor's code."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from halfbyte.errors import UsageError, nearest
from halfbyte.machines import Machine
from halfbyte.specs import KernelSpec

#: PCI device ids of Intel GPUs by family, from the Linux kernel's include/drm/intel/pciids.h (ranges of it).
_INTEL_IDS: Final = {
    "pvc": (0x0B69, 0x0B6E, *range(0x0BD4, 0x0BDC), 0x0BE0, 0x0BE1, 0x0BE5),
    "bmg": (*range(0xE202, 0xE224),),
    "lnl": (0x6420, 0x64A0, 0x64B0),
    "ptl": (*range(0xB080, 0xB0B1), 0xFD80, 0xFD81),
    "acm": (*range(0x5690, 0x56C3), 0x4F80, *range(0x4F81, 0x4F89)),
    "mtl": (0x7D40, 0x7D45, 0x7D55, 0x7D60, 0x7DD5),
    "arl": (0x7D41, 0x7D51, 0x7D67, 0x7DD1, 0xB640),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that this machine has. `arch` is "" for one that halfbyte has no name for."""

    #: "cpu", "cuda:0", "xpu:1": what torch calls it.
    name: str
    arch: str
    product: str
    memory: int | None = None
    driver: str = ""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch: its version and what it was built for ("cpu", "cuda 13.0", "xpu 20250301", "rocm 6.4")."""

    version: str
    backend: str

    @property
    def device(self) -> str:
        """The torch device type of its accelerator, or "cpu"."""
        kind = self.backend.partition(" ")[0]
        return kind if kind in ("cuda", "xpu") else "cpu"


def probe(device: str | None = None, kernels: Iterable[tuple[str, KernelSpec]] = ()) -> Machine:
    """The machine around one device ("cuda", "cuda:1", "xpu", "cpu"), with the libraries that `kernels` ask for.

    Without a name: the first accelerator that the installed torch can drive, else the CPU. UsageError for a device
    that is not there, or that the installed torch was not built for.
    """
    found = _choose(device, devices())
    machine = Machine(name=found.product or found.name, arch=found.arch, memory=found.memory)
    return machine.with_packages(installed_packages(kernels))


@cache
def devices() -> tuple[Device, ...]:
    """Every device seen, accelerators first, the CPU last."""
    return (*_nvidia_devices(), *_intel_devices(), _cpu())


def installed_packages(kernels: Iterable[tuple[str, KernelSpec]]) -> dict[str, str]:
    """The installed version of each distribution that a kernel asks for, by canonical name; missing ones left out."""
    requirements = {requirement for _, spec in kernels for requirement in _requirements(spec)}
    found = {}
    for name in {canonicalize_name(Requirement(requirement).name) for requirement in requirements}:
        try:
            found[str(name)] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def torch_build() -> TorchBuild | None:
    """The installed torch, read from its version file without importing it; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return TorchBuild(version("torch"), "unknown")

    def value(name: str) -> str:
        match = re.search(rf"^{name}(?:\s*:[^=]+)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return match.group(1) if match else ""

    for backend, name in (("cuda", "cuda"), ("rocm", "hip"), ("xpu", "xpu")):
        if value(name):
            return TorchBuild(value("__version__"), f"{backend} {value(name)}")
    return TorchBuild(value("__version__"), "cpu")


def _requirements(spec: KernelSpec) -> Sequence[str]:
    return (*spec.requires, *(bad.requires for bad in spec.known_bad if bad.requires))


def _choose(name: str | None, found: Sequence[Device]) -> Device:
    build = torch_build()
    kind = "cpu" if build is None else build.device
    if name is None:
        return next((d for d in found if d.arch and d.name.partition(":")[0] == kind), found[-1])
    wanted = name if ":" in name or name == "cpu" else f"{name}:0"
    device = next((d for d in found if d.name == wanted), None)
    if device is None:
        raise UsageError(f"no device {name!r} on this machine{nearest(name, (d.name for d in found))}")
    if not device.arch:
        raise UsageError(f"{device.product or device.name} is a device that halfbyte does not know")
    if device.name != "cpu" and kind != device.name.partition(":")[0]:
        has = "is not installed" if build is None else f"{build.version} is built for {build.backend}"
        raise UsageError(f"{device.name} ({device.product}) is there, but torch {has}; install a build of torch for it")
    return device


def _nvidia_devices() -> list[Device]:
    """NVIDIA devices through NVML, which makes no CUDA context; those that CUDA_VISIBLE_DEVICES leaves."""
    library = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        visible = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count.value)
        return [_nvidia_device(nvml, index, place) for place, index in enumerate(visible)]
    finally:
        nvml.nvmlShutdown()


def _visible(setting: str | None, count: int) -> list[int]:
    """The device numbers that CUDA_VISIBLE_DEVICES leaves; it ends at the first one that does not exist."""
    if setting is None:
        return list(range(count))
    numbers: list[int] = []
    for text in map(str.strip, setting.split(",")):
        if text.startswith(("GPU-", "MIG-")):  # a UUID names one of the devices; which one makes no difference here
            numbers.append(min(len(numbers), count - 1))
        elif text.isdigit() and int(text) < count:
            numbers.append(int(text))
        else:
            break
    return numbers


def _nvidia_device(nvml: ctypes.CDLL, index: int, place: int) -> Device:
    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    handle, memory = ctypes.c_void_p(), Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name, driver = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    nvml.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(96))
    return Device(
        name=f"cuda:{place}",
        arch=f"sm_{major.value}{minor.value}",
        product=name.value.decode(),
        memory=memory.total or None,
        driver=driver.value.decode(),
    )


def _intel_devices(root: Path = Path("/sys/bus/pci/devices")) -> list[Device]:
    """Intel GPUs by their PCI ids; those of a known family count as xpu devices in PCI order."""
    found: list[Device] = []
    for folder in sorted(root.glob("*")) if root.is_dir() else ():
        try:
            vendor, kind, number = (int((folder / f).read_text(), 16) for f in ("vendor", "class", "device"))
        except (OSError, ValueError):
            continue
        if vendor != 0x8086 or kind >> 16 != 0x03:
            continue
        family = next((family for family, ids in _INTEL_IDS.items() if number in ids), "")
        place = sum(bool(device.arch) for device in found)
        found.append(
            Device(
                name=f"xpu:{place}" if family else f"pci:{folder.name}",
                arch=f"xpu-{family}" if family else "",
                product=f"Intel GPU {number:04x}",
            )
        )
    return found


def _cpu() -> Device:
    import platform

    return Device(name="cpu", arch="cpu", product=platform.processor() or platform.machine(), memory=_cpu_memory())


def _cpu_memory() -> int | None:
    """Bytes of main memory, or of the control group that this process lives in if that has less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total
    return min(total, limit)
