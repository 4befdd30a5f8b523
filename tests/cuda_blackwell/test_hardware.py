"""Level 4: `pytest -m blackwell` on a machine with a card runs the conformance kit for all kernels that it can run.

What came out is in blackwell-report.json where pytest was started: machine, versions, and the outcome of every check,
for linear layers and experts separately. Where a right kernel is outside the kit's tolerance, that is expected and
listed with its reason; kernels with one input scale for all experts are tried again on layers that have one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.machines import Machine, matches
from halfbyte_cuda_blackwell.plugin import halfbyte_kernels

TESTS = Path(__file__).parents[1]
KERNELS = sorted((spec.id, spec.op) for spec in halfbyte_kernels())
ONE_INPUT = "takes one input scale for all experts, and the experts of the kit's layers have their own"
#: Experts kernels to a scheme in which a right result is outside the kit's tolerance, and why.
DEVIATIONS = {
    "flashinfer.trtllm": ("nvfp4-w4a4", ONE_INPUT),
    "flashinfer.cute-dsl": ("nvfp4-w4a4", ONE_INPUT),
    "flashinfer.b12x": ("nvfp4-w4a16", "quantizes activations that have no calibrated scale, with a scale of one"),
}
#: The kit's checks of values; a deviation in any other check is a failure.
OF_VALUES = ("test_it_is_right_", "test_experts_elsewhere_add_nothing", "test_gate_and_up_with_one_global_scale")
RUNS = [
    *((kernel, op, "") for kernel, op in KERNELS),
    *((kernel, "experts", "one-input-scale") for kernel, (_, why) in DEVIATIONS.items() if why == ONE_INPUT),
]
NEEDS_A_CARD = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 10, reason="needs a Blackwell card"
)


def run_report(doctor: Any, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs of the kit, with what `halfbyte doctor` says of the machine."""
    return {"passed": bool(reports) and all(one["passed"] for one in reports), "doctor": doctor, "kernels": reports}


def judged(report: dict[str, Any], kernel: str, op: str, layers: str) -> dict[str, Any]:
    """The kit's report with what was run, and with the failures that were expected; those do not count."""
    scheme, why = DEVIATIONS.get(kernel, ("", "")) if op == "experts" and not layers else ("", "")
    failed = [row["check"] for row in report["checks"] if row["outcome"] == "failed"]
    expected = [name for name in failed if scheme and f"{kernel}-{scheme}-" in name and name.startswith(OF_VALUES)]
    return report | {
        "op": op,
        "layers": layers or "the kit's",
        "expected_deviations": dict.fromkeys(expected, why),
        "passed": bool(report["checks"]) and failed == expected,
    }


def fits(kernel: str, op: str, machine: Machine) -> bool:
    """Whether the spec of the kernel for this op is for this card."""
    own = [spec for spec in halfbyte_kernels() if (spec.id, spec.op) == (kernel, op)]
    return any(matches(pattern, machine) for spec in own for pattern in spec.devices)


@pytest.fixture(scope="session")
def reports(pytestconfig: pytest.Config) -> Iterator[list[dict[str, Any]]]:
    collected: list[dict[str, Any]] = []
    yield collected
    doctor = subprocess.run((sys.executable, "-m", "halfbyte", "doctor", "--json"), capture_output=True, check=False)
    text = json.dumps(run_report(json.loads(doctor.stdout or "null"), collected), indent=2)
    (pytestconfig.invocation_params.dir / "blackwell-report.json").write_text(text + "\n", encoding="utf-8")


@pytest.mark.blackwell
@NEEDS_A_CARD
@pytest.mark.timeout(3600)  # FlashInfer compiles its kernels at first use
@pytest.mark.parametrize(("kernel", "op", "layers"), RUNS)
def test_a_kernel_passes_the_kit_on_the_card(
    kernel: str, op: str, layers: str, reports: list[dict[str, Any]], tmp_path: Path
):
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    if not fits(kernel, op, Machine(name="here", arch=f"sm_{capability}")):
        pytest.skip(f"{kernel} for {op} does not run on sm_{capability}")
    plugins = ("-p", "halfbyte.conformance", *(("-p", "cuda_blackwell.experts_emulator.one_input") if layers else ()))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins)
    only = ("-k", "experts" if op == "experts" else "not experts")
    kit = ("--pyargs", "halfbyte.conformance", *only, "--kernel", kernel, "--report", str(tmp_path / "report.json"))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
    variables["PYTHONPATH"] = os.pathsep.join((str(TESTS), *filter(None, (os.environ.get("PYTHONPATH"),))))
    done = subprocess.run((*command, *kit), capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    if (tmp_path / "report.json").exists():
        report = judged(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), kernel, op, layers)
    else:
        report = {"kernels": [kernel], "op": op, "passed": False, "output": done.stdout + done.stderr}
    reports.append(report)
    assert report["passed"], done.stdout[-5000:]


def test_a_report_of_no_run_has_not_passed():
    assert not run_report(None, [])["passed"]
    assert run_report(None, [{"passed": True}])["passed"]
    assert not run_report(None, [{"passed": True}, {"passed": False}])["passed"]


@pytest.mark.parametrize(
    ("check", "op", "layers", "passed"),
    [
        ("test_it_is_right_for_outliers[flashinfer.trtllm-nvfp4-w4a4-bfloat16-256x256-silu]", "experts", "", True),
        ("test_it_is_right_for_outliers[flashinfer.trtllm-nvfp4-w4a4-bfloat16-256x256-silu]", "experts", "one", False),
        ("test_it_is_right_for_outliers[flashinfer.trtllm-nvfp4-w4a4-bfloat16-256x256]", "linear", "", False),
        ("test_it_is_right_for_outliers[flashinfer.trtllm-mxfp4-w4a4-bfloat16-256x256-silu]", "experts", "", False),
        ("test_the_same_call_twice_is_the_same[flashinfer.trtllm-nvfp4-w4a4-bfloat16]", "experts", "", False),
    ],
)
def test_only_the_deviation_that_is_expected_does_not_count(check: str, op: str, layers: str, passed: bool):
    report = judged({"checks": [{"check": check, "outcome": "failed"}]}, "flashinfer.trtllm", op, layers)
    assert report["passed"] == passed
    assert list(report["expected_deviations"]) == ([check] if passed else [])


def test_a_run_without_checks_has_not_passed():
    assert not judged({"checks": []}, "flashinfer.cutlass", "linear", "")["passed"]


def test_every_kernel_is_tried_on_some_card():
    machines = [Machine(name="a", arch=f"sm_{capability}") for capability in (90, 100, 103, 110, 120, 121)]
    assert all(any(fits(kernel, op, machine) for machine in machines) for kernel, op, _ in RUNS)
