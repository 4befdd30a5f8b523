"""The conformance kit over the emulated library: our kernels pass, and every fault that is made on the way is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

TESTS = Path(__file__).parents[1]
EMULATOR = "cuda_blackwell.flashinfer_emulator.kit"
KERNELS = {
    100: ("cutlass", "cudnn", "trtllm", "cute-dsl", "bf16-fp4"),
    110: ("cutlass", "bf16-fp4"),
    120: ("b12x", "cudnn", "bf16-fp4"),
}
RIGHT = "test_it_is_right_for_every_number_of_rows"


@pytest.fixture(scope="session")
def run_kit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the kit's linear checks in a process of its own; return its report."""

    def run(capability: int, *kernels: str, fault: str = "none", only: str = "not experts") -> dict[str, Any]:
        report = tmp_path_factory.mktemp("report") / "report.json"
        names = [word for kernel in kernels for word in ("--kernel", f"flashinfer.{kernel}")]
        plugins = ("-p", "no:cacheprovider", "-p", "halfbyte.conformance", "-p", EMULATOR)
        own = {"EMULATED_CAPABILITY": str(capability), "EMULATED_FAULT": fault, "OMP_NUM_THREADS": "1"}
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "COV_"))}
        command = (sys.executable, "-m", "pytest", "-q", *plugins, "--pyargs", "halfbyte.conformance", "-k", only)
        done = subprocess.run(
            (*command, *names, "--device", "cpu", "--report", str(report)),
            capture_output=True,
            text=True,
            check=False,
            cwd=report.parent,
            env={**variables, **own, "PYTHONPATH": str(TESTS)},
            timeout=500,
        )
        assert report.exists(), done.stdout + done.stderr
        return json.loads(report.read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize("capability", KERNELS)
def test_the_linear_kernels_pass_the_kit(run_kit: Callable[..., dict[str, Any]], capability: int):
    report = run_kit(capability, *KERNELS[capability])
    failed = [row for row in report["checks"] if row["outcome"] == "failed"]
    assert not failed
    assert report["machine"]["arch"] == f"sm_{capability}"
    for kernel in KERNELS[capability]:
        passed = [row for row in report["checks"] if f"flashinfer.{kernel}-" in row["check"]]
        assert len(passed) >= 20, kernel


@pytest.mark.parametrize(
    ("fault", "kernels"),
    [
        ("swapped-nibbles", ("cutlass", "bf16-fp4")),
        ("linear-scales", ("cutlass", "bf16-fp4")),
        ("unshuffled-rows", ("trtllm",)),
        ("rows-after-the-swizzle", ("trtllm",)),
        ("inverted-global-scale", ("cutlass",)),
    ],
)
def test_a_fault_is_found(run_kit: Callable[..., dict[str, Any]], fault: str, kernels: tuple[str, ...]):
    report = run_kit(100, *kernels, fault=fault, only=f"{RIGHT} and not experts")
    for kernel in kernels:
        outcomes = {row["outcome"] for row in report["checks"] if f"flashinfer.{kernel}-" in row["check"]}
        assert outcomes == {"failed"}, (kernel, outcomes)


def test_no_fault_is_found_where_there_is_none(run_kit: Callable[..., dict[str, Any]]):
    report = run_kit(100, "cutlass", "trtllm", "bf16-fp4", only=f"{RIGHT} and not experts")
    assert {row["outcome"] for row in report["checks"]} == {"passed"}
