"""The conformance kit passes what is right, and fails what is not: once for each fault that it is there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.processes import python_path

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples/third_party_plugin"
KIT = ("-q", "-p", "no:cacheprovider", "-p", "halfbyte.conformance")

#: Fault of a kernel to a check that has to find it.
FOUND_BY = {
    "swapped-nibbles": "test_it_is_right_for_every_number_of_rows",
    "ignored-global-scale": "test_it_is_right_for_every_number_of_rows",
    "one-global-scale": "test_shards_keep_their_own_global_scales",
    "ignored-bias": "test_it_adds_the_bias",
    "last-tile-missing": "test_it_is_right_for_every_number_of_rows",
    "clamped-scales": "test_it_is_right_for_special_weights",
    "other-rounding": "test_it_is_right_for_every_number_of_rows",
    "quantizes-secretly": "test_it_is_right_for_every_number_of_rows",
    "half-precision": "test_it_is_right_for_every_number_of_rows",
    "changes-weights": "test_prepare_changes_nothing_and_gives_the_same_twice",
    "keeps-weights": "test_prepare_changes_nothing_and_gives_the_same_twice",
    "float8-tensors": "test_packed_weights_are_what_the_contract_asks_for",
    "hidden-copies": "test_packed_weights_are_what_the_contract_asks_for",
    "random-noise": "test_a_result_is_repeatable_and_stays",
    "reused-result": "test_a_result_is_repeatable_and_stays",
    "changes-input": "test_a_result_is_repeatable_and_stays",
    "other-strides": "test_the_linear_operator_passes_opcheck",
    "own-input-back": "test_the_linear_operator_passes_opcheck",
    "leaves-the-device": "test_it_is_right_for_every_number_of_rows",
    "check-that-raises": "test_its_check_answers_for_every_machine_and_twice_the_same",
    "heavy-plugin": "test_its_plugin_imports_neither_torch_nor_what_its_kernels_require",
    "gate-for-up": "test_it_is_right_for_every_number_of_tokens",
    "ignored-router-weights": "test_it_is_right_for_every_number_of_tokens",
    "ignored-expert-bias": "test_it_adds_the_biases_of_the_experts",
    "global-numbers": "test_experts_elsewhere_add_nothing",
    "first-expert-only": "test_it_is_right_for_every_number_of_tokens",
    "wrong-activation": "test_it_is_right_for_every_number_of_tokens",
    "one-scale-for-both": "test_it_is_right_for_every_number_of_tokens",
    "largest-input-scale": "test_it_is_right_for_every_number_of_tokens",
    "largest-hidden-scale": "test_it_is_right_for_every_number_of_tokens",
    "other-input-scale": "test_it_is_right_for_every_number_of_tokens",
}
#: Kernels without a fault: the one that all faults are made of, and those that insist on what the kit promises them.
RIGHT = ("no-fault", "one-input-scale", "one-input-scale-for-x", "fixed-input-scale")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the kit said."""

    code: int
    output: str
    report: dict[str, Any]

    def failed(self, kernel: str) -> set[str]:
        """The checks that the kernel failed, without their cases."""
        checks = self.report["checks"]
        failed = (row["check"] for row in checks if row["outcome"] == "failed" and f"[{kernel}-" in row["check"])
        return {check.partition("[")[0] for check in failed}

    def passed(self, kernel: str) -> set[str]:
        """The checks that it passed in at least one case."""
        checks = self.report["checks"]
        passed = (row["check"] for row in checks if row["outcome"] == "passed" and f"[{kernel}-" in row["check"])
        return {check.partition("[")[0] for check in passed}


