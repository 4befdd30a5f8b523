"""NVIDIA devices through NVML, which makes no CUDA context.

NVML numbers cards by PCI bus. CUDA does so only under CUDA_DEVICE_ORDER=PCI_BUS_ID; by default it puts the fastest
first, by a rule that is not published. Where the cards differ, their numbers are a guess, and the devices carry a note.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from halfbyte.probe.device import Device

ORDER_NOTE: Final = (
    "the cards differ and are numbered by PCI bus here, but by CUDA with the fastest first: "
    "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
)
MIG_NOTE: Final = (
    "the card is in MIG mode, and CUDA uses one instance of it: name that in CUDA_VISIBLE_DEVICES, to see its memory"
)
UNREAD_NOTE: Final = "NVML does not tell its compute capability"


def nvidia_devices(environ: Mapping[str, str] = os.environ, library: Any = None) -> list[Device]:
    """The cards and MIG instances that CUDA_VISIBLE_DEVICES leaves, in its order; none without NVML.

    A card in MIG mode that is not named by one of its instances is shown whole, with a note.
    """
    if library is None:
        try:
            library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        except OSError:
            return []
    nvml = _Nvml(library)
    if not nvml.call("nvmlInit_v2"):
        return []
    try:
        cards, driver = nvml.cards(), nvml.text("nvmlSystemGetDriverVersion")
    finally:
        nvml.call("nvmlShutdown")
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    alike = len({(card.arch, card.product) for card in cards}) < 2
    certain = alike or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or _names_uuids(setting)
    return [
        Device(
            name=f"cuda:{place}",
            arch=card.arch,
            product=card.product,
            memory=card.memory,
            driver=driver,
            note="; ".join(filter(None, (card.note, "" if certain else ORDER_NOTE))),
        )
        for place, card in enumerate(_visible(setting, cards))
    ]


# Compared by identity: two cards of one model are different cards.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Card:
    """A card, or one MIG instance of a card."""

    uuid: str
    product: str
    arch: str
    memory: int | None
    instances: tuple[_Card, ...] = ()

    @property
    def note(self) -> str:
        if not self.arch:
            return UNREAD_NOTE
        return MIG_NOTE if self.instances else ""


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Nvml:
    """NVML's functions by name. One that is missing or fails is a "no" here, never a crash."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: object) -> bool:
        function = getattr(self._library, name, None)
        return function is not None and function(*arguments) == 0

    def text(self, name: str, *arguments: object) -> str:
        buffer = ctypes.create_string_buffer(96)
        return buffer.value.decode(errors="replace") if self.call(name, *arguments, buffer, ctypes.c_uint(96)) else ""

    def cards(self) -> list[_Card]:
        count = ctypes.c_uint()
        if not self.call("nvmlDeviceGetCount_v2", ctypes.byref(count)):
            return []
        return [self._card(index) for index in range(count.value)]

    def _card(self, index: int) -> _Card:
        handle = ctypes.c_void_p()
        if not self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)):
            return _Card(uuid="", product="NVIDIA GPU", arch="", memory=None)
        major, minor = ctypes.c_int(), ctypes.c_int()
        pointers = ctypes.byref(major), ctypes.byref(minor)
        told = self.call("nvmlDeviceGetCudaComputeCapability", handle, *pointers)
        arch = f"sm_{major.value}{minor.value}" if told else ""
        return self._described(handle, arch, tuple(self._instances(handle, arch)))

    def _instances(self, card: ctypes.c_void_p, arch: str) -> list[_Card]:
        count = ctypes.c_uint()
        if not self.call("nvmlDeviceGetMaxMigDeviceCount", card, ctypes.byref(count)):
            return []
        handles = [ctypes.c_void_p() for _ in range(count.value)]
        return [
            self._described(handle, arch)
            for index, handle in enumerate(handles)
            if self.call("nvmlDeviceGetMigDeviceHandleByIndex", card, ctypes.c_uint(index), ctypes.byref(handle))
        ]

    def _described(self, handle: ctypes.c_void_p, arch: str, instances: tuple[_Card, ...] = ()) -> _Card:
        memory = _Memory()
        told = self.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return _Card(
            uuid=self.text("nvmlDeviceGetUUID", handle),
            product=self.text("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            arch=arch,
            memory=memory.total if told else None,
            instances=instances,
        )


def _names_uuids(setting: str | None) -> bool:
    return setting is not None and setting.strip().startswith(("GPU-", "MIG-"))


def _visible(setting: str | None, cards: Sequence[_Card]) -> list[_Card]:
    """What CUDA_VISIBLE_DEVICES leaves: it ends at the first entry that names nothing; one named twice leaves nothing.

    Entries are numbers, or UUIDs as `nvidia-smi -L` shows them, of which the first characters suffice; the first entry
    decides which of them all are.
    """
    if setting is None:
        return list(cards)
    kind = setting.strip()[:4] if _names_uuids(setting) else ""
    known = [instance for card in cards for instance in card.instances] if kind == "MIG-" else cards
    chosen: list[_Card] = []
    for text in map(str.strip, setting.split(",")):
        card = _by_uuid(text, kind, known) if kind else _by_number(text, known)
        if card is None:
            break
        if card in chosen:
            return []
        chosen.append(card)
    return chosen


def _by_uuid(text: str, kind: str, known: Sequence[_Card]) -> _Card | None:
    found = [card for card in known if text.startswith(kind) and card.uuid.startswith(text)]
    return found[0] if len(found) == 1 else None


def _by_number(text: str, known: Sequence[_Card]) -> _Card | None:
    number = re.match(r"\+?\d+", text)  # as C's strtoul, which CUDA's reading resembles
    return known[int(number[0])] if number and int(number[0]) < len(known) else None
