"""What we say of the library, compared with what the library says of itself, and what is said when it is not there."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from halfbyte.decisions import State, decide
from halfbyte.eligibility import refusals_for
from halfbyte.machines import CUDA_ARCHES, Machine, describe
from halfbyte.policies import Policy
from halfbyte.problems import LinearProblem
from halfbyte.refusals import Code
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_blackwell.backends import BACKENDS, WEIGHT_ONLY
from halfbyte_cuda_blackwell.common import CUDNN_FRONTEND, CUTLASS_DSL, FLASHINFER
from halfbyte_cuda_blackwell.known_bad import KNOWN_BAD
from halfbyte_cuda_blackwell.linear_specs import LINEAR

CAPABILITIES = tuple(int(arch.removeprefix("sm_")) for arch in CUDA_ARCHES)
#: What the library can and we do not declare: Rubin, of which nothing is known here, and cute-dsl's own SM12x kernels.
NOT_DECLARED = {"cutlass": {107}, "cudnn": {107}, "trtllm": {107}, "cute-dsl": {107, 120, 121}, "b12x": set()}
EVERYTHING = {"flashinfer-python": "0.7.2", "nvidia-cutlass-dsl": "4.7.1", "nvidia-cudnn-frontend": "1.31.0"}
SPECS = {spec.id: spec for spec in LINEAR}


def problem(scheme: str = "nvfp4-w4a4") -> LinearProblem:
    return LinearProblem(scheme=SCHEMES[scheme], n=4096, k=4096)


def machine(arch: str, **packages: str) -> Machine:
    return describe(arch).with_packages({name.replace("_", "-"): version for name, version in packages.items()})


@pytest.mark.parametrize("name", BACKENDS)
def test_we_declare_the_cards_that_the_library_declares(name: str):
    library = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    theirs = {cc for cc in (*CAPABILITIES, 107) if library.mm_fp4.is_backend_supported(name, cc)}
    assert theirs - set(BACKENDS[name].capabilities) == NOT_DECLARED[name]
    assert set(BACKENDS[name].capabilities) <= theirs


def test_the_weight_only_back_ends_run_where_we_choose_them():
    library = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    for capability, backend in WEIGHT_ONLY.items():
        assert library.mm_bf16_fp4.is_backend_supported(backend, capability)
    assert not any(library.mm_bf16_fp4.is_backend_supported(backend, 90) for backend in WEIGHT_ONLY.values())


def test_what_we_require_is_what_the_library_requires_of_its_back_ends():
    metadata = pytest.importorskip("importlib.metadata")
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    assert Requirement(FLASHINFER).specifier.contains(metadata.version("flashinfer-python"))
    theirs = {one.name: one for one in map(Requirement, metadata.requires("flashinfer-python")) if one.marker is None}
    for text in (CUTLASS_DSL, CUDNN_FRONTEND):
        ours = Requirement(text)
        (bound,) = ours.specifier
        assert theirs[ours.name].specifier.contains(bound.version, prereleases=True)


@pytest.mark.parametrize("spec", LINEAR, ids=lambda spec: spec.id)
def test_the_refusal_says_that_the_library_is_absent(spec):
    arch = spec.devices[0]
    scheme = next(iter(spec.schemes))
    (refusal,) = [r for r in refusals_for(spec, problem(scheme), machine(arch)) if "flashinfer" in r.detail]
    assert refusal.code is Code.PACKAGE_MISSING
    assert refusal.detail == "needs flashinfer-python>=0.7.2,<0.8, which is not installed"
    assert refusal.hint == "pip install 'halfbyte[blackwell]'"


@pytest.mark.parametrize("version", ["0.6.14", "0.7.1", "0.8.0"])
def test_the_refusal_says_which_other_version_is_there(version: str):
    for spec in LINEAR:
        found = refusals_for(
            spec,
            problem(next(iter(spec.schemes))),
            describe(spec.devices[0]).with_packages({**EVERYTHING, "flashinfer-python": version}),
        )
        assert [refusal.code for refusal in found] == [Code.PACKAGE_VERSION]
        assert found[0].detail == f"needs flashinfer-python>=0.7.2,<0.8; flashinfer-python {version} is installed"


@pytest.mark.parametrize("arch", ["sm_100", "sm_103", "sm_110", "sm_120", "sm_121"])
def test_nothing_is_missing_where_everything_is_installed(arch: str):
    for spec in LINEAR:
        if arch in spec.devices:
            found = refusals_for(spec, problem(next(iter(spec.schemes))), describe(arch).with_packages(EVERYTHING))
            assert not found, spec.id


@pytest.mark.parametrize(("arch", "missing"), [("sm_100", "nvidia-cutlass-dsl"), ("sm_110", "nvidia-cudnn-frontend")])
def test_the_weight_only_kernel_needs_what_its_back_end_on_the_card_needs(arch: str, missing: str):
    spec = SPECS["flashinfer.bf16-fp4"]
    here = describe(arch).with_packages({name: v for name, v in EVERYTHING.items() if name != missing})
    (refusal,) = refusals_for(spec, problem("nvfp4-w4a16"), here)
    assert refusal.code is Code.PACKAGE_MISSING
    assert missing in refusal.detail
    old = describe(arch).with_packages({**EVERYTHING, missing: "1.0"})
    (refusal,) = refusals_for(spec, problem("nvfp4-w4a16"), old)
    assert refusal.code is Code.PACKAGE_VERSION
    assert "1.0 is installed" in refusal.detail


def test_a_known_bad_combination_is_blocked_with_its_thread_and_can_be_required():
    kernels = [("cuda-blackwell", spec) for spec in LINEAR]
    answer = decide(problem(), describe("sm_120"), kernels)
    (bad,) = [one for one in answer.candidates if one.spec.id == "flashinfer.cudnn"]
    assert bad.state is State.BLOCKED
    assert [refusal.code for refusal in bad.refusals] == [Code.KNOWN_BAD]
    assert "https://github.com/flashinfer-ai/flashinfer/issues/2577" in bad.refusals[0].detail
    required = decide(problem(), describe("sm_120"), kernels, [Policy(require="flashinfer.cudnn")])
    assert required.chosen().spec.id == "flashinfer.cudnn"


def test_every_known_bad_combination_names_its_effect_and_a_public_thread():
    for rows in KNOWN_BAD.values():
        for row in rows:
            assert row.effect
            assert row.thread.startswith("https://github.com/")


def test_known_bad_combinations_are_of_kernels_that_exist():
    assert {kernel_id for op, kernel_id in KNOWN_BAD if op == "linear"} <= set(SPECS)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_machine_before_blackwell_is_refused(name: str):
    for arch in ("sm_80", "sm_89", "sm_90"):
        codes = [r.code for r in refusals_for(SPECS[f"flashinfer.{name}"], problem(), describe(arch))]
        assert Code.DEVICE in codes
