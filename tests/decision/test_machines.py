"""Descriptions of machines, and the device patterns that kernels declare."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.machines import ARCHES, Machine, check_pattern, describe, matches


@pytest.mark.parametrize("name", ARCHES)
def test_every_described_machine_names_its_device(name: str):
    machine = describe(name)
    assert machine.device in ("cpu", "cuda", "xpu")
    assert matches(name, machine)
    assert matches("any", machine)
    assert matches(machine.device, machine)


@pytest.mark.parametrize(
    ("pattern", "included", "excluded"),
    [
        ("sm_80..sm_89", ("sm_80", "sm_86", "sm_89"), ("sm_75", "sm_90", "cpu", "xpu-bmg")),
        ("sm_100..", ("sm_100", "sm_121"), ("sm_90", "xpu-pvc")),
        ("sm_90", ("sm_90",), ("sm_89", "sm_100")),
        ("xpu", ("xpu-bmg", "xpu-mtl"), ("cpu", "sm_90")),
        ("xpu-lnl", ("xpu-lnl",), ("xpu-bmg",)),
        ("cuda", ("sm_75",), ("xpu-bmg", "cpu")),
    ],
)
def test_patterns_include_exactly_what_they_say(pattern: str, included: tuple[str, ...], excluded: tuple[str, ...]):
    check_pattern(pattern)
    assert all(matches(pattern, describe(name)) for name in included)
    assert not any(matches(pattern, describe(name)) for name in excluded)


def test_an_amd_card_is_cuda_to_torch_and_not_to_kernels():
    card = Machine(name="MI300X", arch="rocm")
    assert (card.device, card.capability) == ("cuda", None)
    assert [pattern for pattern in ("any", "rocm", "cuda", "sm_80..") if matches(pattern, card)] == ["any", "rocm"]


@pytest.mark.parametrize("pattern", ["sm90", "gpu", "sm_90..99", "", "xpu-"])
def test_an_unknown_pattern_is_an_error(pattern: str):
    with pytest.raises(UsageError, match="device pattern"):
        check_pattern(pattern)


def test_an_unknown_machine_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'sm_100'"):
        describe("sm_1000")


def test_a_file_describes_a_machine(tmp_path):
    file = tmp_path / "b200.toml"
    file.write_text('arch = "sm_100"\nmemory = 1000\n[packages]\nFlashInfer_Python = "0.7.2"\n')
    expected = Machine(name="b200", arch="sm_100", memory=1000, packages=(("flashinfer-python", "0.7.2"),))
    assert describe(str(file)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('arch = "sm_100"\nmemroy = 1', "did you mean 'memory'"),
        ('arch = "sm_101"', "sm_10"),
        ('arch = "cpu"\nmemory = "16 GB"', "memory"),
        ("arch = ", "cannot read"),
        ('arch = "cpu"\n[packages]\ntorch = 2', "packages"),
        ("name = '\xff'", "cannot read"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_what_is_wrong(tmp_path, text: str, message: str):
    file = tmp_path / "machine.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=message):
        describe(str(file))
    with pytest.raises(UsageError, match="cannot read"):
        describe(str(tmp_path / "missing.toml"))
