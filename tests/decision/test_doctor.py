"""`doctor`: what is there, what is missing for it, and what should be mended."""

import pytest

from halfbyte import doctor
from halfbyte.doctor import diagnosis_data, diagnosis_tables, examine, missing_plugins
from halfbyte.plugins import Plugin
from halfbyte.probe import Device, TorchBuild

CPU = Device(name="cpu", arch="cpu", product="x86_64")


@pytest.mark.parametrize(
    ("arch", "extras"), [("sm_90", ["marlin"]), ("sm_120", ["blackwell", "marlin"]), ("xpu-bmg", ["xpu"]), ("cpu", [])]
)
def test_a_plugin_is_missing_only_where_hardware_for_it_is_there(arch: str, extras: list[str]):
    found = missing_plugins([Device(name="x:0", arch=arch, product="card"), CPU], [])
    assert [extra.name for _, extra in found] == extras
    assert all(extra.install == f"pip install 'halfbyte[{extra.name}]'" for _, extra in found)


def test_an_installed_plugin_is_not_missing():
    marlin = Plugin(name="cuda-marlin", distribution="halfbyte-cuda-marlin", version="0.1.0", target="x")
    assert missing_plugins([Device(name="cuda:0", arch="sm_90", product="card")], [marlin]) == ()


def test_everything_wrong_is_listed(monkeypatch):
    bad = Plugin(
        name="bad", distribution="bad-dist", version="1.2", target="bad.plugin", error="ImportError: no libfoo"
    )
    card = Device(name="cuda:0", arch="sm_90", product="NVIDIA H200")
    monkeypatch.setattr(doctor, "installed_plugins", lambda: (bad,))
    monkeypatch.setattr(doctor, "devices", lambda: (card, CPU))
    monkeypatch.setattr(doctor, "torch_build", lambda: TorchBuild("2.13.0+cpu", "cpu"))
    diagnosis = examine({"HALFBYTE_REQIRE": "x", "HALFBYTE_DENY": "nothing.known", "HOME": "/root"})
    assert not diagnosis.healthy
    text = "\n".join(diagnosis.faults)
    for expected in ("no libfoo", "bad-dist 1.2", "HALFBYTE_REQUIRE", "nothing.known", "built for cpu"):
        assert expected in text
    data = diagnosis_data(diagnosis)
    assert data["missing"] == [
        {"device": "cuda:0", "distribution": "halfbyte-cuda-marlin", "install": "pip install 'halfbyte[marlin]'"}
    ]
    assert [plugin["status"] for plugin in data["plugins"]] == ["failed"]
    assert set(data["environment"]) == {"HALFBYTE_REQIRE", "HALFBYTE_DENY"}
    assert len(diagnosis_tables(diagnosis)) == 6


def test_nothing_wrong_is_healthy():
    assert examine({}).healthy
