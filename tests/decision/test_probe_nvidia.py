"""Probing NVIDIA cards: NVML's answers, over a double of its library, as CUDA would number them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from halfbyte.probe.nvidia import MIG_NOTE, ORDER_NOTE, UNREAD_NOTE, nvidia_devices

GIB = 2**30


@dataclass
class Card:
    uuid: str
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    memory: int = 140 * GIB
    #: (uuid, memory) by slot; None: an empty slot.
    instances: tuple[tuple[str, int] | None, ...] = ()


class Nvml:
    """NVML as far as probing uses it. `failing` functions return an error, `missing` ones do not exist.

    Handles are 1, 2, ... for cards, and 100 times that plus the slot for MIG instances.
    """

    def __init__(self, *cards: Card, failing: tuple[str, ...] = (), missing: tuple[str, ...] = ()) -> None:
        self.cards, self.failing, self.missing = cards, failing, missing
        self.open = 0

    def __getattribute__(self, name: str):
        if name.startswith("nvml"):
            if name in self.missing:
                raise AttributeError(name)
            if name in self.failing:
                return lambda *_: 999
        return super().__getattribute__(name)

    def _known(self, handle) -> tuple[str, str, int]:
        card = self.cards[(handle.value // 100 if handle.value >= 100 else handle.value) - 1]
        if handle.value < 100:
            return card.uuid, card.name, card.memory
        instance = card.instances[handle.value % 100]
        assert instance is not None
        return instance[0], f"{card.name} MIG", instance[1]

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:  # noqa: N802
        count._obj.value = len(self.cards)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:  # noqa: N802
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = self.cards[handle.value - 1].capability
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory) -> int:  # noqa: N802
        memory._obj.total = self._known(handle)[2]
        return 0

    def nvmlDeviceGetUUID(self, handle, buffer, size) -> int:  # noqa: N802
        return self._write(self._known(handle)[0], buffer, size)

    def nvmlDeviceGetName(self, handle, buffer, size) -> int:  # noqa: N802
        return self._write(self._known(handle)[1], buffer, size)

    def nvmlSystemGetDriverVersion(self, buffer, size) -> int:  # noqa: N802
        return self._write("580.1", buffer, size)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle, count) -> int:  # noqa: N802
        count._obj.value = len(self.cards[handle.value - 1].instances)
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index, instance) -> int:  # noqa: N802
        if self.cards[handle.value - 1].instances[index.value] is None:
            return 6
        instance._obj.value = handle.value * 100 + index.value
        return 0

    def _write(self, text: str, buffer, size) -> int:
        assert len(text) < size.value
        buffer.value = text.encode()
        return 0


ALIKE = (Card("GPU-aaaa-1"), Card("GPU-aabb-2"), Card("GPU-cccc-3"))
MIXED = (Card("GPU-aaaa-1", "NVIDIA T4", (7, 5), 16 * GIB), Card("GPU-bbbb-2"))
SLICED = (
    Card("GPU-aaaa-1", instances=(("MIG-11", 16 * GIB), None, ("MIG-12", 32 * GIB))),
    Card("GPU-bbbb-2", instances=(("MIG-21", 8 * GIB),)),
)


def found(setting: str | None, *cards: Card, **environ: str):
    settings = environ if setting is None else {"CUDA_VISIBLE_DEVICES": setting, **environ}
    return nvidia_devices(settings, Nvml(*cards))


def test_a_card_is_described_by_nvml():
    nvml = Nvml(MIXED[0])
    (card,) = nvidia_devices({}, nvml)
    assert (card.name, card.arch, card.product) == ("cuda:0", "sm_75", "NVIDIA T4")
    assert (card.memory, card.driver, card.note) == (16 * GIB, "580.1", "")
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("setting", "cards"),
    [
        (None, [1, 2, 3]),
        ("1", [2]),
        ("2,0", [3, 1]),
        ("", []),
        ("0,9,1", [1]),
        ("-1", []),
        ("0,-1,1", [1]),
        ("1,1", []),
        ("GPU-cccc-3", [3]),
        ("GPU-c,GPU-aaaa", [3, 1]),
        ("GPU-aa", []),
        ("GPU-cccc,GPU-dd,GPU-aaaa", [3]),
        ("GPU-cccc,0", [3]),
        ("0,GPU-cccc", [1]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_honoured(setting: str | None, cards: list[int]):
    numbered = [Card(card.uuid, memory=number) for number, card in enumerate(ALIKE, start=1)]
    devices = found(setting, *numbered)
    assert [device.memory for device in devices] == cards
    assert [device.name for device in devices] == [f"cuda:{place}" for place in range(len(cards))]


def test_an_empty_entry_names_no_card():
    assert len(found("GPU-aaaa,", ALIKE[0])) == 1


@pytest.mark.parametrize(
    ("cards", "setting", "order", "note"),
    [
        (ALIKE, None, "", ""),
        (MIXED, None, "", ORDER_NOTE),
        (MIXED, "0", "FASTEST_FIRST", ORDER_NOTE),
        (MIXED, None, "PCI_BUS_ID", ""),
        (MIXED, "GPU-b", "", ""),
    ],
)
def test_numbers_that_cuda_may_give_otherwise_are_noted(cards, setting, order: str, note: str):
    devices = found(setting, *cards, CUDA_DEVICE_ORDER=order)
    assert {device.note for device in devices} == {note}


def test_a_mig_instance_has_its_own_memory():
    (device,) = found("MIG-12", *SLICED)
    assert (device.arch, device.product, device.memory, device.note) == ("sm_90", "NVIDIA H200 MIG", 32 * GIB, "")
    assert [device.memory for device in found("MIG-21,MIG-11", *SLICED)] == [8 * GIB, 16 * GIB]
    assert found("MIG-1", *SLICED) == []


def test_a_card_in_mig_mode_that_is_named_as_a_whole_is_noted():
    (device,) = found("0", *SLICED)
    assert (device.memory, device.note) == (140 * GIB, MIG_NOTE)


@pytest.mark.parametrize("name", ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability"])
@pytest.mark.parametrize("how", ["failing", "missing"])
def test_a_card_that_nvml_cannot_describe_has_no_arch(name: str, how: str):
    (device,) = nvidia_devices({}, Nvml(Card("GPU-a"), **{how: (name,)}))
    assert (device.name, device.arch, device.note) == ("cuda:0", "", UNREAD_NOTE)


@pytest.mark.parametrize("how", ["failing", "missing"])
def test_what_nvml_does_not_tell_stays_open(how: str):
    silent = (
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetName",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetMaxMigDeviceCount",
        "nvmlSystemGetDriverVersion",
        "nvmlShutdown",
    )
    (device,) = nvidia_devices({}, Nvml(Card("GPU-a"), **{how: silent}))
    assert (device.arch, device.product, device.memory, device.driver) == ("sm_90", "NVIDIA GPU", None, "")


@pytest.mark.parametrize("name", ["nvmlInit_v2", "nvmlDeviceGetCount_v2"])
@pytest.mark.parametrize("how", ["failing", "missing"])
def test_an_nvml_that_does_not_work_finds_nothing(name: str, how: str):
    nvml = Nvml(Card("GPU-a"), **{how: (name,)})
    assert nvidia_devices({}, nvml) == []
    assert nvml.open == 0
