"""The conformance kit over the emulated experts: our kernels pass, and every fault that is made on the way is found."""

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

from cuda_blackwell.test_hardware import judged

TESTS = Path(__file__).parents[1]
RIGHT = "test_it_is_right_for_every_number_of_tokens"
Kit = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def run_kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Run the kit's checks of experts in a process of its own; return what it says of each."""

    def run(capability: int, *kernels: str, only: str = "experts", **variables: str) -> list[dict[str, Any]]:
        report = tmp_path_factory.mktemp("report") / "report.json"
        names = [word for kernel in kernels for word in ("--kernel", f"flashinfer.{kernel}")]
        plugins = ("-p", "halfbyte.conformance", "-p", "cuda_blackwell.experts_emulator.kit")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "COV_"))}
        done = subprocess.run(
            (
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, "-k", only),
                *("--pyargs", "halfbyte.conformance", *names, "--device", "cpu", "--report", str(report)),
            ),
            capture_output=True,
            text=True,
            check=False,
            cwd=report.parent,
            env={
                **inherited,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(TESTS),
                "EMULATED_CAPABILITY": str(capability),
                **variables,
            },
            timeout=500,
        )
        assert report.exists(), done.stdout + done.stderr
        checks: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["checks"]
        return checks

    return run


def failed(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [check for check in checks if check["outcome"] == "failed"]


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [(90, "cutile"), (120, "cutile"), (100, "cutlass"), (120, "b12x-a16")],
)
def test_a_kernel_passes(run_kit: Kit, capability: int, kernel: str):
    checks = run_kit(capability, kernel)
    assert not failed(checks)
    assert sum(check["outcome"] == "passed" for check in checks) >= 30


@pytest.mark.parametrize(("capability", "kernel"), [(100, "trtllm"), (100, "cute-dsl"), (120, "b12x")])
def test_the_kit_as_it_is_fails_only_where_that_is_expected(run_kit: Kit, capability: int, kernel: str):
    """So these three are not declared to have passed it."""
    report = judged({"checks": run_kit(capability, kernel)}, f"flashinfer.{kernel}", "experts", "")
    assert report["passed"]
    assert report["expected_deviations"]


@pytest.mark.parametrize("kernel", ["trtllm", "cute-dsl"])
def test_a_kernel_that_quantizes_x_once_passes_where_the_experts_have_one_input_scale(run_kit: Kit, kernel: str):
    checks = run_kit(100, kernel, EMULATED_ONE_INPUT="1")
    assert not failed(checks)
    assert sum(check["outcome"] == "passed" for check in checks) >= 40


def test_b12x_passes_where_inputs_are_calibrated_or_have_no_global_scale(run_kit: Kit):
    checks = run_kit(120, "b12x", only="experts and not b12x-nvfp4-w4a16")
    assert not failed(checks)
    assert sum(check["outcome"] == "passed" for check in checks) >= 50


def test_the_kit_finds_a_fault(run_kit: Kit):
    """The others are tried in test_experts_faults.py, against the same tolerances."""
    only = f"{RIGHT} and silu and nvfp4"
    checks = run_kit(100, "cutlass", "cute-dsl", only=only, EMULATED_FAULT="swapped-gate-up", EMULATED_ONE_INPUT="1")
    assert {check["outcome"] for check in checks} == {"failed"}
