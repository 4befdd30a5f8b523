"""What only an Intel GPU can show: `pytest -m xpu` there, and send xpu-report.json back (docs/xpu.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.decisions import machine_here
from halfbyte.doctor import diagnosis_data, examine
from halfbyte.eligibility import refusals_for
from halfbyte.machines import Machine
from halfbyte.plugins import available_kernels
from halfbyte.specs import KernelSpec
from halfbyte_xpu.ops import quantize_mxfp4

pytestmark = [pytest.mark.xpu, pytest.mark.skipif(not torch.xpu.is_available(), reason="needs an Intel GPU")]

REPORT = Path("xpu-report.json")
KERNELS = ("reference", "dequantized", "xpu.fp4-gemm", "xpu.fused-moe", "xpu.scaled-mm", "xpu.ipex")


@pytest.fixture(scope="module")
def machine() -> Machine:
    return machine_here("xpu")


@pytest.fixture(scope="module")
def report(machine: Machine):
    """Everything that is known at the end, written where pytest was started."""
    known: dict[str, Any] = {"doctor": diagnosis_data(examine()), "machine": machine.to_dict(), "kernels": {}}
    yield known
    REPORT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def not_here(spec: KernelSpec, machine: Machine) -> list[str]:
    """Why the kernel cannot run on this machine at all."""
    from halfbyte.conformance.cases import experts_settings, linear_settings
    from halfbyte.conformance.test_declaration import problem_of

    case = next(iter(linear_settings(spec) if spec.op == "linear" else experts_settings(spec)))
    refusals = refusals_for(spec, problem_of(case), machine)
    return [f"{refusal}; {refusal.hint}" for refusal in refusals if refusal.code.phase == "machine"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_passes_the_whole_kit(kernel: str, report, machine: Machine, tmp_path: Path):
    refusals = [line for _, spec in available_kernels() if spec.id == kernel for line in not_here(spec, machine)]
    if refusals:
        report["kernels"][kernel] = {"refused": refusals}
        pytest.skip("; ".join(refusals))
    file = tmp_path / "report.json"
    words = ["-q", "-p", "no:cacheprovider", "-p", "halfbyte.conformance", "--pyargs", "halfbyte.conformance"]
    words += ["--kernel", kernel, "--device", "xpu", "--report", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ,
    )
    output = done.stdout + done.stderr
    kit = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report["kernels"][kernel] = {"code": done.returncode, "end": output[-4000:], "kit": kit}
    assert done.returncode == 0, output


def test_the_quantizer_gives_the_documented_bits_for_every_amax(report):
    from halfbyte import numerics
    from halfbyte.formats import MXFP4
    from halfbyte_xpu.vllm_kernels.library import load
    from halfbyte_xpu.vllm_kernels.schemas import LINEAR_OPS

    try:
        load(LINEAR_OPS)
    except ImportError as error:
        pytest.skip(f"vllm-xpu-kernels does not load: {error}")
    numbers = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = (numbers.double()[:, None] * torch.linspace(-1, 1, 32, dtype=torch.float64)).to(torch.bfloat16)
    packed, scales = (tensor.cpu() for tensor in quantize_mxfp4(x.to("xpu")))
    values, codes = numerics.quantize(x, MXFP4, scale_rule="ceil", ties="toward-zero")
    at_least = codes >= 94  # smaller ones are raised to 2**-33, and other codes with them
    differ = scales != codes.clamp(min=94)
    wrong = numerics.decode_packed(packed) != numerics.decode_packed(values)
    report["quantizer"] = {
        "scales that differ": int(differ.sum()),
        "first": numbers[differ.any(1)][:8].tolist(),
        "codes that differ": int((wrong & at_least.repeat_interleave(32, -1)).sum()),
    }
    assert not differ.any()
    assert not (wrong & at_least.repeat_interleave(32, -1)).any()
