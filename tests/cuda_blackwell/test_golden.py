"""What is chosen on every Blackwell card for all four schemes, as golden files; goldens.py writes them."""

from __future__ import annotations

import pytest

from cuda_blackwell.goldens import MACHINES, decisions, file_of

#: Scheme and machines to the linear kernel that the documentation names.
DOCUMENTED = {
    ("nvfp4-w4a4", ("sm_100", "sm_103", "sm_110", "sm_121")): "flashinfer.cutlass",
    ("nvfp4-w4a4", ("sm_120",)): "flashinfer.b12x",
    ("mxfp4-w4a4", ("sm_100", "sm_103")): "flashinfer.cute-dsl",
    ("mxfp4-w4a4", ("sm_110", "sm_121")): "flashinfer.cudnn",
    ("mxfp4-w4a4", ("sm_120",)): "flashinfer.b12x",
    ("nvfp4-w4a16", MACHINES): "flashinfer.bf16-fp4",
    ("mxfp4-w4a16", MACHINES): "marlin.vllm",
}


@pytest.mark.parametrize("machine", MACHINES)
def test_decisions_for_linear_layers_are_the_golden_ones(machine: str):
    assert decisions("linear", machine) == file_of("linear", machine).read_text(encoding="utf-8")


@pytest.mark.parametrize(("scheme", "machines"), DOCUMENTED)
def test_the_documented_kernels_are_picked(scheme: str, machines: tuple[str, ...]):
    for machine in machines:
        lines = file_of("linear", machine).read_text(encoding="utf-8").splitlines()
        assert f"{scheme}: {DOCUMENTED[scheme, machines]}" in lines, machine


def test_nothing_counts_as_run_on_hardware():
    for machine in MACHINES:
        assert " hardware " not in file_of("linear", machine).read_text(encoding="utf-8")
