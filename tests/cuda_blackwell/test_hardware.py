"""Level 4: `pytest -m blackwell` on a machine with a card runs the conformance kit for all kernels that it can run.

What came out is in blackwell-report.json where pytest was started: machine, versions, and the outcome of every check,
for linear layers and experts separately.
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
from support.processes import python_path

TESTS = Path(__file__).parents[1]
KERNELS = sorted((spec.id, spec.op) for spec in halfbyte_kernels())
NEEDS_A_CARD = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 10, reason="needs a Blackwell card"
)


def run_report(doctor: Any, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs of the kit, with what `halfbyte doctor` says of the machine."""
    return {"passed": bool(reports) and all(one["passed"] for one in reports), "doctor": doctor, "kernels": reports}


def judged(report: dict[str, Any], op: str) -> dict[str, Any]:
    """The kit's report with the op that was run, and whether all checks passed."""
    failed = any(row["outcome"] == "failed" for row in report["checks"])
    return report | {"op": op, "passed": bool(report["checks"]) and not failed}


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
@pytest.mark.parametrize(("kernel", "op"), KERNELS)
def test_a_kernel_passes_the_kit_on_the_card(kernel: str, op: str, reports: list[dict[str, Any]], tmp_path: Path):
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    if not fits(kernel, op, Machine(name="here", arch=f"sm_{capability}")):
        pytest.skip(f"{kernel} for {op} does not run on sm_{capability}")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "halfbyte.conformance")
    only = ("-k", "experts" if op == "experts" else "not experts")
    kit = ("--pyargs", "halfbyte.conformance", *only, "--kernel", kernel, "--report", str(tmp_path / "report.json"))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HALFBYTE_")}
    variables["PYTHONPATH"] = python_path(TESTS)
    done = subprocess.run((*command, *kit), capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    if (tmp_path / "report.json").exists():
        report = judged(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), op)
    else:
        report = {"kernels": [kernel], "op": op, "passed": False, "output": done.stdout + done.stderr}
    reports.append(report)
    assert report["passed"], done.stdout[-5000:]


def test_a_report_of_no_run_has_not_passed():
    assert not run_report(None, [])["passed"]
    assert run_report(None, [{"passed": True}])["passed"]
    assert not run_report(None, [{"passed": True}, {"passed": False}])["passed"]


@pytest.mark.parametrize(
    ("outcomes", "passed"), [((), False), (("passed", "skipped"), True), (("passed", "failed"), False)]
)
def test_a_run_has_passed_if_it_has_checks_and_none_failed(outcomes: tuple[str, ...], passed: bool):
    report = judged({"checks": [{"check": "one", "outcome": outcome} for outcome in outcomes]}, "experts")
    assert report["passed"] == passed


def test_every_kernel_is_tried_on_some_card():
    machines = [Machine(name="a", arch=f"sm_{capability}") for capability in (90, 100, 103, 110, 120, 121)]
    assert all(any(fits(kernel, op, machine) for machine in machines) for kernel, op in KERNELS)
