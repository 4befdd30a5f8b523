"""What is installed: torch and its build, and the distributions that kernels ask for. Read from files, not imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from halfbyte.probe.device import Device
from halfbyte.specs import KernelSpec


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch: its version and what it was built for ("cpu", "cuda 13.0", "xpu 20250301", "rocm 6.4")."""

    version: str
    backend: str

    @property
    def device(self) -> str:
        """The torch device type of its accelerator, or "cpu". A ROCm build calls its devices "cuda"."""
        kind = self.backend.partition(" ")[0]
        return {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}.get(kind, "cpu")

    def drives(self, device: Device) -> bool:
        """Whether it was built for this kind of device."""
        kind = device.name.partition(":")[0]
        if kind not in ("cuda", "xpu"):
            return kind != "pci"
        return kind == self.device and (device.arch == "rocm") == self.backend.startswith("rocm")


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
