"""What only an Intel GPU can show: `pytest -m xpu` there, and send xpu-report.json back (docs/xpu.md).

No vendor's library is loaded into this process: one that does not fit may end it.
"""

from pathlib import Path

import pytest
import torch

from halfbyte.decisions import machine_here
from halfbyte.doctor import diagnosis_data, examine
from halfbyte.eligibility import refusals_for
from halfbyte.machines import Machine
from halfbyte.plugins import available_kernels
from halfbyte.specs import KernelSpec
from xpu.card_report import Report, read_json, run_part

pytestmark = [pytest.mark.xpu, pytest.mark.skipif(not torch.xpu.is_available(), reason="needs an Intel GPU")]

KERNELS = ("reference", "dequantized", "xpu.fp4-gemm", "xpu.fused-moe", "xpu.scaled-mm", "xpu.ipex")
#: What an entry is until its part has ended.
STARTED = {"state": "started, and did not end"}


@pytest.fixture(scope="module")
def machine() -> Machine:
    return machine_here("xpu")


@pytest.fixture(scope="module")
def report(machine: Machine, pytestconfig: pytest.Config) -> Report:
    """Written where pytest was started."""
    known = {"doctor": diagnosis_data(examine()), "machine": machine.to_dict(), "kernels": {}}
    return Report(pytestconfig.invocation_params.dir / "xpu-report.json", known)


def not_here(spec: KernelSpec, machine: Machine) -> list[str]:
    """Why the kernel cannot run on this machine at all."""
    from halfbyte.conformance.cases import experts_settings, linear_settings
    from halfbyte.conformance.test_declaration import problem_of

    case = next(iter(linear_settings(spec) if spec.op == "linear" else experts_settings(spec)))
    refusals = refusals_for(spec, problem_of(case), machine)
    return [f"{refusal}; {refusal.hint}" for refusal in refusals if refusal.code.phase == "machine"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_passes_the_whole_kit(kernel: str, report: Report, machine: Machine, tmp_path: Path):
    refusals = [line for _, spec in available_kernels() if spec.id == kernel for line in not_here(spec, machine)]
    if refusals:
        refusals = list(dict.fromkeys(refusals))  # linear and experts may have the same
        report.record({"refused": refusals}, "kernels", kernel)
        pytest.skip("; ".join(refusals))
    report.record(STARTED, "kernels", kernel)
    file = tmp_path / "report.json"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "halfbyte.conformance"]
    words += ["--pyargs", "halfbyte.conformance", "--kernel", kernel, "--device", "xpu", "--report", str(file)]
    entry = run_part(words, tmp_path, limit_s=3500)
    report.record({**entry, "kit": read_json(file)}, "kernels", kernel)
    assert entry["code"] == 0, entry


def test_the_quantizer_gives_the_documented_bits_for_every_amax(report: Report, tmp_path: Path):
    report.record(STARTED, "quantizer")
    file = tmp_path / "quantizer.json"
    entry = run_part([str(Path(__file__).with_name("quantizer.py")), str(file)], tmp_path, limit_s=500)
    result = read_json(file)
    report.record({**entry, **result}, "quantizer")
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert entry["code"] == 0, entry
    assert (result["scales that differ"], result["codes that differ"]) == (0, 0), result
