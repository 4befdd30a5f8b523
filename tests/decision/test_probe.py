"""Probing: devices from NVML and PCI ids, torch from its version file, all without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte import probe as probing
from halfbyte.errors import UsageError
from halfbyte.probe import Device, TorchBuild, probe

CARD = Device(name="cuda:0", arch="sm_90", product="NVIDIA H200", memory=10**9, driver="580")
ARC = Device(name="xpu:0", arch="xpu-bmg", product="Intel GPU e20b")
CPU = Device(name="cpu", arch="cpu", product="x86_64", memory=10**9)


@pytest.fixture
def here(monkeypatch):
    """Pretend that these devices and this torch are here."""

    def pretend(devices: tuple[Device, ...], backend: str | None) -> None:
        build = None if backend is None else TorchBuild("2.13.0", backend)
        monkeypatch.setattr(probing, "devices", lambda: devices)
        monkeypatch.setattr(probing, "torch_build", lambda: build)

    return pretend


@pytest.mark.parametrize(
    ("devices", "backend", "arch"),
    [
        ((CARD, CPU), "cuda 13.0", "sm_90"),
        ((CARD, ARC, CPU), "xpu 20250301", "xpu-bmg"),
        ((CARD, CPU), "cpu", "cpu"),
        ((CARD, CPU), None, "cpu"),
        ((CPU,), "cuda 13.0", "cpu"),
    ],
)
def test_the_default_is_the_first_device_that_torch_can_drive(here, devices, backend, arch: str):
    here(devices, backend)
    assert probe().arch == arch


def test_a_device_that_is_not_there_or_that_torch_cannot_drive_is_an_error(here):
    here((CARD, CPU), "cpu")
    with pytest.raises(UsageError, match="no device 'cuda:1'"):
        probe("cuda:1")
    with pytest.raises(UsageError, match="built for cpu"):
        probe("cuda")
    assert probe("cpu").arch == "cpu"


def test_a_device_without_a_known_family_is_named_but_never_chosen(here):
    unknown = Device(name="pci:0000:00:02.0", arch="", product="Intel GPU 9bc4")
    here((unknown, CPU), "xpu 1")
    assert probe().arch == "cpu"


def test_intel_devices_are_found_by_their_pci_ids(tmp_path: Path):
    for address, vendor, kind, number in (
        ("0000:03:00.0", "0x8086", "0x030000", "0xe20b"),
        ("0000:00:02.0", "0x8086", "0x030000", "0x9bc4"),
        ("0000:04:00.0", "0x8086", "0x020000", "0xe20b"),
        ("0000:05:00.0", "0x10de", "0x030000", "0x2330"),
        ("0000:06:00.0", "0x8086", "0x038000", "0x0bd5"),
    ):
        folder = tmp_path / address
        folder.mkdir()
        for name, value in (("vendor", vendor), ("class", kind), ("device", number)):
            (folder / name).write_text(value + "\n")
    found = [(device.name, device.arch) for device in probing._intel_devices(tmp_path)]
    assert found == [("pci:0000:00:02.0", ""), ("xpu:0", "xpu-bmg"), ("xpu:1", "xpu-pvc")]


@pytest.mark.parametrize(
    ("setting", "visible"),
    [(None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("", []), ("0,9,1", [0]), ("-1", []), ("GPU-ab,GPU-cd", [0, 1])],
)
def test_cuda_visible_devices_is_honoured(setting, visible):
    assert probing._visible(setting, 3) == visible


def test_torch_is_described_without_being_imported():
    code = (
        "import sys; from halfbyte.probe import torch_build, devices; build = torch_build(); devices();"
        "assert 'torch' not in sys.modules; import torch; assert build.version == torch.__version__, build"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
