"""Machines: the device and its libraries, frozen. Described here by name; probe/ finds the real one."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from halfbyte.errors import UsageError, nearest

#: Intel GPU families, and what they are.
XPU_FAMILIES: Final = {
    "pvc": "Data Center GPU Max (Ponte Vecchio)",
    "bmg": "Arc B-Series (Battlemage)",
    "lnl": "Core Ultra 200V (Lunar Lake)",
    "ptl": "Core Ultra 300 (Panther Lake)",
    "acm": "Arc A-Series (Alchemist)",
    "mtl": "Core Ultra 100 (Meteor Lake)",
    "arl": "Core Ultra 200 (Arrow Lake)",
}
CUDA_ARCHES: Final = tuple(f"sm_{c}" for c in (75, 80, 86, 89, 90, 100, 103, 110, 120, 121))
ARCHES: Final = ("cpu", *CUDA_ARCHES, *(f"xpu-{family}" for family in XPU_FAMILIES))
_PATTERN: Final = re.compile(r"any|cpu|cuda|rocm|mps|xpu|xpu-[a-z]+|sm_\d+(\.\.(sm_\d+)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device and the libraries beside it. Two equal machines get equal answers."""

    name: str
    #: "cpu", "sm_90", "xpu-bmg", ...
    arch: str
    #: Bytes of the device's memory; None: not known, and nothing is refused for it.
    memory: int | None = None
    #: (distribution, version) of what is installed; None: whatever a kernel requires counts as installed.
    packages: tuple[tuple[str, str], ...] | None = None

    @property
    def device(self) -> str:
        """The torch device type: "cpu", "cuda" (AMD's too), "xpu", or another one such as "mps"."""
        return "cuda" if self.arch.startswith("sm_") or self.arch == "rocm" else self.arch.partition("-")[0]

    @property
    def capability(self) -> int | None:
        """The CUDA compute capability as one number, such as 90 or 103; None on other devices."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else None

    def with_packages(self, packages: dict[str, str]) -> Machine:
        """The same device with these distributions installed and no others."""
        names = {str(canonicalize_name(name)): version for name, version in packages.items()}
        return replace(self, packages=tuple(sorted(names.items())))

    def to_dict(self) -> dict[str, Any]:
        """The machine as JSON-ready data."""
        return {
            **asdict(self),
            "device": self.device,
            "packages": None if self.packages is None else dict(self.packages),
        }

    def __str__(self) -> str:
        return self.name if self.name == self.arch else f"{self.name} ({self.arch})"


def describe(name: str) -> Machine:
    """Return the machine of this name (see ARCHES), or that a TOML file describes.

    The file has `arch`, and may have `name`, `memory` (bytes) and a table `[packages]` of distribution versions.
    """
    if name in ARCHES:
        return Machine(name=name, arch=name)
    path = Path(name)
    if path.suffix == ".toml":
        return _from_toml(path)
    raise UsageError(f"unknown machine {name!r}{nearest(name, ARCHES)}; or name a .toml file")


def _from_toml(path: Path) -> Machine:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the machine file {path}: {error}") from error
    known = ("arch", "name", "memory", "packages")
    for key in data:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    arch, memory, packages = data.get("arch"), data.get("memory"), data.get("packages")
    if arch not in ARCHES:
        raise UsageError(f"{path}: arch is {arch!r}{nearest(str(arch), ARCHES)}")
    if not isinstance(data.get("name", ""), str):
        raise UsageError(f"{path}: name is {data['name']!r}; it must be a text")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0):
        raise UsageError(f"{path}: memory is {memory!r}; it must be a positive number of bytes")
    if packages is not None and not (isinstance(packages, dict) and all(map(_is_version, packages.values()))):
        raise UsageError(f'{path}: packages must be a table of distribution names and versions, such as "2.13.0"')
    machine = Machine(name=str(data.get("name", path.stem)), arch=arch, memory=memory)
    return machine if packages is None else machine.with_packages(packages)


def _is_version(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(Version(text))
    except InvalidVersion:
        return False


def check_pattern(pattern: str) -> None:
    """UsageError unless `pattern` is one that `matches` understands."""
    if not _PATTERN.fullmatch(pattern):
        raise UsageError(
            f"unknown device pattern {pattern!r}; "
            "use any, cpu, cuda, rocm, mps, xpu, xpu-FAMILY, sm_90, sm_80..sm_89 or sm_80.. (and up)"
        )
    family = pattern.removeprefix("xpu-")
    if family != pattern and family not in XPU_FAMILIES:
        raise UsageError(f"unknown device pattern {pattern!r}: no such family{nearest(family, XPU_FAMILIES)}")


def matches(pattern: str, machine: Machine) -> bool:
    """Whether a device pattern of a kernel's declaration includes the machine."""
    if pattern in ("any", machine.arch) or (pattern == machine.device and machine.arch != "rocm"):
        return True
    if ".." not in pattern or machine.capability is None:
        return False
    low, _, high = pattern.partition("..")
    return int(low[3:]) <= machine.capability and (not high or machine.capability <= int(high[3:]))
