"""What the declarations refuse of problems, builds and wheels, by metadata and bytes alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.decisions import decide
from halfbyte.eligibility import refusals_for
from halfbyte.machines import describe
from halfbyte.policies import Policy
from halfbyte.problems import ExpertsProblem, LinearProblem
from halfbyte.refusals import Code
from halfbyte.schemes import MXFP4_W4A4, MXFP4_W4A16
from halfbyte_xpu.ipex.specs import SPECS as IPEX
from halfbyte_xpu.ipex.specs import mismatches
from halfbyte_xpu.plugin import halfbyte_kernels
from halfbyte_xpu.vllm_kernels import schemas
from halfbyte_xpu.vllm_kernels.specs import SPECS as VLLM

LINEAR = LinearProblem(scheme=MXFP4_W4A16, n=64, k=64)
EXPERTS = ExpertsProblem(scheme=MXFP4_W4A16, experts=8, top_k=2, hidden=64, intermediate=64)
BMG = describe("xpu-bmg")
GEMM, MOE = VLLM


def codes(spec, problem, machine=BMG) -> set[Code]:
    return {refusal.code for refusal in refusals_for(spec, problem, machine)}


def test_ids_and_ops_are_those_of_the_issue():
    assert [(spec.id, spec.op) for spec in halfbyte_kernels()] == [
        ("xpu.fp4-gemm", "linear"),
        ("xpu.fused-moe", "experts"),
        ("xpu.scaled-mm", "linear"),
        ("xpu.ipex", "linear"),
        ("xpu.ipex", "experts"),
    ]


@pytest.mark.parametrize(("top_k", "fits"), [(1, True), (3, False), (5, False), (8, True), (10, True), (12, False)])
def test_experts_for_each_token_are_those_that_kernels_are_compiled_for(top_k: int, fits: bool):
    assert (Code.LIMIT in codes(MOE, replace(EXPERTS, top_k=top_k))) != fits


def test_there_are_at_most_1024_local_experts():
    assert Code.LIMIT not in codes(MOE, replace(EXPERTS, experts=1024))
    assert Code.LIMIT in codes(MOE, replace(EXPERTS, experts=1025))


def test_float32_is_refused():
    assert Code.DTYPE in codes(MOE, replace(EXPERTS, dtype="float32"))
    assert Code.DTYPE in codes(GEMM, replace(LINEAR, scheme=MXFP4_W4A4, dtype="float32"))


@pytest.mark.parametrize(
    ("ipex", "torch", "words"),
    [
        ("2.8.0", "2.8.0", ["CPU build"]),
        ("2.8.0+cpu", "2.8.0", ["CPU build"]),
        ("2.8.10+xpu", "2.8.0+xpu", ["too old"]),
        ("2.9.10+xpu", "2.9.0+xpu", ["too old"]),
        ("2.10.10+git6d3ba89", "2.10.0+xpu", ["does not say"]),
        ("2.10.10+cpu", "2.10.0+cpu", ["CPU build"]),
        ("2.10.10+xpu", "2.10.0+xpu", []),
        ("2.10.10+xpu", "2.13.0+xpu", ["cannot be imported"]),
        ("2.8.0", "2.13.0+cpu", ["CPU build", "cannot be imported"]),
    ],
)
def test_a_build_of_ipex_is_judged_by_its_version_alone(ipex: str, torch: str, words: list[str]):
    found = mismatches(ipex, torch)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    machine = BMG.with_packages({"intel-extension-for-pytorch": ipex, "torch": torch})
    for spec, problem in zip(IPEX, (LINEAR, EXPERTS), strict=True):
        assert (Code.PACKAGE_VERSION in codes(spec, problem, machine)) == bool(words)


def test_ipex_is_never_chosen_by_itself_and_says_that_it_is_dead():
    kernels = [("xpu", spec) for spec in IPEX]
    answer = decide(LINEAR, BMG, kernels)
    assert answer.selected is None
    refusals = {refusal.code: refusal.detail for refusal in answer.candidates[0].refusals}
    assert "end of life" in refusals[Code.KNOWN_BAD]
    assert Code.OPT_IN in refusals
    required = decide(LINEAR, BMG, kernels, [Policy(require="xpu.ipex")])
    assert required.chosen().spec is IPEX[0]


class Wheel:
    """An installed distribution, as far as schemas.faults looks at one."""

    version = "0.1.16.2"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch):
    """A wheel with the schemas that we call, in the middle of other bytes."""
    package = tmp_path / schemas.PACKAGE
    package.mkdir()
    for library in ("_C", "_xpu_C", "_moe_C"):
        ops = [op.schema for op in (*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS) if op.library == library]
        (package / f"{library}.abi3.so").write_bytes(b"\x7fELF\0" + "\0".join(ops).encode() + b"\0rest")
    monkeypatch.setattr(schemas, "distribution", lambda _: Wheel(tmp_path))
    schemas.faults.cache_clear()
    yield package
    schemas.faults.cache_clear()


def refused_details(spec, problem, version: str = "0.1.16.2") -> list[str]:
    machine = BMG.with_packages({"vllm-xpu-kernels": version})
    refusals = refusals_for(spec, problem, machine)
    assert {refusal.code for refusal in refusals} <= {Code.PACKAGE_VERSION}
    return [refusal.detail for refusal in refusals]


def test_a_wheel_with_our_schemas_is_accepted(wheel: Path):
    assert refused_details(GEMM, replace(LINEAR, scheme=MXFP4_W4A4)) == []
    assert refused_details(MOE, EXPERTS) == []


def test_a_wheel_without_an_operator_is_refused(wheel: Path):
    library = wheel / "_xpu_C.abi3.so"
    library.write_bytes(library.read_bytes().replace(b"\0fp4_gemm(", b"\0fp5_gemm("))
    (detail,) = refused_details(GEMM, replace(LINEAR, scheme=MXFP4_W4A4))
    assert "registers no _xpu_C::fp4_gemm" in detail
    assert refused_details(MOE, EXPERTS) == []


def test_a_wheel_with_another_schema_is_refused(wheel: Path):
    library = wheel / "_moe_C.abi3.so"
    library.write_bytes(library.read_bytes().replace(b"int local_experts_num)", b"int local_experts_num, bool x)"))
    (detail,) = refused_details(MOE, EXPERTS)
    assert "_moe_C::remap_hidden_states is" in detail
    assert "bool x" in detail


def test_a_wheel_without_a_library_is_refused(wheel: Path):
    (wheel / "_C.abi3.so").unlink()
    assert any("has no _C.abi3.so" in detail for detail in refused_details(GEMM, replace(LINEAR, scheme=MXFP4_W4A4)))


def test_bytes_of_another_version_say_nothing(wheel: Path):
    (wheel / "_C.abi3.so").unlink()
    assert refused_details(GEMM, replace(LINEAR, scheme=MXFP4_W4A4), "0.1.12") == []


def test_nothing_heavy_is_imported_to_ask(tmp_path: Path):
    code = (
        "import sys\n"
        "from halfbyte_xpu.plugin import halfbyte_kernels\n"
        "from halfbyte import describe\n"
        "from halfbyte.eligibility import refusals_for\n"
        "from halfbyte.problems import LinearProblem\n"
        "from halfbyte.schemes import SCHEMES\n"
        "problem = LinearProblem(scheme=SCHEMES['mxfp4-w4a4'], n=64, k=64)\n"
        "machine = describe('xpu-bmg').with_packages({'vllm-xpu-kernels': '0.1.16.2', 'torch': '2.14.0+xpu'})\n"
        "for spec in halfbyte_kernels(): refusals_for(spec, problem, machine)\n"
        "heavy = {'torch', 'vllm_xpu_kernels', 'intel_extension_for_pytorch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