@pytest.fixture(scope="session")
def run_kit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run the kit in a process of its own, in which the plugins of these tests are installed."""
    site = tmp_path_factory.mktemp("site")
    _install(site, "halfbyte-mutants", mutants="halfbyte_mutants.plugin", heavy="halfbyte_mutants.heavy")
    _install(site, "outsider-fp4", outsider="outsider_fp4.plugin")
    path = python_path(site, HERE, EXAMPLE / "src")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HALFBYTE_", "COV_"))}

    def run(*arguments: str, kernels: tuple[str, ...]) -> Run:
        report = tmp_path_factory.mktemp("report") / "report.json"
        names = [word for kernel in kernels for word in ("--kernel", kernel)]
        options = ("--device", "cpu", "--report", str(report))
        command = (
            sys.executable,
            "-m",
            "pytest",
            *KIT,
            *arguments,
            "--pyargs",
            "halfbyte.conformance",
            *names,
            *options,
        )
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=report.parent,
            env={**variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        written = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        return Run(done.returncode, done.stdout + done.stderr, written)

    return run


def _install(site: Path, name: str, **plugins: str) -> None:
    """Write what an installer would write about a distribution with these entry points."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "\n".join(f"{plugin} = {module}" for plugin, module in plugins.items())
    (info / "entry_points.txt").write_text(f"[halfbyte]\n{lines}\n", encoding="utf-8")


@pytest.fixture(scope="session")
def mutants(run_kit: Callable[..., Run]) -> Run:
    """One run over all kernels with a fault, and those without."""
    return run_kit(kernels=tuple(f"mutant.{name}" for name in (*RIGHT, *FOUND_BY)))


@pytest.mark.parametrize("kernel", ["reference", "dequantized", "outsider.lut"])
def test_a_right_kernel_passes(run_kit: Callable[..., Run], kernel: str) -> None:
    run = run_kit("-W", "error", kernels=(kernel,))
    assert run.code == 0, run.output
    assert run.report["passed"]
    assert run.report["kernels"] == [kernel]
    assert run.report["machine"]["arch"] == "cpu"
    assert len(run.passed(kernel)) >= 20


@pytest.mark.parametrize("kernel", RIGHT)
def test_a_kernel_without_a_fault_passes(mutants: Run, kernel: str) -> None:
    assert not mutants.failed(f"mutant.{kernel}")
    assert "test_it_is_right_for_every_number_of_tokens" in mutants.passed(f"mutant.{kernel}")


def test_the_kernel_that_all_faults_are_made_of_passes_what_finds_them(mutants: Run) -> None:
    assert set(FOUND_BY.values()) <= mutants.passed("mutant.no-fault")


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_fault_is_found(mutants: Run, fault: str) -> None:
    assert mutants.code == 1
    assert not mutants.report["passed"]
    assert FOUND_BY[fault] in mutants.failed(f"mutant.{fault}")


def test_every_fault_has_a_check_that_finds_it() -> None:
    source = (HERE / "halfbyte_mutants/plugin.py").read_text(encoding="utf-8")
    declared = {line.split('"')[1] for line in source.splitlines() if line.startswith('    "')}
    assert declared - set(RIGHT) == set(FOUND_BY) - {"check-that-raises", "heavy-plugin"}


def test_a_kernel_that_cannot_run_here_fails_once_and_says_why(run_kit: Callable[..., Run]) -> None:
    run = run_kit(kernels=("mutant.vendor-library",))
    assert run.code == 1
    assert run.failed("mutant.vendor-library") == {"test_it_runs_every_declared_scheme_and_dtype_on_this_machine"}
    assert "package-missing" in run.output


def test_a_double_of_a_vendors_library_takes_its_place(run_kit: Callable[..., Run]) -> None:
    run = run_kit("-p", "halfbyte_mutants.testing", kernels=("mutant.vendor-library",))
    assert run.code == 0, run.output
    assert run.report["machine"]["arch"] == "sm_100"
    assert run.report["device"] == "cpu"


def test_an_unknown_kernel_is_a_usage_error_with_the_nearest_one(run_kit: Callable[..., Run]) -> None:
    run = run_kit(kernels=("referense",))
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert "did you mean 'reference'?" in run.output


def test_no_kernel_is_a_usage_error(run_kit: Callable[..., Run]) -> None:
    run = run_kit(kernels=())
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert "--kernel ID" in run.output
