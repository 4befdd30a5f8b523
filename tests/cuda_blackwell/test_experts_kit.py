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

from halfbyte.specs import Proof
from halfbyte_cuda_blackwell.experts_specs import EXPERTS
from support.processes import python_path

TESTS = Path(__file__).parents[1]
RIGHT = "test_it_is_right_for_every_number_of_tokens"
Kit = Callable[..., list[dict[str, Any]]]
#: Capability and kernel of every run of the kit.
PASSES = [
    (90, "cutile"),
    (120, "cutile"),
    (100, "cutlass"),
    (100, "cute-dsl"),
    (100, "cute-dsl-a16"),
    (100, "trtllm"),
    (120, "b12x"),
    (120, "b12x-a16"),
]


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
                "PYTHONPATH": python_path(TESTS),
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


@pytest.mark.parametrize(("capability", "kernel"), PASSES)
def test_a_kernel_passes(run_kit: Kit, capability: int, kernel: str):
    checks = run_kit(capability, kernel)
    assert not failed(checks)
    assert sum(check["outcome"] == "passed" for check in checks) >= 30


def test_every_kernel_that_is_declared_to_pass_over_a_double_is_tried():
    declared = {spec.id for spec in EXPERTS if Proof.CONTRACT_DOUBLE in dict(spec.proofs).values()}
    assert declared == {f"flashinfer.{kernel}" for _, kernel in PASSES}


def test_the_kit_finds_a_fault(run_kit: Kit):
    """The others are tried in test_experts_faults.py, against the same tolerances."""
    only = f"{RIGHT} and silu and nvfp4"
    checks = run_kit(100, "cutlass", "cute-dsl", only=only, EMULATED_FAULT="swapped-gate-up")
    assert {check["outcome"] for check in checks} == {"failed"}
