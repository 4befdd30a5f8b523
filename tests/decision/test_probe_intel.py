"""Probing Intel GPUs: PCI ids in a made-up /sys, numbered as torch would."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.probe.intel import INTEGRATED_NOTE, intel_devices

BMG, PVC, LNL, OLD = "0xe20b", "0x0bd5", "0x64a0", "0x9bc4"


def machine(root: Path, gpus: dict[str, str]) -> Path:
    """A /sys/bus/pci/devices with GPUs by address, and three devices that are none of Intel's GPUs."""
    rows = [(address, "0x8086", "0x030000", number) for address, number in gpus.items()]
    rows += [("0000:7d:00.0", "0x8086", "0x020000", BMG), ("0000:7e:00.0", "0x10de", "0x030000", "0x2330")]
    for address, *values in rows:
        folder = root / address
        folder.mkdir()
        for name, value in zip(("vendor", "class", "device"), values, strict=True):
            (folder / name).write_text(f"{value}\n")
    (root / "0000:7f:00.0").mkdir()
    return root


def names(found) -> list[tuple[str, str]]:
    return [(device.name, device.arch) for device in found]


def test_devices_are_found_by_their_pci_ids(tmp_path: Path):
    root = machine(tmp_path, {"0000:00:02.0": OLD, "0000:06:00.0": PVC, "0000:03:00.0": BMG})
    found = intel_devices({}, root)
    assert names(found) == [("xpu:0", "xpu-bmg"), ("xpu:1", "xpu-pvc"), ("pci:0000:00:02.0", "")]
    assert {device.memory for device in found} == {None}


def test_without_linux_nothing_is_found(tmp_path: Path):
    assert intel_devices({}, tmp_path / "none") == []


def test_an_integrated_gpu_counts_only_where_there_is_no_discrete_one(tmp_path: Path):
    root = machine(tmp_path, {"0000:00:02.0": LNL, "0000:03:00.0": BMG})
    both = intel_devices({}, root)
    assert names(both) == [("xpu:0", "xpu-bmg"), ("pci:0000:00:02.0", "")]
    assert [device.note for device in both] == ["", INTEGRATED_NOTE]
    assert names(intel_devices({"ZE_AFFINITY_MASK": "1"}, root)) == [("xpu:0", "xpu-lnl")]
    by_address = {"ZE_AFFINITY_MASK": "1", "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"}
    assert names(intel_devices(by_address, root)) == [("xpu:0", "xpu-bmg")]


@pytest.mark.parametrize(
    ("mask", "families"),
    [("", ["bmg", "pvc", "acm"]), ("1", ["pvc"]), ("2,0", ["bmg", "acm"]), ("7", []), ("0, 0", ["bmg"])],
)
def test_the_affinity_mask_is_honoured(tmp_path: Path, mask: str, families: list[str]):
    root = machine(tmp_path, {"0000:03:00.0": BMG, "0000:04:00.0": PVC, "0000:05:00.0": "0x56a0"})
    found = intel_devices({"ZE_AFFINITY_MASK": mask}, root)
    assert names(found) == [(f"xpu:{place}", f"xpu-{family}") for place, family in enumerate(families)]
    assert {device.note for device in found} <= {""}


@pytest.mark.parametrize("setting", [("ZE_AFFINITY_MASK", "0.1"), ("ONEAPI_DEVICE_SELECTOR", "level_zero:1")])
def test_a_choice_that_is_not_understood_is_noted(tmp_path: Path, setting: tuple[str, str]):
    (device,) = intel_devices(dict([setting]), machine(tmp_path, {"0000:03:00.0": BMG}))
    assert device.name == "xpu:0"
    assert setting[0] in device.note


def test_tiles_are_devices_unless_the_hierarchy_is_composite(tmp_path: Path):
    root = machine(tmp_path, {"0000:03:00.0": PVC})
    for tile, memory in (("tile0", 3000), ("tile1", 4000)):
        (root / "0000:03:00.0" / tile).mkdir()
        (root / "0000:03:00.0" / tile / "physical_vram_size_bytes").write_text(f"{memory}\n")
    apart = [(device.name, device.memory) for device in intel_devices({}, root)]
    assert apart == [("xpu:0", 3000), ("xpu:1", 4000)]
    (card,) = intel_devices({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}, root)
    assert card.memory == 7000
    (root / "0000:03:00.0" / "tile1" / "physical_vram_size_bytes").unlink()
    (card,) = intel_devices({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}, root)
    assert card.memory is None


def test_the_memory_that_i915_shows_is_read(tmp_path: Path):
    root = machine(tmp_path, {"0000:03:00.0": "0x56a0"})
    card = root / "0000:03:00.0" / "drm" / "card0"
    card.mkdir(parents=True)
    (card / "lmem_total_bytes").write_text("17179869184\n")
    (device,) = intel_devices({}, root)
    assert device.memory == 2**34
