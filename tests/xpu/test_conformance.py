"""The whole conformance kit over the doubles passes, and fails for each fault in them or in our use of them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
#: Fault to (kernel, a check that has to find it).
FOUND_BY = {
    "zeros": [
        ("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows"),
        ("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens"),
    ],
    "untransposed-scales": [("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows")],
    "untransposed-shape": [("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows")],
    "swapped-nibbles": [
        ("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows"),
        ("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens"),
        ("xpu.scaled-mm", "test_it_is_right_for_every_number_of_rows"),
    ],
    "exponents-off-by-one": [("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows")],
    "weight-exponents-off-by-one": [
        ("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows"),
        ("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens"),
    ],
    "round-half-even": [("xpu.fp4-gemm", "test_it_is_right_for_every_number_of_rows")],
    "uint8-experts": [("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens")],
    "up-gate": [("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens")],
    "experts-scales-transposed": [("xpu.fused-moe", "test_it_is_right_for_every_number_of_tokens")],
    "dropped-global-scale": [("xpu.scaled-mm", "test_it_is_right_for_every_number_of_rows")],
    "input-global-scale": [("xpu.scaled-mm", "test_it_is_right_for_every_number_of_rows")],
    "unshuffled-nibbles": [
        ("xpu.ipex", "test_it_is_right_for_every_number_of_rows"),
        ("xpu.ipex", "test_it_is_right_for_every_number_of_tokens"),
    ],
}


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    report: dict[str, Any]

    def checks(self, outcome: str, kernel: str) -> set[str]:
        """The checks with this outcome, without their cases."""
        names = [row["check"] for row in self.report["checks"] if row["outcome"] == outcome]
        return {name.partition("[")[0] for name in names if f"[{kernel}-" in name}


def run_kit(folder: Path, plugin: str, *kernels: str, only: str = "", **variables: str) -> Run:
    report = folder / "report.json"
    words = ["-q", "-W", "error", "-p", "no:cacheprovider", "-p", "halfbyte.conformance", "-p", plugin]
    words += ["--pyargs", "halfbyte.conformance", "--report", str(report)]
    words += [word for kernel in kernels for word in ("--kernel", kernel)]
    words += ["-k", only] if only else []
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "COV_", "VLLM_"))}
    environ = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environ,
        timeout=300,
    )
    written = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return Run(done.returncode, done.stdout + done.stderr, written)


@pytest.mark.parametrize("kernel", ["xpu.fp4-gemm", "xpu.fused-moe", "xpu.scaled-mm", "xpu.ipex"])
def test_a_kernel_passes_the_whole_kit_over_the_doubles(kernel: str, tmp_path: Path):
    run = run_kit(tmp_path, "halfbyte_xpu.testing", kernel)
    assert run.code == 0, run.output
    assert run.report["passed"]
    assert run.report["kernels"] == [kernel]
    assert (run.report["machine"]["arch"], run.report["device"]) == ("xpu-bmg", "cpu")
    assert len(run.checks("passed", kernel)) >= 20


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_fault_is_found(fault: str, tmp_path: Path):
    kernels = dict.fromkeys(kernel for kernel, _ in FOUND_BY[fault])
    run = run_kit(tmp_path, "xpu_mutants", *kernels, only="every_number", XPU_MUTANT=fault)
    assert run.code == 1, run.output
    for kernel, check in FOUND_BY[fault]:
        assert check in run.checks("failed", kernel)


def test_what_the_faults_are_put_into_passes(tmp_path: Path):
    kernels = ("xpu.fp4-gemm", "xpu.fused-moe", "xpu.scaled-mm", "xpu.ipex")
    run = run_kit(tmp_path, "xpu_mutants", *kernels, only="every_number", XPU_MUTANT="none")
    assert run.code == 0, run.output
    assert all(run.checks("passed", kernel) for kernel in kernels)
