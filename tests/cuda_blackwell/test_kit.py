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

import torch

from cuda_blackwell.flashinfer_emulator.faults import FAULTS
from cuda_blackwell.flashinfer_emulator.patches import emulated
from halfbyte.conformance import test_linear as checks
from halfbyte.conformance.cases import linear_settings
from halfbyte.conformance.environment import Environment
from halfbyte.conformance.subject import Subject
from halfbyte.machines import describe
from halfbyte_cuda_blackwell.linear_specs import LINEAR
from support.processes import python_path

TESTS = Path(__file__).parents[1]
EMULATOR = "cuda_blackwell.flashinfer_emulator.kit"
KERNELS = {
    100: ("cutlass", "cudnn", "trtllm", "cute-dsl", "bf16-fp4"),
    110: ("cutlass", "bf16-fp4"),
    120: ("b12x", "cudnn", "bf16-fp4"),
}


@pytest.fixture(scope="session")
def run_kit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the kit's linear checks in a process of its own; return its report."""

    def run(capability: int, *kernels: str) -> dict[str, Any]:
        report = tmp_path_factory.mktemp("report") / "report.json"
        names = [word for kernel in kernels for word in ("--kernel", f"flashinfer.{kernel}")]
        plugins = ("-p", "no:cacheprovider", "-p", "halfbyte.conformance", "-p", EMULATOR)
        own = {"EMULATED_CAPABILITY": str(capability), "OMP_NUM_THREADS": "1"}
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "COV_"))}
        command = (
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *plugins,
            "--pyargs",
            "halfbyte.conformance",
            "-k",
            "not experts",
        )
        done = subprocess.run(
            (*command, *names, "--device", "cpu", "--report", str(report)),
            capture_output=True,
            text=True,
            check=False,
            cwd=report.parent,
            env={**variables, **own, "PYTHONPATH": python_path(TESTS)},
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


FOUND = [
    ("swapped-nibbles", ("cutlass", "trtllm", "bf16-fp4")),
    ("linear-scales", ("cutlass", "trtllm", "bf16-fp4")),
    ("unshuffled-rows", ("trtllm",)),
    ("rows-after-the-swizzle", ("trtllm",)),
    ("inverted-global-scale", ("cutlass", "trtllm", "bf16-fp4")),
]


def settings_of(kernel: str) -> list[Subject]:
    """What the kit tries the kernel on, over the emulated library."""
    spec = next(spec for spec in LINEAR if spec.id == f"flashinfer.{kernel}")
    environment = Environment(machine=describe("sm_100"), device=torch.device("cpu"))
    return [Subject(case, environment) for case in linear_settings(spec)]


@pytest.mark.parametrize(("fault", "kernel"), [(fault, kernel) for fault, kernels in FOUND for kernel in kernels])
def test_a_fault_is_found(fault: str, kernel: str):
    with emulated(100):
        for subject in settings_of(kernel):
            checks.test_it_is_right_for_every_number_of_rows(subject)
            with FAULTS[fault](), pytest.raises((AssertionError, RuntimeError)):
                checks.test_it_is_right_for_every_number_of_rows(subject)


def test_every_fault_is_tried():
    assert {fault for fault, _ in FOUND} == set(FAULTS)
