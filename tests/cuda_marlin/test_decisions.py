"""Which kernel runs weight-only layers on which card, with and without the libraries beside our own kernels."""

from __future__ import annotations

import pytest

from halfbyte import Machine, Policy, describe, resolve
from halfbyte.decisions import State
from halfbyte.problems import ExpertsProblem, LinearProblem, Problem
from halfbyte.refusals import Code
from halfbyte.schemes import SCHEMES

#: The plugins of other cards take no part: their libraries are not installed here.
OURS = {"torch": "2.11.0", "cuda-bindings": "13.0.0"}
VLLM = OURS | {"vllm": "0.26.0"}
HUMMING = OURS | {"humming-kernels": "0.1.19", "triton": "3.6.0"}


def linear(scheme: str, dtype: str = "bfloat16") -> LinearProblem:
    return LinearProblem(scheme=SCHEMES[scheme], n=4096, k=4096, dtype=dtype)


def experts(scheme: str, dtype: str = "bfloat16") -> ExpertsProblem:
    return ExpertsProblem(scheme=SCHEMES[scheme], experts=128, top_k=8, hidden=2048, intermediate=768, dtype=dtype)


def card(arch: str, packages: dict[str, str]) -> Machine:
    return describe(arch).with_packages(packages)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("arch", "packages", "of_linear", "of_experts"),
    [
        ("sm_90", OURS | VLLM | HUMMING, "marlin.cuda", "marlin.cuda"),
        ("sm_89", OURS | VLLM | HUMMING, "marlin.vllm", "marlin.vllm"),
        ("sm_86", HUMMING, "marlin.humming", "marlin.humming"),
        ("sm_80", OURS, "marlin.cuda", "dequantized"),
        ("sm_75", OURS | VLLM | HUMMING, "dequantized", "dequantized"),
        ("sm_100", VLLM, "marlin.vllm", "marlin.vllm"),
        ("sm_120", OURS, "marlin.cuda", "dequantized"),
        ("sm_121", HUMMING, "marlin.cuda", "dequantized"),
    ],
)
def test_the_documented_kernels_are_picked(
    scheme: str, arch: str, packages: dict[str, str], of_linear: str, of_experts: str
):
    machine = card(arch, packages)
    assert resolve(linear(scheme), machine).chosen().spec.id == of_linear
    assert resolve(experts(scheme), machine).chosen().spec.id == of_experts


@pytest.mark.parametrize("problem", [linear("nvfp4-w4a16", "float16"), experts("mxfp4-w4a16", "float16")], ids=str)
def test_float16_runs_on_turing_where_a_library_has_it(problem: Problem):
    assert resolve(problem, card("sm_75", VLLM)).chosen().spec.id == "marlin.vllm"
    assert resolve(problem, card("sm_75", HUMMING)).chosen().spec.id == "marlin.humming"


@pytest.mark.parametrize("problem", [linear("nvfp4-w4a16"), experts("nvfp4-w4a16")], ids=str)
def test_bfloat16_on_turing_is_refused_with_the_reason(problem: Problem):
    found = {one.spec.id: one for one in resolve(problem, card("sm_75", VLLM | HUMMING)).candidates}
    for kernel in ("marlin.vllm", "marlin.humming"):
        assert found[kernel].state is State.INELIGIBLE
        assert [refusal.code for refusal in found[kernel].refusals] == [Code.LIMIT]
        assert "sm_80" in found[kernel].refusals[0].detail


def test_only_hopper_counts_as_run_on_hardware():
    for arch, proved in (("sm_90", True), ("sm_80", False), ("sm_120", False)):
        for one in resolve(linear("nvfp4-w4a16"), card(arch, VLLM | HUMMING)).candidates:
            if one.spec.id.startswith("marlin."):
                assert (one.proof == "hardware") is proved, (arch, one.spec.id)


def test_w4a4_checkpoints_run_weight_only_and_the_report_says_so():
    chosen = resolve(linear("nvfp4-w4a4"), card("sm_90", OURS), Policy()).chosen()
    assert (chosen.spec.id, chosen.fidelity) == ("marlin.cuda", "weight-only")
