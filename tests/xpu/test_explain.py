"""What `explain` says for every described Intel GPU, scheme and op, against golden files.

UPDATE_GOLDEN=1 pytest tests/xpu/test_explain.py writes them anew.
"""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from halfbyte.cli import main
from halfbyte.machines import XPU_FAMILIES
from halfbyte.schemes import SCHEMES

GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "linear": ("--shape", "4096x4096"),
    "experts": ("--experts", "8", "--top-k", "2", "--hidden", "2048", "--intermediate", "1024"),
}


def explain(*arguments: str):
    return json.loads(CliRunner().invoke(main, ["explain", *arguments, "--json"]).stdout)


def told(op: str, scheme: str, machine: str):
    """The choice, and what became of our kernels and the built-in ones; other plugins' are theirs to test."""
    answer = explain("--op", op, "--scheme", scheme, *SIZES[op], "--machine", machine)
    return {
        "selected": answer["selected"],
        "candidates": [
            {
                "kernel": candidate["kernel"],
                "state": candidate["state"],
                "fidelity": candidate["fidelity"],
                "proof": candidate["proof"],
                "refusals": [f"{refusal['code']}: {refusal['detail']}" for refusal in candidate["refusals"]],
            }
            for candidate in answer["candidates"]
            if candidate["plugin"] in ("halfbyte", "xpu")
        ],
    }


@pytest.mark.parametrize("family", XPU_FAMILIES)
def test_every_answer_is_the_golden_one(family: str):
    machine = f"xpu-{family}"
    found = {f"{op} {scheme}": told(op, scheme, machine) for op in SIZES for scheme in SCHEMES}
    file = GOLDEN / f"{machine}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["pvc", "bmg", "lnl", "ptl"])
def test_the_documented_kernels_are_chosen(family: str):
    chosen = {
        (op, scheme): told(op, scheme, f"xpu-{family}")["selected"]
        for op in ("linear", "experts")
        for scheme in SCHEMES
    }
    assert chosen == {
        ("linear", "mxfp4-w4a4"): "xpu.fp4-gemm",
        ("linear", "nvfp4-w4a4"): "xpu.scaled-mm",
        ("linear", "mxfp4-w4a16"): "dequantized",
        ("linear", "nvfp4-w4a16"): "dequantized",
        ("experts", "mxfp4-w4a16"): "xpu.fused-moe",
        ("experts", "mxfp4-w4a4"): "xpu.fused-moe",
        ("experts", "nvfp4-w4a16"): "dequantized",
        ("experts", "nvfp4-w4a4"): "dequantized",
    }


@pytest.mark.parametrize(("family", "name"), [("acm", "Alchemist"), ("mtl", "Meteor Lake"), ("arl", "Arrow Lake")])
def test_older_families_are_refused_with_the_reason(family: str, name: str):
    for op in SIZES:
        answer = told(op, "mxfp4-w4a4", f"xpu-{family}")
        assert answer["selected"] == "dequantized"
        ours = [candidate for candidate in answer["candidates"] if candidate["kernel"].startswith("xpu.")]
        assert ours
        for candidate in ours:
            assert candidate["state"] == "ineligible"
            assert any(name in refusal for refusal in candidate["refusals"])


def test_no_kernel_claims_to_have_run_on_hardware():
    for family in XPU_FAMILIES:
        for op in SIZES:
            candidates = told(op, "mxfp4-w4a4", f"xpu-{family}")["candidates"]
            assert all(candidate["proof"] != "hardware" for candidate in candidates)


def test_libraries_that_are_too_old_are_refused(tmp_path: Path):
    file = tmp_path / "card.toml"
    file.write_text(
        'arch = "xpu-bmg"\n[packages]\nvllm-xpu-kernels = "0.1.11"\ntorch = "2.13.0+xpu"\n', encoding="utf-8"
    )
    answer = told("linear", "mxfp4-w4a4", str(file))
    codes = {
        candidate["kernel"]: [r.partition(":")[0] for r in candidate["refusals"]] for candidate in answer["candidates"]
    }
    assert answer["selected"] == "dequantized"
    assert codes["xpu.fp4-gemm"] == codes["xpu.scaled-mm"] == ["package-version"]
    assert "package-missing" in codes["xpu.ipex"]


def test_quantizing_activations_of_a_w4a16_checkpoint_is_blocked_unless_allowed(monkeypatch):
    arguments = ("--op", "linear", "--scheme", "mxfp4-w4a16", *SIZES["linear"], "--machine", "xpu-bmg")
    assert explain(*arguments)["selected"] == "dequantized"
    monkeypatch.setenv("HALFBYTE_ACTIVATIONS", "allow-quantized")
    assert explain(*arguments)["selected"] == "xpu.fp4-gemm"
