"""Probing: which device a decision is about, and what torch itself says where it is imported already."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from halfbyte.errors import UsageError
from halfbyte.probe import Device, TorchBuild, choose, devices, probe, through_torch

CARD = Device(name="cuda:0", arch="sm_90", product="NVIDIA H200", memory=10**9, driver="580")
ARC = Device(name="xpu:0", arch="xpu-bmg", product="Intel GPU e20b")
CPU = Device(name="cpu", arch="cpu", product="x86_64", memory=10**9)
UNKNOWN = Device(name="pci:0000:00:02.0", arch="", product="Intel GPU 9bc4")
DOUBTFUL = replace(CARD, note="perhaps another")


class Backend(SimpleNamespace):
    """torch.cuda or torch.xpu with devices of these properties."""

    def __init__(self, *properties: SimpleNamespace, used: bool = False, number: int = 0) -> None:
        super().__init__(properties=properties, used=used, number=number)

    def is_initialized(self) -> bool:
        return self.used

    def is_available(self) -> bool:
        return bool(self.properties)

    def device_count(self) -> int:
        return len(self.properties)

    def current_device(self) -> int:
        return self.number

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return self.properties[number]


T4 = SimpleNamespace(name="T4", major=7, minor=5, total_memory=16)
H200 = SimpleNamespace(name="H200", major=9, minor=0, total_memory=140)
B580 = SimpleNamespace(name="Arc B580", device_id=0xE20B, total_memory=12, driver_version="1.6")
FUTURE = SimpleNamespace(name="Arc C", device_id=0xFFFF, total_memory=48, driver_version="2")


@pytest.fixture
def here(monkeypatch):
    """Pretend that these devices and this torch are here."""

    def pretend(devices: tuple[Device, ...], backend: str | None) -> None:
        build = None if backend is None else TorchBuild("2.13.0", backend)
        monkeypatch.setattr(choose, "devices", lambda: devices)
        monkeypatch.setattr(choose, "torch_build", lambda: build)

    return pretend


@pytest.fixture
def imported(monkeypatch):
    """Pretend that a torch with these backends is imported."""

    def pretend(cuda: Backend | None = None, xpu: Backend | None = None, hip: str | None = None) -> None:
        fake = SimpleNamespace(cuda=cuda or Backend(), xpu=xpu or Backend(), version=SimpleNamespace(hip=hip))
        monkeypatch.setitem(sys.modules, "torch", fake)

    return pretend


@pytest.mark.parametrize(
    ("devices", "backend", "arch"),
    [
        ((CARD, CPU), "cuda 13.0", "sm_90"),
        ((CARD, ARC, CPU), "xpu 20250301", "xpu-bmg"),
        ((CARD, CPU), "cpu", "cpu"),
        ((CARD, CPU), None, "cpu"),
        ((CPU,), "cuda 13.0", "cpu"),
        ((CARD, CPU), "rocm 6.4", "cpu"),
        ((replace(CARD, arch="rocm"), CPU), "rocm 6.4", "rocm"),
        ((replace(CARD, arch=""), CPU), "cuda 13.0", "cpu"),
        ((UNKNOWN, CPU), "xpu 1", "cpu"),
    ],
)
def test_the_default_is_the_device_that_torch_can_drive(here, devices, backend, arch: str):
    here(devices, backend)
    assert probe().arch == arch


@pytest.mark.parametrize("name", [None, "cuda"])
@pytest.mark.parametrize(("used", "arch"), [(True, "sm_75"), (False, "sm_90")])
def test_a_device_without_a_number_is_torchs_current_one(here, imported, name, used: bool, arch: str):
    here((CARD, Device(name="cuda:1", arch="sm_75", product="T4"), CPU), "cuda 13.0")
    imported(Backend(H200, T4, used=used, number=1))
    assert probe(name).arch == arch


def test_a_device_that_is_not_there_or_that_torch_cannot_drive_is_an_error(here):
    here((CARD, UNKNOWN, CPU), "cpu")
    with pytest.raises(UsageError, match="no device 'cuda:1'"):
        probe("cuda:1")
    with pytest.raises(UsageError, match="built for cpu"):
        probe("cuda")
    with pytest.raises(UsageError, match="no device 'cppu' on this machine; did you mean 'cpu'"):
        probe("cppu")
    with pytest.raises(UsageError, match="Intel GPU 9bc4 is a device that halfbyte cannot use"):
        probe(UNKNOWN.name)
    here((CARD, CPU), None)
    with pytest.raises(UsageError, match="not installed"):
        probe("cuda:0")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_there_is_one_cpu(here, name: str):
    here((CARD, CPU), "cuda 13.0")
    assert probe(name).name == "x86_64"


def test_any_device_that_torch_can_put_a_tensor_on_is_a_machine(here):
    here((CPU,), "cpu")
    for name in ("meta", "meta:0"):
        machine = probe(name)
        assert (machine.name, machine.arch, machine.device, machine.memory) == ("meta", "meta", "meta", None)
    for name in ("vulkan", "hip", "mtia", "privateuseone", "xpu"):  # each fails in torch with an error of its own kind
        with pytest.raises(UsageError, match=f"no device '{name}'"):
            probe(name)


@pytest.mark.parametrize(
    ("cuda", "seen", "asked"),
    [
        (Backend(T4), [CARD], False),
        (Backend(T4, used=True), [CARD], True),
        (Backend(T4), [DOUBTFUL], True),
        (Backend(T4), [replace(CARD, arch="")], True),
        (Backend(T4), [], True),
        (Backend(), [DOUBTFUL], False),
    ],
)
def test_torch_is_asked_where_it_runs_already_or_what_was_seen_is_not_certain(imported, cuda, seen, asked: bool):
    imported(cuda)
    found = through_torch.confirmed("cuda", seen)
    assert [device.product for device in found] == (["T4"] if asked else [device.product for device in seen])


def test_without_torch_imported_what_was_seen_counts(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert through_torch.confirmed("cuda", [DOUBTFUL]) == [DOUBTFUL]
    assert through_torch.state() == (False, False, False)


def test_torch_describes_cuda_rocm_and_xpu_devices(imported):
    imported(Backend(T4, H200, used=True), Backend(B580, FUTURE))
    t4, h200 = through_torch.confirmed("cuda", [CARD])
    assert t4 == Device(name="cuda:0", arch="sm_75", product="T4", memory=16, driver="580")
    assert (h200.name, h200.arch) == ("cuda:1", "sm_90")
    b580, future = through_torch.confirmed("xpu", [])
    assert b580 == Device(name="xpu:0", arch="xpu-bmg", product="Arc B580", memory=12, driver="1.6")
    assert (future.name, future.arch) == ("xpu:1", "xpu")
    imported(Backend(H200), hip="6.4")
    assert [device.arch for device in through_torch.confirmed("cuda", [])] == ["rocm"]


def test_a_runtime_that_cannot_start_here_leaves_what_was_seen(imported, monkeypatch):
    cuda = Backend(T4)

    def forked(number: int) -> SimpleNamespace:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(cuda, "get_device_properties", forked, raising=False)
    imported(cuda)
    assert through_torch.confirmed("cuda", [DOUBTFUL]) == [DOUBTFUL]


def test_what_was_seen_before_torch_came_into_use_is_not_kept(imported, monkeypatch):
    monkeypatch.setattr(choose, "nvidia_devices", lambda: [CARD])
    monkeypatch.setattr(choose, "intel_devices", list)
    choose._devices.cache_clear()
    cuda = Backend(T4)
    imported(cuda)
    assert devices()[0].product == "NVIDIA H200"
    cuda.used = True
    assert devices()[0].product == "T4"
    choose._devices.cache_clear()


def test_a_named_device_that_is_not_certain_makes_torch_tell(here, imported, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(choose, "import_module", asked.append)
    here((DOUBTFUL, CPU), "cuda 13.0")
    assert probe("cuda").arch == "sm_90"
    assert asked == ["torch"]
    here((CARD, CPU), "cuda 13.0")
    probe("cuda")
    probe()
    assert asked == ["torch"]


def test_torch_is_described_and_the_default_found_without_importing_it():
    code = (
        "import sys; from halfbyte.probe import torch_build, devices, probe; build = torch_build(); devices();"
        "probe(); probe('cpu'); assert 'torch' not in sys.modules;"
        "import torch; assert build.version == torch.__version__, build"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
