"""Intel GPUs by their PCI ids, from Linux's /sys. On other systems only torch can tell.

Numbers follow what torch makes of Level Zero's list. Intel's driver (https://github.com/intel/compute-runtime) lists
discrete GPUs by PCI address, then integrated ones, or all by PCI address under ZE_ENABLE_PCI_ID_DEVICE_ORDER=1. The
tiles of a card are devices of their own, unless ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE. ZE_AFFINITY_MASK keeps those whose
numbers it has. Of these, torch leaves the integrated ones out where there is a discrete one
(https://github.com/pytorch/pytorch/pull/144378).

Not followed, and said in a note: ONEAPI_DEVICE_SELECTOR, and a mask that names tiles ("0.1"). Not seen: the tiles of a
card that the i915 driver runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from halfbyte.probe.device import Device

#: PCI device ids of Intel GPUs by family, from the Linux kernel's include/drm/intel/pciids.h (ranges of it).
_IDS: Final = {
    "pvc": (0x0B69, 0x0B6E, *range(0x0BD4, 0x0BDC), 0x0BE0, 0x0BE1, 0x0BE5),
    "bmg": (*range(0xE202, 0xE224),),
    "lnl": (0x6420, 0x64A0, 0x64B0),
    "ptl": (*range(0xB080, 0xB0B1), 0xFD80, 0xFD81),
    "acm": (*range(0x5690, 0x56C3), 0x4F80, *range(0x4F81, 0x4F89)),
    "mtl": (0x7D40, 0x7D45, 0x7D55, 0x7D60, 0x7DD5),
    "arl": (0x7D41, 0x7D51, 0x7D67, 0x7DD1, 0xB640),
}
_DISCRETE: Final = ("pvc", "bmg", "acm")
_VENDOR: Final = 0x8086
_DISPLAY_CLASS: Final = 0x03

INTEGRATED_NOTE: Final = "torch leaves an integrated GPU out where there is a discrete one"


def intel_family(device_id: int) -> str:
    """The family of the GPU with this PCI device id, "" if it has no name here."""
    return next((family for family, ids in _IDS.items() if device_id in ids), "")


def intel_devices(environ: Mapping[str, str] = os.environ, root: Path = Path("/sys/bus/pci/devices")) -> list[Device]:
    """The GPUs as torch would number them, then those that it would leave out and those of no known family.

    Memory is known where the kernel's driver shows it.
    """
    gpus = [gpu for folder in sorted(root.glob("*")) if (gpu := _gpu(folder)) is not None]
    listed = [gpu for gpu in gpus if gpu.family]
    if environ.get("ZE_ENABLE_PCI_ID_DEVICE_ORDER", "0") != "1":
        listed.sort(key=lambda gpu: gpu.integrated)
    composite = environ.get("ZE_FLAT_DEVICE_HIERARCHY") == "COMPOSITE"
    slots = [(gpu, memory) for gpu in listed for memory in gpu.memories(composite)]
    mask, note = _mask(environ)
    slots = [slot for number, slot in enumerate(slots) if mask is None or number in mask]
    discrete = any(not gpu.integrated for gpu, _ in slots)
    used = [slot for slot in slots if not (discrete and slot[0].integrated)]
    return [
        *(
            Device(name=f"xpu:{place}", arch=f"xpu-{gpu.family}", product=gpu.product, memory=memory, note=note)
            for place, (gpu, memory) in enumerate(used)
        ),
        *(gpu.left_out(INTEGRATED_NOTE) for gpu, _ in slots if discrete and gpu.integrated),
        *(gpu.left_out("") for gpu in gpus if not gpu.family),
    ]


@dataclass(frozen=True, slots=True)
class _Gpu:
    folder: Path
    number: int

    @property
    def family(self) -> str:
        return intel_family(self.number)

    @property
    def integrated(self) -> bool:
        return self.family not in _DISCRETE

    @property
    def product(self) -> str:
        return f"Intel GPU {self.number:04x}"

    def memories(self, composite: bool) -> list[int | None]:
        """Bytes of memory of each device that the card is: its tiles where the driver shows several, else itself."""
        tiles = [_read(tile / "physical_vram_size_bytes") for tile in sorted(self.folder.glob("tile[0-9]"))]
        if not tiles:
            return [next((_read(file) for file in self.folder.glob("drm/card*/lmem_total_bytes")), None)]
        known = [tile for tile in tiles if tile is not None]
        return [sum(known) if len(known) == len(tiles) else None] if composite else tiles

    def left_out(self, note: str) -> Device:
        return Device(name=f"pci:{self.folder.name}", arch="", product=self.product, note=note)


def _gpu(folder: Path) -> _Gpu | None:
    vendor, kind, number = (_read(folder / name) for name in ("vendor", "class", "device"))
    if vendor != _VENDOR or kind is None or kind >> 16 != _DISPLAY_CLASS or number is None:
        return None
    return _Gpu(folder, number)


def _read(file: Path) -> int | None:
    """The number in a file, decimal or with 0x; None if it cannot be read."""
    try:
        return int(file.read_text(encoding="ascii"), 0)
    except (OSError, ValueError):
        return None


def _mask(environ: Mapping[str, str]) -> tuple[set[int] | None, str]:
    """The numbers that ZE_AFFINITY_MASK leaves (None: all), and what makes them uncertain."""
    selector, mask = environ.get("ONEAPI_DEVICE_SELECTOR"), environ.get("ZE_AFFINITY_MASK")
    note = "ONEAPI_DEVICE_SELECTOR may number the devices otherwise" if selector else ""
    if not mask:
        return None, note
    numbers = [text.strip() for text in mask.split(",")]
    if not all(number.isdigit() for number in numbers):
        return None, f"ZE_AFFINITY_MASK={mask} is not understood here and may number the devices otherwise"
    return {int(number) for number in numbers}, note
